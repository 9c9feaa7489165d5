"""A run that is resumed from any of its checkpoints ends bit-identical to the run that was never stopped."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import make_trainer
from models import FAMILIES, Images, lora_config, outputs_of
from peft import get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.config import KINDS
from hf_gatelora.training.loop import checkpoint_gates

FREEZE = 8  # of 16 steps
RUN = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "weight_decay": 0.1}


def end_state(trainer) -> dict:
    optimizer = trainer.optimizer.state_dict()
    return {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer["state"],
        "groups": optimizer["param_groups"],
        "scheduler": trainer.lr_scheduler.state_dict()["_last_lr"],
        "gates": trainer.gates.summary(),
        "logs": [{k: v for k, v in r.items() if "train_" not in k} for r in trainer.state.log_history],
    }


def assert_identical(actual, expected, path="run"):
    assert type(actual) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), path
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_identical(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for i, (a, e) in enumerate(zip(actual, expected)):
            assert_identical(a, e, f"{path}[{i}]")
    else:
        assert actual == expected, path


@pytest.mark.parametrize(("kind", "rewind"), [*((kind, False) for kind in KINDS), ("straight_through", True)])
def test_resumed_is_uninterrupted(family, kind, rewind, tmp_path):
    settings = {"gate_kind": kind, "gate_rewind": rewind, **RUN}
    whole = make_trainer(family, tmp_path, **settings)
    whole.train()
    expected = end_state(whole)
    assert 0 < expected["gates"]["open"] < expected["gates"]["gates"]
    for step in (2, FREEZE - 1, FREEZE, FREEZE + 4):
        resumed = make_trainer(family, tmp_path / "resumed", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_identical(end_state(resumed), expected, f"from step {step}")


def test_resumed_with_head_layer_gates_and_another_adapter_name(tmp_path):
    family = FAMILIES["dinov2"]

    def trainer(output):
        base = family["model"]()
        config = lora_config(base, modules_to_save=["classifier"], lora_dropout=0.1)
        model = get_peft_model(base, config, adapter_name="mine")
        settings = {"gate_granularity": "layer", "gate_target_active": 0.5}
        return make_trainer(family, output, model=model, **settings, **RUN)

    whole = trainer(tmp_path)
    whole.train()
    for step in (3, 12):
        resumed = trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_identical(end_state(resumed), end_state(whole), f"from step {step}")


def test_every_checkpoint_is_a_stock_adapter(family, tmp_path, stock_peft):
    outputs = {}

    class Outputs(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            outputs[state.global_step] = outputs_of(family, model)

    trainer = make_trainer(family, tmp_path, callbacks=[Outputs()], **RUN | {"save_steps": 4})
    trainer.train()
    assert sorted(outputs) == [4, 8, 12, 16]
    for step, expected in outputs.items():
        folder = tmp_path / f"checkpoint-{step}"
        torch.testing.assert_close(stock_peft(family, folder), expected, atol=1e-5, rtol=1e-5)
        blocks = len(load_file(folder / "adapter_model.safetensors")) / 2
        assert blocks == (len(trainer.gates.names) if step < FREEZE else trainer.gates.open_mask.sum())
    trainer.save_model()
    torch.testing.assert_close(stock_peft(family, tmp_path), outputs[16], atol=1e-5, rtol=1e-5)


def test_resuming_takes_the_last_complete_checkpoint(family, tmp_path):
    settings = RUN | {"save_steps": 4}
    make_trainer(family, tmp_path, **settings).train()
    state = tmp_path / "checkpoint-16" / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # killed while writing
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()  # killed before writing
    resumed = make_trainer(family, tmp_path, **settings)
    first = []
    resumed.add_callback(FirstStep(first))
    resumed.train(resume_from_checkpoint=True)
    assert first == [8]
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="No complete checkpoint"):
        make_trainer(family, tmp_path, **settings).train(resume_from_checkpoint=True)


class FirstStep(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.steps:
            self.steps.append(state.global_step)


class AnotherBase(dict):
    """The same architecture with other weights."""

    def __init__(self, family):
        def model():
            other = family["model"]()
            for parameter in other.parameters():
                parameter.data.mul_(1.5)
            return other

        super().__init__(family, model=model)


REFUSED = {
    "gates": ({"gate_tau": 0.05}, "another gate configuration: tau was 0.1, is 0.05"),
    "steps": ({"max_steps": 20}, "started with max_steps=16 and is resumed with 20"),
    "base": ({"another": AnotherBase}, "another base model"),
    "family": ({"another": lambda f: FAMILIES["clip" if f["name"] == "dinov2" else "dinov2"]}, "another model or LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("step", [4, 12])
def test_a_checkpoint_of_another_run_is_refused(family, case, step, tmp_path):
    change, message = REFUSED[case]
    make_trainer(family, tmp_path, **RUN | {"save_steps": 4}).train()
    change = dict(change)
    other = change.pop("another", dict)(family)
    trainer = make_trainer(other, tmp_path / "other", **RUN, **change)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


def with_adapters(family, names):
    """A model whose first adapter is to be gated; the others do something of their own."""
    base = family["model"]()
    model = get_peft_model(base, lora_config(base), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora_config(base))
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.data.fill_(0.1)
    return model


@pytest.mark.parametrize("adapters", [["mine", "other"], ["mine", "default"]])
@pytest.mark.parametrize("step", [4, 12])
def test_resumed_beside_another_adapter(family, adapters, step, tmp_path):
    whole = make_trainer(family, tmp_path, model=with_adapters(family, adapters), **RUN)
    whole.train()
    resumed = make_trainer(family, tmp_path / "resumed", model=with_adapters(family, adapters), **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_identical(end_state(resumed), end_state(whole))
    assert list(resumed.model.peft_config) == adapters


@pytest.mark.parametrize("step", [4, 8, 12])
def test_resumed_with_an_optimizer_of_ones_own(family, step, tmp_path):
    def trainer(output):
        base = family["model"]()
        model = get_peft_model(base, lora_config(base))
        gates = attach_gates(model, GateConfig(target_active=0.2, warmup_ratio=0.25))
        trainer = make_trainer(family, output, model=model, **RUN)
        trainer.optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-2))
        return trainer

    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_identical(end_state(resumed), end_state(whole))


@pytest.mark.parametrize("step", [4, 12])
def test_a_trainer_that_has_frozen_does_not_resume(family, step, tmp_path):
    trainer = make_trainer(family, tmp_path, **RUN | {"save_steps": 4})
    trainer.train()
    before = end_state(trainer)
    with pytest.raises(ValueError, match="are frozen already"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_identical(end_state(trainer), before)


def test_a_folder_that_is_no_checkpoint_is_refused(family, tmp_path):
    with pytest.raises(ValueError, match=r"not a checkpoint of gated LoRA"):
        make_trainer(family, tmp_path).train(resume_from_checkpoint=str(tmp_path))


def accuracy_that_falls(step=[0]):  # noqa: B006 - counts its calls
    step[0] += 1
    return {"score": -float(step[0])}


@pytest.mark.parametrize("adapters", [["default"], ["mine"], ["mine", "other"], ["mine", "default"]])
def test_best_model_is_from_after_the_freeze(family, adapters, tmp_path):
    model = with_adapters(family, adapters)
    saved = {}

    class Outputs(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            saved[state.global_step] = outputs_of(family, model)

    trainer = make_trainer(
        family,
        tmp_path,
        model=model,
        eval_dataset=Images(8),
        compute_metrics=lambda prediction: accuracy_that_falls(),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        callbacks=[EarlyStoppingCallback(2), Outputs()],
        **RUN | {"save_steps": 2},
    )
    trainer.train()
    # The score falls at every evaluation: the best one is the first of those that count.
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{FREEZE}")
    assert trainer.state.global_step == FREEZE + 4, "early stopping counts from the freeze"
    assert torch.equal(outputs_of(family, trainer.model), saved[FREEZE])
    assert not torch.equal(saved[FREEZE], saved[FREEZE + 4])


def test_stopping_before_the_freeze_freezes_at_the_end(family, tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    trainer = make_trainer(family, tmp_path, callbacks=[Stop()])
    trainer.train()
    assert trainer.gates.frozen
    assert "before the gates froze" in caplog.text
    assert trainer.gates.open_mask.sum() == round(0.2 * len(trainer.gates.names))


class Loop:
    """A training loop of one's own with 16 steps, whose state accelerate saves and loads."""

    SAVED = (2, FREEZE - 1, FREEZE, FREEZE + 4)

    def __init__(self, with_gates=True):
        torch.manual_seed(0)
        base = FAMILIES["dinov2"]["model"]()
        self.model = get_peft_model(base, lora_config(base, modules_to_save=["classifier"]))
        self.gates = attach_gates(self.model, GateConfig(target_active=0.25, kind="hard_concrete"))
        optimizer = torch.optim.AdamW(self.gates.param_groups(lr=1e-2, weight_decay=0.1))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 16)
        self.accelerator = Accelerator(cpu=True)
        self.prepared, self.optimizer, self.schedule = self.accelerator.prepare(self.model, optimizer, schedule)
        if with_gates:
            checkpoint_gates(self.accelerator, self.gates)

    def run(self, start=0, folder=None):
        loader = DataLoader(Images(64), 4)
        for done, batch in enumerate(loader, 1):
            if done > start:
                loss = self.prepared(**batch).loss + self.gates.penalty()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                self.gates.step(done / len(loader))
                if folder is not None and done in self.SAVED:
                    self.accelerator.save_state(folder / str(done))
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "gates": self.gates.summary(),
        }


def test_a_loop_of_ones_own_resumes(tmp_path):
    whole = Loop()
    expected = whole.run(folder=tmp_path)
    assert 0 < expected["gates"]["open"] < expected["gates"]["gates"]
    for step in Loop.SAVED:
        resumed = Loop()
        resumed.accelerator.load_state(tmp_path / str(step))
        assert resumed.gates.steps == step
        assert_identical(resumed.run(start=step), expected, f"from step {step}")

    whole.accelerator.load_state(tmp_path / str(FREEZE + 4))  # into gates that are frozen: an earlier one
    assert whole.gates.steps == FREEZE + 4
    with pytest.raises(ValueError, match="other open blocks"):
        whole.accelerator.load_state(tmp_path / str(FREEZE - 1))
    Loop(with_gates=False).accelerator.save_state(tmp_path / "without")
    with pytest.raises(ValueError, match="not a checkpoint of gated LoRA"):
        Loop().accelerator.load_state(tmp_path / "without")
