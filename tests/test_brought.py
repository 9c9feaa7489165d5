"""What people bring to training: their optimizers, compiled models, too little memory, checkpoints of other runs."""

import json
import logging

import pytest
import torch
from conftest import make_trainer
from models import FAMILIES, Images, lora_config
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gatelora import GateAnnealingCallback, GateConfig, GatedLoraTrainer, attach_gates

DINO = FAMILIES["dinov2"]
HALF = GateConfig(target_active=0.5, warmup_ratio=0.25)


def adapted(**fields):
    base = DINO["model"]()
    return get_peft_model(base, lora_config(base, **fields))


def rates(optimizer, gates) -> tuple[set, set]:
    """Learning rates and weight decays of the groups that hold scores."""
    scores = {id(p) for p in gates.score_parameters()}
    groups = [g for g in optimizer.param_groups if any(id(p) in scores for p in g["params"])]
    assert sum(len(g["params"]) for g in groups) == len(scores)
    return {g["initial_lr"] for g in groups}, {g["weight_decay"] for g in groups}


OPTIMIZERS = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
    "AdamW with decay": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1),
    "LoRA+": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16),
    "one group a parameter": lambda m: torch.optim.SGD([{"params": [p], "lr": 1e-4} for p in m.parameters()]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stock", [False, True])
def test_given_optimizers_train_the_scores_at_their_own_rate(name, stock, tmp_path):
    model = adapted()
    gates = attach_gates(model, HALF)
    like = make_trainer(DINO, tmp_path, max_steps=4, gate_target_active=0.5)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append(rates(optimizer.optimizer, gates) if not gates.frozen else None)

    given = {"train_dataset": Images(), "optimizers": (OPTIMIZERS[name](model), None), **DINO["trainer"]}
    if stock:
        settings = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
        arguments = TrainingArguments(str(tmp_path), save_strategy="no", dataloader_pin_memory=False, **settings)
        Trainer(model, arguments, callbacks=[GateAnnealingCallback(gates), Watch()], **given).train()
    else:
        GatedLoraTrainer(model, like.args, callbacks=[Watch()], **given).train()
    assert seen[0] == ({0.01}, {0.0})
    assert gates.open_mask.sum() == 6


def test_an_own_create_optimizer_trains_the_scores_at_their_own_rate(tmp_path):
    class Own(GatedLoraTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
            return self.optimizer

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if not state.global_step:
                assert rates(optimizer.optimizer, trainer.gates) == ({0.01}, {0.0})

    trainer = make_trainer(DINO, tmp_path, trainer_class=Own, callbacks=[Watch()])
    trainer.train()
    assert trainer.gates.frozen


@pytest.mark.parametrize("name", ["lomo", "adalomo", "schedule_free_adamw", "galore_adamw_layerwise"])
def test_optimizers_that_gates_cannot_freeze_under_are_refused(name, tmp_path):
    arguments = make_trainer(DINO, tmp_path).args
    arguments.optim = name
    with pytest.raises(ValueError, match=f"optim='{name}' cannot train gates"):
        GatedLoraTrainer(adapted(), arguments)


def test_scores_that_did_not_learn_are_said(tmp_path, caplog):
    model = adapted()
    before = torch.optim.AdamW(model.parameters())  # holds no scores
    gates = attach_gates(model, HALF)
    for step in range(4):
        model(**DINO["inputs"]()).logits.sum().backward()
        before.step()
        gates.step((step + 1) / 4)
    assert "12 of 12 gates tie at the score 0.15, and their order decided which of them are open" in caplog.text
    assert "made after attach_gates" in caplog.text
    gates.save_folded(tmp_path)
    assert "the scores did not learn" in json.loads((tmp_path / "gates.json").read_text())["degenerate"]
    assert "the scores did not learn" in " ".join((tmp_path / "README.md").read_text().split())


def test_ties_away_from_the_cut_do_not_matter():
    gates = attach_gates(adapted(), HALF)
    gates.set_scores([0.2] * 6 + [0.1] * 6)
    gates.freeze()
    assert gates.degenerate is None


def test_a_search_that_is_too_short_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(DINO, tmp_path, max_steps=4)
        trainer.train()
    message = "1 search steps with learning_rate=0.01 move them by at most 0.01"
    assert message in caplog.text
    assert message in trainer.gates.degenerate
    trainer = make_trainer(DINO, tmp_path, max_steps=24)
    trainer.train()
    assert trainer.gates.degenerate is None


def test_the_freeze_is_one_line(tmp_path, capsys):
    trainer = make_trainer(DINO, tmp_path, gate_rewind=True)
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "froze" in line]
    assert line.startswith("step 8: froze, 2 of 12 blocks open: dinov2.")
    assert line.endswith("; they start again from B = 0")


def test_weights_that_are_not_finite_do_not_rank():
    model = adapted()
    gates = attach_gates(model, GateConfig(target_active=0.5, criterion="norm"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(RuntimeError, match="weights of LoRA blocks are not finite"):
        gates.freeze()


def test_scores_that_are_not_finite_leave_json_valid(tmp_path):
    model = adapted()
    gates = attach_gates(model, HALF)
    with torch.no_grad():
        gates.score_parameters()[0].fill_(torch.nan)
    gates.step(0.3)
    gates.save_folded(tmp_path)

    def refuse(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "gates.json").read_text(), parse_constant=refuse)
    assert [block["score"] for block in found["blocks"]][:1] == [None]


@pytest.mark.parametrize("key", [int, str])
def test_class_names_are_in_the_order_of_their_numbers(key, tmp_path):
    base = DINO["model"]()
    base.config.id2label = {key(i): f"class {i}" for i in range(12)}
    gates = attach_gates(get_peft_model(base, lora_config(base)), HALF)
    gates.freeze()
    gates.save_folded(tmp_path)
    found = json.loads((tmp_path / "gates.json").read_text())["base_model"]["classes"]
    assert found == [f"class {i}" for i in range(12)]


def test_compiled_models_are_refused_before_the_training(tmp_path):
    compiled = torch.compile(DINO["model"](), backend="eager")
    with pytest.raises(ValueError, match="compiled before its gates were attached"):
        make_trainer(DINO, tmp_path, model=compiled, peft_config=lora_config(DINO["model"]()))
    model = adapted()
    with pytest.raises(ValueError, match=r"torch.compile\(peft_model\) after attach_gates"):
        attach_gates(torch.compile(model, backend="eager"), HALF)
    attach_gates(model, HALF)


@pytest.mark.parametrize("stock", [False, True])
def test_memory_that_runs_out_starts_over_with_a_smaller_batch(stock, tmp_path):
    class Once(TrainerCallback):
        done = False

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.done:
                self.done = True
                raise RuntimeError("CUDA out of memory.")

    model = adapted()
    gates = attach_gates(model, HALF)
    settings = {"max_steps": 8, "auto_find_batch_size": True, "gate_target_active": 0.5}
    if stock:
        arguments = make_trainer(DINO, tmp_path, **settings).args
        callbacks = [GateAnnealingCallback(gates), Once()]
        trainer = Trainer(model, arguments, train_dataset=Images(), callbacks=callbacks, **DINO["trainer"])
    else:
        trainer = make_trainer(DINO, tmp_path, model=model, callbacks=[Once()], **settings)
    trainer.train()
    assert trainer._train_batch_size < 8
    assert gates.steps == trainer.state.global_step == 8
    assert gates.open_mask.sum() == 6
    assert gates.penalty_count == 3 + 4, "one a step until the freeze, those of the first attempt too"


# ---- checkpoints ------------------------------------------------------------------------------------------------


def trained(folder, **settings):
    trainer = make_trainer(DINO, folder, save_strategy="steps", save_steps=4, max_steps=8, **settings)
    trainer.train()
    return trainer


def test_a_checkpoint_without_states_is_refused(tmp_path):
    trained(tmp_path / "only", save_only_model=True)
    with pytest.raises(ValueError, match=r"no optimizer and no scheduler state.*save_only_model.*start a new run"):
        make_trainer(DINO, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "only" / "checkpoint-4"))
    trained(tmp_path / "whole")
    (tmp_path / "whole" / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="holds no scheduler state"):
        make_trainer(DINO, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_a_checkpoint_that_is_written_over_and_torn_is_not_complete(tmp_path, monkeypatch):
    trained(tmp_path)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    again = make_trainer(DINO, tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert not (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


def test_only_the_run_that_was_last_started_in_a_folder_is_resumed(tmp_path):
    trained(tmp_path)
    resumed = make_trainer(DINO, tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=True)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    other = make_trainer(DINO, tmp_path, save_strategy="steps", max_steps=8, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        other.train()
    again = make_trainer(DINO, tmp_path, max_steps=8)
    with pytest.raises(ValueError, match=r"checkpoint-8, checkpoint-4\) are of another run than the last one"):
        again.train(resume_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # on purpose
    assert again.gates.frozen


def test_regexes_that_explode_are_stopped(monkeypatch):
    monkeypatch.setattr("hf_gatelora.gates.blocks.SECONDS", 0.05)
    slow = "".join(r"((?:\w|\.)*?)" for _ in range(5)) + r"\1\2\3\4\5{2}(?=#)"
    for field, config in {
        "target_active": GateConfig(target_active={slow: 0.5}),
        "granularity": GateConfig(granularity=[slow]),
    }.items():
        with pytest.raises(ValueError, match=f"{field}: the regex .* takes too long on .* Write a simpler one"):
            attach_gates(adapted(), config)
