"""The penalty is what the formula says, whatever the accumulation, and is never part of an evaluation."""

import pytest
import torch
from conftest import make_trainer
from models import FAMILIES, Images, lora_config
from peft import get_peft_model

from hf_gatelora import GateConfig, GatedLoraTrainer, attach_gates

COSTS = ["uniform", "parameters", "compute", "named"]


def attached(family, **config):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    if config.get("cost") == "named":
        names = attach_gates(get_peft_model(family["model"](), lora_config(base)), GateConfig(target_active=0.5)).names
        config["cost"] = {name: 1.0 + i for i, name in enumerate(names)}
    return attach_gates(model, GateConfig(**{"target_active": 0.5} | config))


@pytest.mark.parametrize("cost", COSTS)
def test_gradient_per_score_is_lambda_times_its_share_of_the_cost(family, cost):
    gates = attached(family, cost=cost, lambda_=0.7)
    gates.step(0.4)
    gates.penalty().backward()
    gradient = torch.cat([p.grad for p in gates.score_parameters()])
    assert gradient.sum().item() == pytest.approx(0.7, rel=1e-5)
    layers = dict(gates.model.named_modules())
    if cost == "uniform":
        expected = torch.ones(len(gates.names))
    elif cost == "named":
        expected = torch.arange(1.0, len(gates.names) + 1)
    elif cost == "parameters":
        bases = [layers[f"base_model.model.{n}"].base_layer for n in gates.names]
        expected = torch.tensor([float(b.in_features + b.out_features) for b in bases])
    else:
        # Depth-aware: within a tower and for one kind of layer, an earlier block costs more.
        queries = [i for i, n in enumerate(gates.names) if n.endswith("q_proj") and "text" not in n]
        assert gradient[queries[0]] > gradient[queries[1]] > 0
        return
    torch.testing.assert_close(gradient, 0.7 * expected / expected.sum())


def test_value_does_not_depend_on_the_number_of_blocks():
    values = []
    for family in FAMILIES.values():
        gates = attached(family, lambda_=0.5)
        gates.step(0.4)
        values.append(gates.penalty().item())
    assert values == pytest.approx([0.5 * 0.15] * 2)


def test_no_penalty_in_warmup_nor_after_the_freeze(family):
    gates = attached(family, lambda_=0.5)
    assert gates.penalty().item() == 0
    gates.step(0.05)
    assert gates.penalty().item() == 0
    gates.step(0.2)
    assert gates.penalty().item() > 0
    gates.step(0.5)
    assert gates.frozen
    assert gates.penalty().item() == 0


def test_steering_presses_harder_where_too_many_gates_are_open(family):
    gates = attached(family)
    gates.step(0.4)
    pressing = gates.lambda_
    gates.set_scores(torch.zeros(len(gates.names)))
    assert gates.lambda_ < pressing / 2


@pytest.mark.parametrize("kind", ["straight_through", "hard_concrete"])
def test_accumulation_does_not_change_the_scores(family, tmp_path, kind):
    """Batches of 8 and eight batches of 1: the same scores at every step of the search."""
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            family,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            gate_kind=kind,
            gate_warmup_ratio=0.0,
            gate_lambda=0.5,
            max_steps=8,
        )
        trainer.train()
        runs.append(trainer)
    first, second = (t.gates for t in runs)
    assert (first.scores - 0.15).abs().max() > 1e-3, "the scores have not moved"
    torch.testing.assert_close(first.scores, second.scores, atol=1e-5, rtol=0)
    assert first.open_mask.tolist() == second.open_mask.tolist()
    losses = [[row["penalty"] for row in t.state.log_history if "penalty" in row] for t in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] > 0


def test_evaluation_loss_holds_no_penalty(family, tmp_path):
    trainer = make_trainer(family, tmp_path, eval_dataset=Images(8), gate_lambda=50.0, gate_warmup_ratio=0.0)
    trainer.gates.step(0.4)
    assert trainer.gates.penalty().item() > 5
    before = trainer.evaluate()["eval_loss"]
    trainer.gates.set_scores(trainer.gates.scores + 1.0)  # all still open
    assert trainer.evaluate()["eval_loss"] == before


def test_a_compute_loss_that_drops_the_penalty_is_an_error(family, tmp_path):
    class Dropping(GatedLoraTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**{k: v for k, v in inputs.items() if k != "labels"})[family["output"]].square().mean()

    class Adding(Dropping):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, inputs) + self.penalty(kwargs.get("num_items_in_batch"))

    class OwnStep(GatedLoraTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    class Unused(Dropping):
        def compute_loss(self, model, inputs, **kwargs):
            self.gates.penalty()
            return super().compute_loss(model, inputs)

    with pytest.raises(RuntimeError, match="penalty was not part of this step's loss"):
        make_trainer(family, tmp_path, trainer_class=Unused).train()
    with pytest.raises(RuntimeError, match="penalty was not part of this step's loss"):
        make_trainer(family, tmp_path, trainer_class=Dropping).train()
    for trainer_class in (Adding, OwnStep):
        trainer = make_trainer(family, tmp_path, trainer_class=trainer_class)
        trainer.train()
        assert any(row.get("penalty", 0) > 0 for row in trainer.state.log_history)
