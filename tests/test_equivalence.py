"""All open is stock PEFT LoRA, all closed is the base model, and every directory written loads with stock PEFT."""

import json

import pytest
import torch
from models import FAMILIES, lora_config, outputs_of, randomize
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.config import KINDS

# What is gated, as (granularity, gates of the tiny CLIP, gates of the tiny Dinov2).
GRANULARITIES = {
    "module": ("module", 18, 12),
    "layer": ("layer", 3, 2),
    "groups": (["attn|attention", r"fc\d"], 2, 2),
}


def gated(family, **config):
    """A gated model whose adapter does something, and its controller."""
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    randomize(model)
    return model, attach_gates(model, GateConfig(**{"target_active": 0.5} | config))


def stock(family):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base))
    randomize(model)
    return model


def assert_close(actual, expected, tolerance):
    limit = tolerance * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= limit


def gradients(model, family):
    output = model.train()(**family["inputs"]())[family["output"]]
    output.square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_open_is_stock_lora(family, granularity):
    model, gates = gated(family, granularity=GRANULARITIES[granularity][0])
    reference = stock(family)
    assert gates.active_fraction == 1.0
    assert_close(outputs_of(family, model), outputs_of(family, reference), 1e-6)
    expected = gradients(reference, family)
    actual = gradients(model, family)
    assert actual.keys() == expected.keys()
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_open_after_the_freeze_is_stock_lora(family, kind):
    model, gates = gated(family, kind=kind, target_active=1.0)
    gates.freeze()
    reference = stock(family)
    assert torch.equal(outputs_of(family, model), outputs_of(family, reference))
    expected = gradients(reference, family)
    for name, gradient in gradients(model, family).items():
        assert torch.equal(gradient, expected[name])


def test_all_closed_is_the_base_bit_for_bit(family):
    model, gates = gated(family)
    gates.set_scores(torch.zeros(len(gates.names)))
    base = outputs_of(family, family["model"]())
    assert not torch.equal(outputs_of(family, stock(family)), base)
    assert torch.equal(outputs_of(family, model), base)


@pytest.mark.parametrize("kind", KINDS)
def test_all_closed_after_the_freeze_is_the_base_bit_for_bit(family, kind, tmp_path, stock_peft, caplog):
    model, gates = gated(family, kind=kind, target_active=0.0)
    gates.freeze()
    base = outputs_of(family, family["model"]())
    assert torch.equal(outputs_of(family, model), base)
    assert "ended closed" in caplog.text
    gates.save_folded(tmp_path)
    assert torch.equal(stock_peft(family, tmp_path), base)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == 1
    assert torch.equal(outputs_of(family, gates.fold()), base)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_freeze_every_directory_gives_the_gated_outputs(family, kind, tmp_path, stock_peft):
    model, gates = gated(family, kind=kind)
    gates.step(0.2)
    gates.set_scores(torch.linspace(0, 0.2, len(gates.names)))
    expected = outputs_of(family, model)
    assert not torch.allclose(expected, outputs_of(family, stock(family)), atol=1e-3)
    gates.save_folded(tmp_path / "folded")
    model.save_pretrained(tmp_path / "saved")
    assert_close(stock_peft(family, tmp_path / "folded"), expected, 1e-5)
    assert_close(stock_peft(family, tmp_path / "saved"), expected, 1e-5)
    assert torch.equal(outputs_of(family, model), expected), "saving changed the model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_after_the_freeze_only_open_blocks_are_written(family, kind, granularity, tmp_path, stock_peft):
    granularity, *counts = GRANULARITIES[granularity]
    count = counts[list(FAMILIES).index(family["name"])]
    model, gates = gated(family, kind=kind, granularity=granularity, target_active=0.5)
    assert len(gates.names) == count
    gates.set_scores(torch.linspace(0, 0.2, count))
    gates.freeze()
    chosen = [m for name in gates.names[count - round(0.5 * count) :] for m in gates.blocks[name]]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(chosen)
    prefix = "base_model.model."
    keys = {f"{prefix}{m}.lora_{x}.weight" for m in chosen for x in "AB"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys
    expected = outputs_of(family, model)
    assert_close(stock_peft(family, tmp_path), expected, 1e-5)

    folded = gates.fold()
    assert type(folded) is PeftModel
    assert torch.equal(outputs_of(family, folded), expected)
    assert set(folded.state_dict()) == set(PeftModel.from_pretrained(family["model"](), tmp_path).state_dict())


def test_frozen_outputs_are_those_of_lora_on_the_open_blocks(family):
    model, gates = gated(family, target_active=0.5)
    gates.set_scores(torch.linspace(0, 0.2, len(gates.names)))
    gates.freeze()
    reference = stock(family)
    closed = [name for name, is_open in zip(gates.names, gates.open_mask) if not is_open]
    for name, parameter in reference.named_parameters():
        if "lora_B" in name and any(f".{c}.lora_B" in name for c in closed):
            parameter.data.zero_()
    assert_close(outputs_of(family, model), outputs_of(family, reference), 1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_same_outputs_and_the_base_architecture(family, kind, frozen):
    model, gates = gated(family, kind=kind, target_active=0.5)
    gates.set_scores(torch.linspace(0, 0.2, len(gates.names)))
    if frozen:
        gates.freeze()
    expected = outputs_of(family, model)
    model.merge_adapter()
    assert_close(outputs_of(family, model), expected, 1e-4)
    model.unmerge_adapter()
    assert_close(outputs_of(family, model), expected, 1e-5)
    merged = model.merge_and_unload()
    assert_close(outputs_of(family, merged), expected, 1e-4)
    base = family["model"]()
    assert str(merged) == str(base)
    assert set(merged.state_dict()) == set(base.state_dict())


def test_closed_stays_closed_across_disabling_switching_and_evaluation(family):
    model, gates = gated(family, target_active=0.5)
    model.add_adapter("other", lora_config(model.get_base_model()))
    gates.set_scores(torch.linspace(0, 0.2, len(gates.names)))
    gates.freeze()
    expected, parameters = outputs_of(family, model), [n for n, p in model.named_parameters() if p.requires_grad]
    base = outputs_of(family, family["model"]())
    with model.disable_adapter():
        assert torch.equal(outputs_of(family, model), base)
    assert torch.equal(outputs_of(family, model), expected)
    model.set_adapter("other")
    assert torch.equal(outputs_of(family, model), base), "the other adapter has B = 0"
    model.set_adapter("default")
    model.eval().train()
    assert torch.equal(outputs_of(family, model), expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == parameters


def test_scores_stay_trainable_when_a_second_adapter_is_added(family):
    model, gates = gated(family)
    model.add_adapter("other", lora_config(model.get_base_model()))
    assert all(p.requires_grad for p in gates.score_parameters())


def test_feature_methods_are_gated_like_forward():
    family = FAMILIES["clip"]
    model, gates = gated(family)
    inputs = family["inputs"]()

    def features(model):
        with torch.no_grad():
            return (
                model.get_image_features(inputs["pixel_values"]).pooler_output,
                model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
            )

    for scores, reference in ((torch.ones(18), stock(family)), (torch.zeros(18), family["model"]())):
        gates.set_scores(scores)
        for actual, expected in zip(features(model), features(reference)):
            assert_close(actual, expected, 1e-6)


def test_a_head_travels_with_the_adapter(tmp_path, stock_peft):
    family = FAMILIES["dinov2"]
    base = family["model"]()
    model = get_peft_model(base, lora_config(base, modules_to_save=["classifier"]))
    randomize(model)
    gates = attach_gates(model, GateConfig(target_active=0.25))
    model.base_model.model.classifier.modules_to_save["default"].weight.data.normal_()
    gates.freeze()
    model.save_pretrained(tmp_path)
    assert_close(stock_peft(family, tmp_path), outputs_of(family, model), 1e-5)
    groups = gates.param_groups(lr=1.0)
    counted = sum(p.numel() for p in groups[0]["params"])
    open_parameters = gates.summary()["open_parameters"]
    assert counted == open_parameters + sum(p.numel() for p in base.classifier.modules_to_save["default"].parameters())


def test_other_adapters_and_names(family, tmp_path, stock_peft):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base), adapter_name="mine")
    randomize(model)
    gates = attach_gates(model, GateConfig(target_active=0.25), adapter_name="mine")
    gates.freeze()
    expected = outputs_of(family, model)
    model.save_pretrained(tmp_path / "one")
    assert_close(stock_peft(family, tmp_path / "one"), expected, 1e-5)
    model.add_adapter("default", lora_config(base))
    model.save_pretrained(tmp_path / "two")
    assert_close(stock_peft(family, tmp_path / "two" / "mine"), expected, 1e-5)
    assert torch.equal(stock_peft(family, tmp_path / "two"), outputs_of(family, family["model"]()))


def test_suffixes_of_open_blocks_are_not_caught(tmp_path):
    """PEFT matches names as suffixes: the open `layer` must not catch `x.layer`, nor its exclusion `x.inner.layer`."""

    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
            inner = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
            self.x = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4), "inner": inner})

        def forward(self, x):
            x = self.inner["layer"](self.layer(x))
            return self.x["inner"]["layer"](self.x["layer"](x))

    torch.manual_seed(0)
    base = Nested()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, lora_config(base, target_modules=["layer"]))
    randomize(model)
    gates = attach_gates(model, GateConfig(target_active=0.5))
    assert gates.names == ["layer", "inner.layer", "x.layer", "x.inner.layer"]
    gates.set_scores([0.2, 0.0, 0.0, 0.2])
    gates.freeze()
    x = torch.randn(2, 4)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = Nested()
    fresh.load_state_dict(state)
    assert_close(PeftModel.from_pretrained(fresh, tmp_path)(x), expected, 1e-5)


def test_dropout_and_bf16_autocast_match_stock(family):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base, lora_dropout=0.5))
    reference_base = family["model"]()
    reference = get_peft_model(reference_base, lora_config(reference_base, lora_dropout=0.5))
    randomize(model)
    randomize(reference)
    attach_gates(model, GateConfig(target_active=0.5))
    results = []
    for candidate in (model, reference):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(candidate.train()(**family["inputs"]())[family["output"]].float())
    assert_close(results[0], results[1], 2e-2)
