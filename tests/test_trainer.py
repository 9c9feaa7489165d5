"""`GatedLoraTrainer`, the callback on a stock Trainer, and the plain Accelerate loop."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_trainer
from models import FAMILIES, Images, collate, lora_config, outputs_of
from peft import get_peft_model
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_gatelora import (
    GateAnnealingCallback,
    GateConfig,
    GatedLoraTrainer,
    GatedLoraTrainingArguments,
    attach_gates,
)
from hf_gatelora.config import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_run_ends_with_exactly_the_budget_open_and_trains_only_that(family, kind, tmp_path):
    at_freeze = {}

    class AtFreeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 8:
                at_freeze.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    trainer = make_trainer(family, tmp_path, gate_kind=kind)
    trainer.add_callback(AtFreeze())  # after the annealing callback
    trainer.train()
    gates = trainer.gates
    assert gates.open_mask.sum() == round(0.2 * len(gates.names))
    assert set(gates.gates.tolist()) == {0.0, 1.0}
    left = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(left) == 2 * gates.open_mask.sum()
    assert left.keys() == at_freeze.keys()
    assert all(not torch.equal(p, at_freeze[n]) for n, p in left.items()), "open blocks train on"
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in left.values()}
    assert len(trainer.optimizer.state_dict()["state"]) == len(left), "state of closed blocks is dropped"


def test_budget_per_tower(tmp_path):
    trainer = make_trainer(FAMILIES["clip"], tmp_path, gate_target_active='{"vision": 0.25, "^text": 0.0}')
    trainer.train()
    rows = trainer.gates.summary()["towers"]
    assert rows == {"vision": {"gates": 12, "open": 3}, "^text": {"gates": 6, "open": 0}}
    logged = trainer.state.log_history[-2]
    assert logged["open_fraction/vision"] == 0.25
    assert logged["open_fraction/^text"] == 0


def test_fixed_lambda_lets_the_threshold_decide(family, tmp_path):
    settings = {"gate_target_active": None, "gate_lambda": 5.0, "gate_learning_rate": 0.03, "max_grad_norm": 0.0}
    trainer = make_trainer(family, tmp_path, **settings)
    trainer.train()
    gates = trainer.gates
    assert torch.equal(gates.open_mask, gates.scores >= 0.1)


def test_logs_are_separate_series_that_add_up(family, tmp_path):
    trainer = make_trainer(family, tmp_path, gate_kind="sigmoid", logging_steps=1)
    trainer.train()
    rows = [r for r in trainer.state.log_history if "task_loss" in r]
    assert len(rows) == 16
    for row in rows:
        assert row["loss"] == pytest.approx(row["task_loss"] + row["penalty"])
    assert all(row["penalty"] == 0 for row in rows[:4] + rows[8:]), "warm-up and consolidation have none"
    assert all(row["penalty"] > 0 for row in rows[5:8])
    assert rows[1]["gate_temperature"] > rows[6]["gate_temperature"]
    assert rows[0]["open_fraction"] == 1
    assert rows[-1]["open_fraction"] < 0.3
    assert any(r["gate_lambda"] > 0 for r in rows)
    if family["name"] == "clip":
        assert {"open_fraction/vision_model", "open_fraction/text_model"} <= rows[0].keys()


def test_scores_have_their_own_rate_no_decay_and_stay_fp32(family, tmp_path):
    base = family["model"]().to(torch.bfloat16)
    trainer = make_trainer(family, tmp_path, model=base, weight_decay=0.5, bf16=True, gate_learning_rate=0.02)
    scores = trainer.gates.score_parameters()
    groups = [g for g in trainer.create_optimizer().param_groups if any(p is scores[0] for p in g["params"])]
    assert len(groups) == 1
    assert (groups[0]["lr"], groups[0]["weight_decay"], len(groups[0]["params"])) == (0.02, 0.0, len(scores))
    assert all(p.dtype == torch.float32 and p.shape == (1,) for p in scores)
    trainer.train()
    assert trainer.gates.scores.dtype == torch.float32
    assert (trainer.gates.scores - 0.15).abs().max() > 0.01


@pytest.mark.parametrize(
    "length", [{"max_steps": 0}, {"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 0}], ids=str
)
def test_a_run_of_at_most_one_step_freezes(length, tmp_path):
    trainer = make_trainer(FAMILIES["dinov2"], tmp_path, **length)
    trainer.train()
    assert trainer.gates.open_mask.sum() == 2


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adagrad", "rmsprop"])
def test_other_optimizers_train_the_scores(optim, tmp_path):
    trainer = make_trainer(FAMILIES["dinov2"], tmp_path, optim=optim, gate_learning_rate=0.02)
    trainer.train()
    assert trainer.gates.open_mask.sum() == 2
    moved = (trainer.gates.scores - 0.15).abs()
    assert (moved > 1e-4).all()
    assert (moved < 0.5).all()


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing_kwargs": {"use_reentrant": True}}], ids=str)
def test_gradient_checkpointing_gives_the_same_run(family, settings, tmp_path):
    runs = []
    for checkpointing in ({}, {"activation_checkpointing": True, **settings}):
        trainer = make_trainer(family, tmp_path, **checkpointing)
        trainer.train()
        runs.append(trainer)
    torch.testing.assert_close(runs[0].gates.scores, runs[1].gates.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        outputs_of(family, runs[0].model), outputs_of(family, runs[1].model), atol=1e-4, rtol=1e-4
    )


def test_callback_on_a_stock_trainer_gives_the_same_run(tmp_path):
    """The penalty, the scores' optimizer group and the schedule are those of GatedLoraTrainer."""
    family = FAMILIES["dinov2"]
    reference = make_trainer(family, tmp_path, gradient_accumulation_steps=2, weight_decay=0.1)
    arguments = {k: v for k, v in vars(reference.args).items() if k in COMMON}
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    gates = attach_gates(model, reference.args.gate_config())
    stock = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=Images(),
        data_collator=collate,
        callbacks=[GateAnnealingCallback(gates)],
    )
    for trainer in (reference, stock):
        trainer.train()
    assert (gates.scores - 0.15).abs().max() > 0.01
    torch.testing.assert_close(gates.scores, reference.gates.scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs_of(family, model), outputs_of(family, reference.model), atol=1e-5, rtol=1e-5)


COMMON = [
    "output_dir",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "use_cpu",
    "save_strategy",
    "report_to",
    "disable_tqdm",
    "remove_unused_columns",
    "label_names",
    "dataloader_pin_memory",
]


def test_callback_on_a_stock_trainer_needs_a_loss(tmp_path):
    family = FAMILIES["clip"]
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    arguments = {k: v for k, v in vars(make_trainer(family, tmp_path).args).items() if k in COMMON}
    callback = GateAnnealingCallback(attach_gates(model, GateConfig(target_active=0.5)))
    trainer = Trainer(
        model, TrainingArguments(**arguments), train_dataset=Images(), callbacks=[callback], **family["trainer"]
    )
    with pytest.raises(RuntimeError, match="CLIPModel returned none"):
        trainer.train()


def test_plain_accelerate_loop(family, tmp_path, stock_peft):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    gates = attach_gates(model, GateConfig(target_active=0.2))
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(Images(), batch_size=8, shuffle=True, collate_fn=family["trainer"]["data_collator"])
    model, optimizer, loader = accelerator.prepare(model, AdamW(gates.param_groups(lr=1e-2)), loader)
    total_steps, step = 16, 0
    for _ in range(4):
        for batch in loader:
            labels = batch.pop("labels")
            logits = model(**batch)[family["output"]]
            loss = torch.nn.functional.cross_entropy(logits, labels) + gates.penalty()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            gates.step(step / total_steps)
    assert gates.open_mask.sum() == round(0.2 * len(gates.names))
    assert len(optimizer.state_dict()["state"]) == 2 * gates.open_mask.sum()
    gates.save_folded(tmp_path)
    expected = outputs_of(family, accelerator.unwrap_model(model))
    torch.testing.assert_close(stock_peft(family, tmp_path), expected, atol=1e-5, rtol=1e-5)


def test_forgotten_lines_of_an_accelerate_loop_are_said(tmp_path, caplog):
    family = FAMILIES["dinov2"]
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    gates = attach_gates(model, GateConfig(target_active=0.2))
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    model(**family["inputs"]()).logits.sum().backward()
    optimizer.step()
    assert "optimizer decays the gates' scores" in caplog.text
    gates.save_folded(tmp_path)
    assert "not frozen yet: this adapter holds all 12 blocks (step was called 0 times" in caplog.text
    gates.step(0.5)
    assert "No loss contained the gates' penalty" in caplog.text


def test_stock_training_arguments_take_the_defaults(family, tmp_path):
    model = family["model"]()
    trainer = GatedLoraTrainer(model, TrainingArguments(output_dir=str(tmp_path)), peft_config=lora_config(model))
    assert trainer.gates.config == GateConfig()


def test_gate_arguments_on_the_command_line(tmp_path):
    def parse(*words):
        words = ["--output_dir", str(tmp_path), *words]
        return HfArgumentParser(GatedLoraTrainingArguments).parse_args_into_dataclasses(words)[0].gate_config()

    assert parse() == GateConfig()
    assert parse("--gate_target_active", "0.1", "--gate_kind", "sigmoid").target_active == 0.1
    assert parse("--gate_target_active", '{"a": 0.1}').target_active == {"a": 0.1}
    config = parse("--gate_target_active", "none", "--gate_lambda", "0.3", "--gate_granularity", '["a", "b"]')
    assert (config.target_active, config.lambda_, config.granularity) == (None, 0.3, ["a", "b"])
    with pytest.raises(ValueError, match="neither a number"):
        parse("--gate_target_active", "five percent")


def test_only_the_seam_touches_the_internals_of_peft():
    internals = re.compile(r"peft\.tuners|get_pattern_key|\.(lora_variant|get_base_layer|base_layer)\b|\.lora_[AB]\[")
    package = Path(sys.modules["hf_gatelora"].__file__).parent
    assert {file.name for file in package.rglob("*.py") if internals.search(file.read_text())} == {"lora_layers.py"}


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["deepspeed", "open_clip", "matplotlib", "datasets", "evaluate"]
    code = f"""
import sys, hf_gatelora
assert not set({heavy}) & set(sys.modules), sorted(sys.modules)
import peft
from transformers import Trainer
before = set(sys.modules)
from hf_gatelora import *
assert not set({heavy}) & (set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
