"""The mathematics of the gates against references written out here, and the controller's state."""

import copy
import math
import pickle

import pytest
import torch
from models import FAMILIES, lora_config, outputs_of, randomize
from peft import PeftModel, get_peft_model

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.config import KINDS


def gated(family, **config):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    randomize(model)
    return model, attach_gates(model, GateConfig(**{"target_active": 0.5} | config))


def score_gradients(model, gates, family):
    model.zero_grad()
    model(**family["inputs"]())[family["output"]].square().sum().backward()
    return torch.cat([p.grad for p in gates.score_parameters()])


def test_straight_through_gradient_is_that_of_scaling_the_block(family):
    """d loss / d s = <d loss / d y, (alpha / r) B A x> = <d loss / d B, B>, also where the gate is closed."""
    model, gates = gated(family)
    actual = score_gradients(model, gates, family)
    reference = get_peft_model(family["model"](), lora_config(family["model"]()))
    randomize(reference)
    reference(**family["inputs"]())[family["output"]].square().sum().backward()
    weights = [dict(reference.named_parameters())[f"base_model.model.{n}.lora_B.default.weight"] for n in gates.names]
    expected = torch.stack([(w.grad * w).sum() for w in weights])
    assert expected.abs().min() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    gates.set_scores(torch.zeros(len(gates.names)))
    assert score_gradients(model, gates, family).abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gate_values(kind):
    model, gates = gated(FAMILIES["clip"], kind=kind)
    gates.step(0.3)
    scores = torch.linspace(-0.2, 0.4, 18)
    gates.set_scores(scores)
    if kind == "straight_through":
        expected = [1.0 if s >= 0.1 else 0.0 for s in scores.tolist()]
    elif kind == "sigmoid":
        temperature = gates.summary()["temperature"]
        expected = [1 / (1 + math.exp(-(s - 0.1) / temperature)) for s in scores.tolist()]
    else:
        expected = [min(max(1.2 / (1 + math.exp(-s)) - 0.1, 0), 1) for s in scores.tolist()]
    assert gates.gates.tolist() == pytest.approx(expected, abs=1e-6)
    model.eval()
    assert [gate().item() for gate in model.gates["default"]] == pytest.approx(expected, abs=1e-6)


def test_hard_concrete_penalty_is_the_probability_of_a_non_zero_gate():
    _, gates = gated(FAMILIES["clip"], kind="hard_concrete", lambda_=1.0)
    gates.step(0.4)
    gates.set_scores(torch.full((18,), 0.3))
    noise = torch.rand(200_000)
    samples = torch.sigmoid((noise.log() - (1 - noise).log() + 0.3) / (2 / 3)) * 1.2 - 0.1
    assert gates.penalty().item() == pytest.approx((samples > 0).float().mean().item(), abs=5e-3)


def test_hard_concrete_noise_is_one_draw_per_step_and_only_in_training():
    family = FAMILIES["clip"]
    model, gates = gated(family, kind="hard_concrete", seed=3)
    twin, twin_gates = gated(family, kind="hard_concrete", seed=3)
    other, other_gates = gated(family, kind="hard_concrete", seed=4)

    def training_output(model):
        with torch.no_grad():
            return model.train()(**family["inputs"]())["logits_per_image"]

    seen = []
    for step in range(3):
        for g in (gates, twin_gates, other_gates):
            if step:
                g.step(step / 10)
        assert torch.equal(training_output(model), training_output(model)), "every micro-batch has the same noise"
        assert torch.equal(training_output(model), training_output(twin))
        assert not torch.equal(training_output(model), training_output(other))
        assert not any(torch.equal(training_output(model), output) for output in seen)
        seen.append(training_output(model))
    quiet = outputs_of(family, model)
    gates.step(0.4)
    assert torch.equal(outputs_of(family, model), quiet)
    base = model.get_base_model().eval()  # the mode of the layers counts, not that of the wrapper
    pixels = family["inputs"]()["pixel_values"]
    with torch.no_grad():
        before = base.get_image_features(pixels).pooler_output
        gates.step(0.45)
        assert torch.equal(base.get_image_features(pixels).pooler_output, before)


def test_schedule_of_the_penalty_weight():
    """0 in the warm-up, then a linear rise over the first quarter of the search, then the full weight."""
    _, gates = gated(FAMILIES["clip"], lambda_=2.0, warmup_ratio=0.2, freeze_ratio=0.6)
    seen = []
    for progress in (0.1, 0.2, 0.25, 0.3, 0.5, 0.6):
        gates.step(progress)
        seen.append(gates.lambda_)
    assert seen == pytest.approx([0, 0, 1, 2, 2, 0])


def test_nothing_is_pressed_for_where_all_may_stay_open():
    _, gates = gated(FAMILIES["clip"], target_active={"vision": 0.25, "text": 1.0})
    gates.step(0.4)
    penalty = torch.autograd.grad(gates.penalty(), gates.score_parameters())
    by_name = dict(zip(gates.names, torch.cat(penalty).tolist()))
    assert all((value > 0) == name.startswith("vision") for name, value in by_name.items())


def test_budget_keeps_the_best_scores_ties_by_block_order():
    _, gates = gated(FAMILIES["clip"], target_active=0.25)
    scores = torch.zeros(18)
    scores[[3, 9, 10, 11, 17]] = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.25])
    gates.set_scores(scores)
    gates.freeze()
    assert gates.open_mask.nonzero().flatten().tolist() == [3, 9, 10, 17]  # 4 of 18; 11 ties with 9 and 10
    torch.testing.assert_close(gates.scores, scores)
    assert gates.active_fraction == pytest.approx(4 / 18)


def test_criterion_norm_ranks_by_the_norm_of_the_update(family):
    model, gates = gated(family, criterion="norm", target_active=0.25)
    layers = dict(model.named_modules())
    norms = []
    for name in gates.names:
        layer = layers[f"base_model.model.{name}"]
        norms.append(layer.get_delta_weight("default").norm().item())
    order = sorted(range(len(norms)), key=lambda i: -norms[i])
    scores = torch.zeros(len(norms))
    scores[order] = torch.linspace(0, 0.3, len(norms))  # the scores say the opposite
    gates.set_scores(scores)
    gates.freeze()
    count = round(0.25 * len(norms))
    assert sorted(gates.open_mask.nonzero().flatten().tolist()) == sorted(order[:count])


def test_groups_belong_to_the_tower_of_their_modules():
    groups = ["vision.*attn", "vision.*mlp", "text"]
    _, gates = gated(FAMILIES["clip"], granularity=groups, target_active={"^vision": 0.5, "^text": 0.0})
    assert gates.names == groups
    assert gates.summary()["towers"] == {"^vision": {"gates": 2, "open": 2}, "^text": {"gates": 1, "open": 1}}
    assert sum(len(members) for members in gates.blocks.values()) == 18


def test_casting_the_model_leaves_the_scores_fp32(family):
    model, gates = gated(family)
    gates.set_scores(torch.linspace(0.1234567, 0.2, len(gates.names)))
    expected = gates.scores
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in gates.score_parameters())
    gates.step(0.2)
    assert torch.equal(gates.scores, expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_gated_models_of_their_own(family, make, frozen, tmp_path):
    model, gates = gated(family)
    gates.set_scores(torch.linspace(0, 0.2, len(gates.names)))
    if frozen:
        gates.freeze()
    twin = make(model)
    assert torch.equal(outputs_of(family, twin), outputs_of(family, model))
    twin.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family["model"](), tmp_path)
    torch.testing.assert_close(outputs_of(family, loaded), outputs_of(family, model), atol=1e-5, rtol=1e-5)
    if not frozen:
        optimizer = torch.optim.AdamW(twin.gate_controller.param_groups(lr=0.1))
        score_gradients(twin, twin.gate_controller, family)
        optimizer.step()
        twin.gate_controller.set_scores(torch.zeros(len(gates.names)))
        twin.gate_controller.freeze()
        assert not gates.frozen
        left = {id(p) for p in twin.parameters()}
        assert all(id(p) in left for group in optimizer.param_groups for p in group["params"])


def test_state_dict_moves_the_gates_to_another_model(family):
    for progress in (0.2, 0.6):
        model, gates = gated(family)
        gates.set_scores(torch.linspace(0, 0.2, len(gates.names)))
        gates.step(progress)
        twin, twin_gates = gated(family)
        twin_gates.load_state_dict(gates.state_dict())
        assert twin_gates.summary() == gates.summary()
        assert torch.equal(outputs_of(family, twin), outputs_of(family, model))


def test_fold_twice_and_train_on(family):
    model, gates = gated(family)
    folded = gates.fold()
    assert gates.fold() is folded is model
    assert type(folded) is PeftModel
    assert "save_pretrained" not in vars(folded)
    again = attach_gates(folded, GateConfig(target_active=0.5))  # fresh gates on what is left
    assert len(again.names) == round(0.5 * len(gates.names))


def test_rewind_starts_the_open_blocks_again_from_the_base(family):
    model, gates = gated(family, rewind=True)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=0.01))
    score_gradients(model, gates, family)
    optimizer.step()
    weights = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
    gates.step(0.5)
    assert gates.active_fraction == 0.5
    assert torch.equal(outputs_of(family, model), outputs_of(family, family["model"]()))
    left = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(left) == 2 * gates.open_mask.sum()
    assert all(torch.equal(p, weights[n]) if "lora_A" in n else not p.any() for n, p in left.items())
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def test_rewind_leaves_what_no_step_would_train_again(family):
    for end in (lambda gates: gates.freeze(), lambda gates: gates.step(1.0), lambda gates: gates.fold()):
        model, gates = gated(family, rewind=True)
        end(gates)
        assert not torch.equal(outputs_of(family, model), outputs_of(family, family["model"]()))


def test_freezing_a_merged_model_is_refused(family):
    model, gates = gated(family)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged into the base weights"):
        gates.freeze()
    model.unmerge_adapter()
    gates.freeze()


@pytest.mark.parametrize("kind", KINDS)
def test_ddp_goes_on_after_the_freeze(family, kind, tmp_path):
    """DDP broadcasts buffers, and DINOv2 has none but those of its gates, which go at the freeze."""
    model, gates = gated(family, kind=kind)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for progress in (0.3, 0.8, 0.9):
            actual = parallel(**family["inputs"]())[family["output"]]
            actual.square().sum().backward()
            gates.step(progress)
    finally:
        torch.distributed.destroy_process_group()
    assert gates.frozen
    torch.testing.assert_close(actual, outputs_of(family, model))
