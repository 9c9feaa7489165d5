"""The ways in which people come: their optimizer, `model_init`, streams, adapters that exist, TRL; and the presets.

Budgets per tower and freezing a tower are in test_trainer.py.
"""

from types import SimpleNamespace

import pytest
import torch
from backbones import BACKBONES
from conftest import make_trainer
from models import FAMILIES, Images, lora_config, outputs_of, randomize
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from test_equivalence import assert_close
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_gatelora import (
    GateAnnealingCallback,
    GateConfig,
    GatedLoraTrainer,
    GatedLoraTrainingArguments,
    attach_gates,
    lora_targets,
)

DINO = FAMILIES["dinov2"]
HALF = GateConfig(target_active=0.5)


def adapted(family=DINO, **fields):
    base = family["model"]()
    return get_peft_model(base, lora_config(base, **fields))


# ---- presets ----------------------------------------------------------------------------------------------------


def test_targets_of_an_adapted_model_are_those_of_its_base():
    for backbone in BACKBONES.values():
        base = backbone["model"]()
        expected = lora_targets(base)
        assert not [n for n in expected if "embed" in n or n.split(".")[-1] in ("classifier", "lm_head")]
        model = get_peft_model(base, LoraConfig(target_modules=expected))
        assert lora_targets(model) == lora_targets(model.get_base_model()) == expected


def test_targets_leave_out_what_does_not_repeat():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)
            self.depthwise = torch.nn.Conv1d(4, 4, 1, groups=4)
            self.attention = torch.nn.MultiheadAttention(4, 1)

    model = torch.nn.ModuleDict(
        {
            "blocks": torch.nn.Sequential(Block(), Block()),  # as timm does
            "regressors": torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]),
            "head": torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)),
        }
    )
    assert lora_targets(model) == ["blocks.0.fc", "blocks.1.fc"]
    get_peft_model(model, LoraConfig(target_modules=["fc", "regressors.0", "regressors.1", "head.1"]))
    assert lora_targets(model) == ["blocks.0.fc", "blocks.1.fc"]
    message = r"Sequential has no linear layer inside repeated layers. Its linear layers are: 1 \(x1\)"
    with pytest.raises(ValueError, match=message):
        lora_targets(model["head"])


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "ViT", "ConvNeXt (Conv2d)", "BERT"])
def test_all_linear_in_the_trainer_leaves_out_heads_and_projections(name, tmp_path):
    def names(base):
        arguments = GatedLoraTrainingArguments(str(tmp_path), gate_target_active=1.0, report_to="none")
        return GatedLoraTrainer(base, arguments, peft_config=config).gates.names

    config = LoraConfig(target_modules="all-linear")
    base = BACKBONES[name]["model"]()
    expected = [n for n in lora_targets(base) if isinstance(base.get_submodule(n), torch.nn.Linear)]
    assert names(base) == expected
    assert config.target_modules == "all-linear", "the user's config may serve again"
    assert names(torch.nn.Sequential(torch.nn.Linear(4, 4))) == ["0"], "nothing repeats here"


def test_all_linear_of_peft_warns_of_heads_and_projections(caplog):
    base = BACKBONES["CLIP"]["model"]()
    attach_gates(get_peft_model(base, LoraConfig(target_modules="all-linear")), HALF)
    assert "outside of the repeated layers: visual_projection, text_projection." in caplog.text
    assert "target_modules=lora_targets(model) leaves them out" in caplog.text
    caplog.clear()
    base = BACKBONES["CLIP"]["model"]()
    attach_gates(get_peft_model(base, LoraConfig(target_modules=lora_targets(base))), HALF)
    assert not caplog.text


def test_gating_one_tower(tmp_path, stock_peft):
    backbone = BACKBONES["CLIP"]
    base = backbone["model"]()
    targets = [name for name in lora_targets(base) if name.startswith("vision_model")]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    trainer = make_trainer(backbone, tmp_path, model=model, gate_target_active=0.5)
    assert list(trainer.gates.towers) == ["vision_model"]
    trainer.train()
    fresh, inputs = backbone["model"](), backbone["inputs"]()
    texts = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model.eval()
        assert torch.equal(
            model.get_text_features(**texts).pooler_output, fresh.get_text_features(**texts).pooler_output
        )
    trainer.save_model()
    assert_close(stock_peft(backbone, tmp_path), outputs_of(backbone, model), 1e-5)


# ---- optimizers, model_init, streams ----------------------------------------------------------------------------


def test_own_optimizer_and_schedule(tmp_path):
    model = adapted()
    gates = attach_gates(model, HALF)
    optimizer = torch.optim.SGD(gates.param_groups(lr=0.1, weight_decay=0.1), momentum=0.9)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    trainer = GatedLoraTrainer(
        model,
        make_trainer(DINO, tmp_path, max_steps=8, gate_target_active=0.5, gate_warmup_ratio=0.1).args,
        train_dataset=Images(),
        optimizers=(optimizer, schedule),
        **DINO["trainer"],
    )
    trainer.train()
    assert gates.frozen
    assert trainer.optimizer.optimizer is optimizer
    assert trainer.lr_scheduler is schedule
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def from_init(output_dir, model_init, peft_config=None):
    like = make_trainer(DINO, output_dir, max_steps=4, gate_target_active=0.25)
    return GatedLoraTrainer(
        args=like.args,
        model_init=model_init,
        peft_config=peft_config,
        train_dataset=Images(),
        **DINO["trainer"],
    )


@pytest.mark.parametrize("plain", [True, False])
def test_model_init_gives_each_trial_its_own_gates(plain, tmp_path, monkeypatch):
    """Also where every model gets the same LoraConfig, which the freeze of one must not narrow for the next."""
    config = lora_config(DINO["model"]())
    if plain:
        trainer = from_init(tmp_path, DINO["model"], config)
    else:
        trainer = from_init(tmp_path, lambda trial: get_peft_model(DINO["model"](), config))
    trainer.train()
    first, scores = trainer.gates, trainer.gates.scores
    assert first.frozen
    assert first.open_mask.sum() == 3
    # What a hyperparameter search does for its next trial, here without the packages that drive one.
    monkeypatch.setattr("transformers.integrations.integration_utils.hp_params", lambda trial: {})
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: {"gate_target_active": 0.5, "gate_learning_rate": 0.02}
    trainer.train(trial=SimpleNamespace(number=1, params={}))
    assert trainer.gates is not first
    assert trainer.gates.model is trainer.model
    assert trainer.gates.open_mask.sum() == 6
    assert not torch.equal(trainer.gates.scores, scores)
    assert first.open_mask.sum() == 3


def test_model_init_resumes(tmp_path):
    whole = from_init(tmp_path, DINO["model"], lora_config(DINO["model"]()))
    whole.args.save_strategy, whole.args.save_steps = "steps", 1
    whole.train()
    for step in (1, 3):
        resumed = from_init(tmp_path / "resumed", DINO["model"], lora_config(DINO["model"]()))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(resumed.gates.scores, whole.gates.scores)
        assert torch.equal(outputs_of(DINO, resumed.model), outputs_of(DINO, whole.model))


def test_stream_gives_the_run_of_a_data_set(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from Images()

    class InOrder(GatedLoraTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    runs = []
    for stream in (False, True):
        trainer = make_trainer(DINO, tmp_path, trainer_class=InOrder, max_steps=8)
        if stream:
            trainer.train_dataset = Stream()
        trainer.train()
        runs.append(trainer)
    assert torch.equal(runs[0].gates.scores, runs[1].gates.scores)
    assert torch.equal(outputs_of(DINO, runs[0].model), outputs_of(DINO, runs[1].model))


# ---- adapters that exist ----------------------------------------------------------------------------------------


def test_models_adapted_by_transformers_are_told_what_to_do():
    """As `model.add_adapter` adapts them; transformers refuses that call itself where it wants a newer PEFT."""
    base = DINO["model"]()
    injected = inject_adapter_in_model(lora_config(base), base)
    assert injected is base
    for attempt in (
        lambda: attach_gates(injected),
        lambda: GatedLoraTrainer(injected),
        lambda: GatedLoraTrainer(injected, peft_config=lora_config(injected)),
    ):
        with pytest.raises(TypeError, match=r"Dinov2ForImageClassification already has adapter layers") as told:
            attempt()
    assert "call model.save_pretrained(directory)" in str(told.value)
    assert "peft.PeftModel.from_pretrained(base_model, directory, is_trainable=True)" in str(told.value)


def test_an_adapter_that_transformers_saved_goes_on_gated(tmp_path):
    base = DINO["model"]()
    injected = inject_adapter_in_model(lora_config(base), base)
    randomize(injected)
    expected = outputs_of(DINO, injected)
    # What the model's own save_pretrained writes of it.
    injected.peft_config["default"].save_pretrained(tmp_path)
    weights = {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(injected).items()}
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = PeftModel.from_pretrained(DINO["model"](), tmp_path, is_trainable=True)
    attach_gates(model, HALF)
    assert_close(outputs_of(DINO, model), expected, 1e-6)


def test_fresh_gates_on_a_published_adapter(tmp_path, stock_peft):
    trainer = make_trainer(DINO, tmp_path / "one", gate_target_active=0.5)
    trainer.train()
    trainer.save_model()
    opened = [name for name, is_open in zip(trainer.gates.names, trainer.gates.open_mask) if is_open]
    frozen = PeftModel.from_pretrained(DINO["model"](), tmp_path / "one")
    with pytest.raises(ValueError, match=r"do not train. .* load a saved one with is_trainable=True"):
        attach_gates(frozen, HALF)
    model = PeftModel.from_pretrained(DINO["model"](), tmp_path / "one", is_trainable=True)
    again = make_trainer(DINO, tmp_path / "two", model=model, gate_target_active=0.5)
    assert again.gates.names == opened
    assert_close(outputs_of(DINO, model), outputs_of(DINO, trainer.model), 1e-6)
    again.train()
    assert again.gates.open_mask.sum() == 3
    again.save_model()
    assert_close(stock_peft(DINO, tmp_path / "two"), outputs_of(DINO, model), 1e-5)


def test_a_second_gated_adapter_beside_a_frozen_first(tmp_path, stock_peft):
    trainer = make_trainer(DINO, tmp_path / "first", gate_target_active=0.5, max_steps=8)
    trainer.train()
    model = trainer.model
    alone = outputs_of(DINO, model)
    model.add_adapter("second", lora_config(model.get_base_model()))
    with pytest.raises(ValueError, match=r"gates already, on adapter 'default'.* first call its fold\(\)"):
        attach_gates(model, HALF, "second")
    trainer.gates.fold()
    model.base_model.set_adapter(["default", "second"])
    first = {n: p for n, p in model.named_parameters() if ".default." in n}
    for parameter in first.values():
        parameter.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in first.items()}
    randomize(model, seed=5)
    for name, parameter in first.items():
        parameter.data.copy_(before[name])

    both = outputs_of(DINO, model)
    gates = attach_gates(model, GateConfig(target_active=0.5, warmup_ratio=0.25), "second")
    assert_close(outputs_of(DINO, model), both, 1e-6)
    gates.set_scores(torch.zeros(12))
    assert torch.equal(outputs_of(DINO, model), alone), "all closed is what it was without the second adapter"
    gates.set_scores(torch.full((12,), 0.15))
    make_trainer(DINO, tmp_path / "second", model=model, gate_target_active=0.5, max_steps=8).train()
    assert gates.open_mask.sum() == 6
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in first.items())
    expected = outputs_of(DINO, model)
    model.save_pretrained(tmp_path / "both")
    stock = PeftModel.from_pretrained(DINO["model"](), tmp_path / "both")
    stock.load_adapter(tmp_path / "both" / "second", "second")
    stock.base_model.set_adapter(["default", "second"])
    assert_close(outputs_of(DINO, stock), expected, 1e-5)
    assert_close(stock_peft(DINO, tmp_path / "both"), alone, 1e-5)


# ---- TRL --------------------------------------------------------------------------------------------------------


def test_trl(tmp_path, stock_peft):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    backbone = BACKBONES["Llama"]
    rows = [{"input_ids": (2 + (torch.arange(6) + label) % 28).tolist()} for label in range(16)]
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }

    def train(trainer_class, arguments, data, fp16=False, **extra):
        base = backbone["model"]()
        model = get_peft_model(base, LoraConfig(r=4, target_modules=lora_targets(base), task_type="CAUSAL_LM"))
        gates = attach_gates(model, HALF)
        trainer = trainer_class(model, arguments, train_dataset=data, callbacks=[GateAnnealingCallback(gates)], **extra)
        trainer.args.fp16 = fp16  # the accelerator is set up by now: this machine may not know fp16
        trainer.train()
        return trainer, gates

    fields = {"bf16": False, "activation_checkpointing": False, "loss_type": "nll"}
    sft = trl.SFTConfig(str(tmp_path), **settings, **fields)
    tuned = {"arguments": sft, "data": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer, gates = train(trl.SFTTrainer, **tuned)
    assert gates.open_mask.sum() == 4
    assert gates.penalty_count == 4, "one per step until the freeze"
    stock = TrainingArguments(str(tmp_path), lr_scheduler_type=sft.lr_scheduler_type, **settings)
    _, expected = train(Trainer, stock, [{**row, "labels": row["input_ids"]} for row in rows])
    torch.testing.assert_close(gates.scores, expected.scores, atol=1e-5, rtol=0)
    trainer.save_model(str(tmp_path / "adapter"))
    assert_close(stock_peft(backbone, tmp_path / "adapter"), outputs_of(backbone, trainer.model), 1e-5)
    with pytest.raises(RuntimeError, match=r"Under fp16 the gates' penalty cannot be scaled .* Train in bf16 or fp32"):
        train(trl.SFTTrainer, **tuned, fp16=True)
