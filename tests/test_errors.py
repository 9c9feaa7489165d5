"""Bad input: each case is one clear message that says what was found and what to do."""

import logging

import pytest
import torch
from conftest import make_trainer
from models import FAMILIES, Images, lora_config
from peft import IA3Config, LoraConfig, get_peft_model

from hf_gatelora import GateAnnealingCallback, GateConfig, GatedLoraTrainer, GatedLoraTrainingArguments, attach_gates

CONFIGS = {
    "kind": ({"kind": "hard"}, "kind='hard' is not known: use one of 'straight_through'"),
    "lambda": ({"lambda_": -0.1}, r"lambda_=-0.1 is out of range: it must be a number >= 0"),
    "lambda_nan": ({"lambda_": float("nan")}, "lambda_=nan is out of range"),
    "budget": ({"target_active": 1.5}, r"target_active=1.5 is out of range: it must be a number in \[0, 1\]"),
    "tower_budget": ({"target_active": {"a": -1}}, r"target_active\['a'\]=-1"),
    "no_tower": ({"target_active": {}}, "names no tower"),
    "regex": ({"target_active": {"(": 0.1}}, "not a valid regular expression"),
    "nothing_decides": ({"target_active": None}, "nothing would close a gate"),
    "tau": ({"tau": 0.2}, "init=0.15 is below tau=0.2: every gate would start closed"),
    "warmup": ({"warmup_ratio": 0.6}, "warmup_ratio=0.6 is not before freeze_ratio=0.5"),
    "freeze": ({"freeze_ratio": 2}, "freeze_ratio=2 is out of range"),
    "rate": ({"learning_rate": 0.0}, "learning_rate=0.0 is out of range: it must be a number > 0"),
    "granularity": ({"granularity": "block"}, "granularity='block' is not known"),
    "cost": ({"cost": {"a": 0}}, r"cost\['a'\]=0 is out of range"),
    "granularity_type": ({"granularity": None}, "granularity=None must be"),
    "cost_type": ({"cost": None}, "cost=None must be"),
    "seed": ({"seed": 1.5}, "seed=1.5 must be an integer"),
    "criterion": ({"criterion": "gradient"}, "criterion='gradient' is not known"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case):
    fields, message = CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        GateConfig(**fields)


def clip_model(**config):
    base = FAMILIES["clip"]["model"]()
    return get_peft_model(base, lora_config(base, **config))


ATTACH = {
    "zero_blocks": ({"target_active": 0.02}, "of 18 gates rounds to 0 open gates.* is 0.02777"),
    "zero_in_a_tower": ({"target_active": {"vision": 0.01, "text": 0.5}}, r"target_active\['vision'\]=0.01 of 12"),
    "unmatched_gate": ({"target_active": {"vision": 0.5}}, r"gate 'text_model\S+' is matched by none"),
    "matched_twice": ({"target_active": {"vision": 0.5, "model": 0.5}}, "is matched by several regexes"),
    "empty_group": ({"granularity": ["model", "resnet"], "target_active": 0.5}, "'resnet'.* matches no LoRA module"),
    "ungrouped": ({"granularity": ["vision"], "target_active": 1.0}, "LoRA module 'text_model.* by none"),
    "cost_names": ({"cost": {"fc1": 2.0}}, "cost must name every gate once: 18 are missing"),
}


def test_a_callback_needs_the_controller():
    for other in (None, GateConfig(), clip_model()):
        with pytest.raises(TypeError, match=f"needs what attach_gates returns, found {type(other).__name__}"):
            GateAnnealingCallback(other)


def test_a_config_that_is_none():
    for other in ({"target_active": 0.5}, 0.5):
        with pytest.raises(TypeError, match=f"must be a GateConfig, found {type(other).__name__}"):
            attach_gates(clip_model(), other)


@pytest.mark.parametrize("case", ATTACH)
def test_attach(case):
    fields, message = ATTACH[case]
    with pytest.raises(ValueError, match=message):
        attach_gates(clip_model(), GateConfig(**fields))


def test_what_cannot_be_gated():
    config = GateConfig(target_active=0.5)
    base = FAMILIES["clip"]["model"]
    with pytest.raises(TypeError, match="needs a PeftModel, found CLIPModel"):
        attach_gates(base(), config)
    with pytest.raises(ValueError, match=r"No adapter 'other': the model has \['default'\]"):
        attach_gates(clip_model(), config, adapter_name="other")
    model = clip_model()
    attach_gates(model, config)
    with pytest.raises(ValueError, match="has gates already, on adapter 'default'"):
        attach_gates(model, config)
    with pytest.raises(TypeError, match="IA3Config: only LoRA"):
        attach_gates(get_peft_model(base(), IA3Config(target_modules=["fc1"], feedforward_modules=[])), config)
    with pytest.raises(TypeError, match=r"token_embedding: a LoRA layer of type Embedding cannot be gated"):
        attach_gates(clip_model(target_modules=["token_embedding", "fc1"]), config)
    with pytest.raises(ValueError, match=r"variant slot .* already taken by DoraLinearVariant"):
        attach_gates(clip_model(use_dora=True), config)
    with pytest.raises(ValueError, match="bias='lora_only' trains biases of the base model"):
        attach_gates(clip_model(bias="lora_only"), config)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the base weights"):
        attach_gates(clip_model(init_lora_weights="pissa"), config)
    two = clip_model()
    two.add_adapter("other", lora_config(two.get_base_model()))
    with pytest.raises(ValueError, match="weights of adapter 'other' do not train"):
        attach_gates(two, config, adapter_name="other")
    with pytest.raises(ValueError, match="lora_bias=True cannot be gated"):
        attach_gates(clip_model(lora_bias=True), config)


def test_target_patterns_that_match_nothing(tmp_path):
    family = FAMILIES["dinov2"]

    def trainer(targets):
        return GatedLoraTrainer(family["model"](), peft_config=LoraConfig(target_modules=targets))

    message = (
        r"'query', 'value' matches no module of Dinov2ForImageClassification "
        r"\('query' is called q_proj since transformers 5; 'value' is called v_proj since transformers 5\). "
        r"Its linear layers are: classifier \(x1\), fc1 \(x2\), fc2 \(x2\), k_proj \(x2\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer(["query", "value", "fc1"])
    with pytest.raises(ValueError, match="matches no module"):
        trainer(r".*\.(key|query)")
    # The same for a model that PEFT has adapted, silently leaving the names that match nothing.
    base = family["model"]()
    with pytest.raises(ValueError, match="'query' matches no module"):
        attach_gates(get_peft_model(base, LoraConfig(target_modules=["query", "fc1"])))


def test_model_and_peft_config_must_go_together(tmp_path):
    model = FAMILIES["clip"]["model"]()
    with pytest.raises(ValueError, match="CLIPModel has no LoRA layers: pass peft_config"):
        GatedLoraTrainer(model)
    with pytest.raises(ValueError, match="PeftModel already"):
        GatedLoraTrainer(clip_model(), peft_config=lora_config(model))
    with pytest.raises(ValueError, match="needs `model`, or `model_init`"):
        GatedLoraTrainer()


def test_scores_and_progress_out_of_range():
    gates = attach_gates(clip_model(), GateConfig(target_active=0.5))
    with pytest.raises(ValueError, match="needs 18 finite values"):
        gates.set_scores([0.1])
    with pytest.raises(ValueError, match="needs 18 finite values"):
        gates.set_scores([float("nan")] * 18)
    gates.step(0.3)
    for progress in (0.2, 1.1, -0.1):
        with pytest.raises(ValueError, match=r"must be in .* not before the last one, 0\.3"):
            gates.step(progress)
    gates.freeze()
    gates.freeze()  # idempotent
    with pytest.raises(RuntimeError, match="after the freeze"):
        gates.set_scores([0.1] * 18)


def test_tau_out_of_reach_of_the_search(tmp_path):
    with pytest.raises(ValueError, match=r"tau=0.1 is out of reach: .* 4 search steps .* at most 0.04"):
        make_trainer(FAMILIES["clip"], tmp_path, gate_target_active=None, gate_lambda=1.0).train()


def test_nan_loss_stops_before_it_is_applied(family, tmp_path):
    class OneBrokenImage(Images):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "pixel_values": row["pixel_values"] * float("nan")} if i == 5 else row

    trainer = make_trainer(family, tmp_path)
    trainer.train_dataset = OneBrokenImage()
    with pytest.raises(RuntimeError, match=r"training loss is nan at step \d"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("outcome", ["open", "closed"])
def test_degenerate_runs_are_loud(family, outcome, tmp_path, caplog):
    trainer = make_trainer(family, tmp_path, gate_target_active=1.0 if outcome == "open" else 0.0)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert f"gates ended {outcome}" in caplog.text
    assert f"ended {outcome}" in trainer.gates.summary()["degenerate"]


def test_an_optimizer_without_the_scores_is_refused(family, tmp_path):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    gates = attach_gates(model, GateConfig(target_active=0.5))
    same = {"gate_target_active": 0.5, "gate_warmup_ratio": 0.1}
    with pytest.raises(ValueError, match="gates were attached with"):
        make_trainer(family, tmp_path, model=model)
    trainer = make_trainer(family, tmp_path, model=model, **same)
    trainer.optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n])
    with pytest.raises(ValueError, match=r"does not update the gates' scores.* with gates.score_group\(\)"):
        trainer.train()
    trainer = make_trainer(family, tmp_path, model=model, **same)
    trainer.optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-2, weight_decay=0.1))
    trainer.train()
    assert gates.frozen


def test_ddp_that_wants_every_gradient_is_refused(family, tmp_path):
    """Closed blocks get no gradient, which this wrapper answers with an error at the step after."""
    model = get_peft_model(family["model"](), lora_config(family["model"]()))
    gates = attach_gates(model, GateConfig(target_active=0.5))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapper = torch.nn.parallel.DistributedDataParallel(model)
        for early in (lambda: gates.step(0.01), gates.freeze):  # at the first step, long before the freeze
            with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
                early()
        wrapper.find_unused_parameters, wrapper.static_graph = True, True
        with pytest.raises(RuntimeError, match="DistributedDataParallel with static_graph=True would fail"):
            gates.step(0.02)
        wrapper.static_graph = False
        gates.freeze()
        assert gates.active_fraction == 0.5
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_would_train_alone(family, tmp_path, monkeypatch):
    arguments = GatedLoraTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert arguments.world_size == 1  # as where accelerate looked for a GPU and found none
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes, but each would train alone .* --use_cpu"):
        GatedLoraTrainer(family["model"](), arguments, peft_config=lora_config(family["model"]()))
