"""Several adapters on one base: switching with stock PEFT, combining, what they have in common; folded checkpoints."""

import json

import pytest
import torch
from models import FAMILIES, lora_config, outputs_of, randomize
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.adapters.combine import combine_adapters
from hf_gatelora.adapters.export import fold_checkpoint
from hf_gatelora.adapters.inspection import grids, inspect_adapter, overlap

CLIP, DINO = FAMILIES["clip"], FAMILIES["dinov2"]
VISION = "vision_model.encoder.layers.{}.mlp.{}"
TEXT = "text_model.encoder.layers.0.mlp.fc1"


def write(family, folder, seed=0, **settings):
    """A stock adapter with random weights, heads included."""
    model = get_peft_model(family["model"](), lora_config(family["model"](), **settings))
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def folded(family, folder, open_blocks, seed=0):
    """An adapter that gates froze to the given blocks."""
    model = get_peft_model(family["model"](), lora_config(family["model"]()))
    gates = attach_gates(model, GateConfig(target_active=len(open_blocks) / 18))
    randomize(model, seed)
    gates.set_scores([0.2 if name in open_blocks else 0.0 for name in gates.names])
    gates.freeze()
    gates.save_folded(folder)
    return folder


def summed(family, weighted):
    """The base plus the weighted changes that each adapter makes to its weights, by merging with stock PEFT."""
    model, base = family["model"](), dict(family["model"]().named_parameters())
    for folder, weight in weighted.items():
        merged = dict(PeftModel.from_pretrained(family["model"](), folder).merge_and_unload().named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(weight * (merged[name] - base[name]))
    return outputs_of(family, model)


def loaded(family, folder):
    return outputs_of(family, PeftModel.from_pretrained(family["model"](), folder))


def test_switching_and_stock_combination_of_folded_adapters(tmp_path):
    """Stock PEFT does this with what is written here, the combination by concatenation."""
    one = folded(CLIP, tmp_path / "one", [VISION.format(0, "fc1"), TEXT], 1)
    two = folded(CLIP, tmp_path / "two", [VISION.format(0, "fc1"), VISION.format(1, "fc2")], 2)
    model = PeftModel.from_pretrained(CLIP["model"](), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(outputs_of(CLIP, model), loaded(CLIP, tmp_path / name))
    model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "both", combination_type="cat")
    model.set_adapter("both")
    expected = summed(CLIP, {one: 1.0, two: -0.5})
    torch.testing.assert_close(outputs_of(CLIP, model), expected, atol=1e-5, rtol=0)
    combine_adapters([one, two], [1.0, -0.5], tmp_path / "both")
    torch.testing.assert_close(loaded(CLIP, tmp_path / "both"), expected, atol=1e-5, rtol=0)


HEAD = {"modules_to_save": ["classifier"]}
LOW, HIGH = (["dinov2.encoder.layer.0.mlp.fc1"], ["dinov2.encoder.layer.1.mlp.fc1"])
# Family, settings of each adapter with its weight, rank of the combination.
COMBINATIONS = {
    "disjoint": (CLIP, [({"target_modules": [TEXT]}, 1.0), ({"target_modules": [VISION.format(1, "fc2")]}, 1.0)], 4),
    "shared, other ranks": (CLIP, [({}, 0.7), ({"r": 2, "lora_alpha": 3, "target_modules": [TEXT]}, -0.3)], 6),
    "rslora": (CLIP, [({"use_rslora": True, "r": 3}, 0.5), ({"target_modules": [TEXT]}, 2.0)], 7),
    "patterns": (CLIP, [({"rank_pattern": {"fc2": 2}, "alpha_pattern": {"fc1": 16}}, 1.0), ({}, 1.0)], 8),
    "exclude": (
        CLIP,
        [({"target_modules": ["fc1"], "exclude_modules": TEXT}, 1.0), ({"target_modules": [TEXT]}, 1)],
        4,
    ),
    "heads": (DINO, [({"target_modules": LOW, **HEAD}, 1.0), ({"target_modules": HIGH, **HEAD}, 0.5)], 4),
    "one head": (DINO, [({"target_modules": LOW, **HEAD}, 1.0), ({}, 0.5)], 8),
    "three": (CLIP, [({"target_modules": [name]}, w) for name, w in (("fc1", 1.0), ("fc2", 0.2), ("q_proj", -1.0))], 4),
}


@pytest.mark.filterwarnings("error:.*missing adapter keys")
@pytest.mark.parametrize("case", COMBINATIONS)
def test_combination_is_the_sum_of_the_changes(case, tmp_path):
    family, parts, rank = COMBINATIONS[case]
    weighted = {write(family, tmp_path / str(i), i, **s): weight for i, (s, weight) in enumerate(parts)}
    combine_adapters(list(weighted), list(weighted.values()), tmp_path / "sum", family["model"]())
    torch.testing.assert_close(loaded(family, tmp_path / "sum"), summed(family, weighted), atol=2e-5, rtol=1e-5)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["r"] == rank
    assert not config.get("rank_pattern")


def test_an_adapter_at_weight_one_keeps_its_values(family, tmp_path):
    one = write(family, tmp_path / "one", r=3, lora_alpha=5, target_modules=["fc1"])
    two = write(family, tmp_path / "two", r=3, lora_alpha=7, target_modules=["fc2"])
    combine_adapters([one, two], [1.0, 0.5], tmp_path / "both")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (one, tmp_path / "both"))
    assert len(after) == 2 * len(before)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_combinations_that_are_refused(tmp_path):
    one = write(DINO, tmp_path / "one", target_modules=["fc1"], **HEAD)
    other = write(CLIP, tmp_path / "clip")
    dora = write(CLIP, tmp_path / "dora", use_dora=True)
    wide = FAMILIES["clip"]["model"]()
    wide.text_model.encoder.layers[0].mlp.fc1 = torch.nn.Linear(16, 40)
    get_peft_model(wide, lora_config(wide, target_modules=[TEXT])).save_pretrained(tmp_path / "wide")
    biased = write(CLIP, tmp_path / "biased")
    config = json.loads((biased / "adapter_config.json").read_text())
    (biased / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    for folders, weights, output, message in (
        ([one], [1], "x", "Give two adapters or more"),
        ([one, one], [1], "x", "2 adapters and 1 weights"),
        ([one, one], [1, float("nan")], "x", "finite numbers"),
        ([other, one], [1, 1], "one", "one is the adapter's own folder"),
        ([one, one], [0.2, 0.3], "x", r"classifier.* comes with weights that sum to 0.5: pass the base model"),
        ([other, dora], [1, 1], "x", "dora cannot be scaled: it uses DoRA"),
        ([other, biased], [1, 1], "x", "biased uses lora_bias"),
        ([other, tmp_path / "wide"], [1, 1], "x", r"mlp\.fc1\.lora_B.*on other base models"),
        ([tmp_path / "none", one], [1, 1], "x", "none holds no readable adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            combine_adapters(folders, weights, tmp_path / output)
        assert not (tmp_path / "x").exists()


def test_overlap(tmp_path):
    one = inspect_adapter(folded(CLIP, tmp_path / "one", [VISION.format(0, "fc1"), TEXT]))
    two = inspect_adapter(write(CLIP, tmp_path / "two", target_modules=[VISION.format(1, "fc2"), TEXT], r=2))
    assert two.modules[TEXT] == {"parameters": 2 * (16 + 32), "rank": 2}
    found = overlap(one, two)
    assert (found["both"], found["only_first"], found["only_second"]) == (
        [TEXT],
        [VISION.format(0, "fc1")],
        [VISION.format(1, "fc2")],
    )
    assert found["share"] == pytest.approx(1 / 3)
    assert found["towers"]["vision_model"] == {"both": 0, "only_first": 1, "only_second": 1}
    report = one.report()
    assert (report["open"], report["gates"], report["towers"]["text_model"]) == (2, 18, {"gates": 6, "open": 1})
    assert report["lora_parameters"] == one.summary["open_parameters"]
    assert two.report()["gates"] is None


def test_grid_tells_all_modules_apart():
    names = [
        f"encoder.stages.{s}.layers.{i}.{end}" for s in (0, 1) for i in (0, 1) for end in ("out.dense", "in.dense")
    ]
    names += ["encoder.stages.0.layers.0.fc1", "head.dense"]
    encoder, head = grids(names)
    assert encoder.layers == ["0.0", "0.1", "1.0", "1.1"]
    assert encoder.columns == ["out.dense", "in.dense", "fc1"]
    assert encoder.cells["1.0", "in.dense"] == "encoder.stages.1.layers.0.in.dense"
    assert (head.layers, head.columns) == ([""], ["dense"])
    assert sorted([*encoder.cells.values(), *head.cells.values()]) == sorted(names)


@pytest.mark.parametrize("kind", ["straight_through", "sigmoid"])
def test_fold_of_a_checkpoint(kind, tmp_path):
    """Before and after the freeze: a stock adapter with what is open, and the checkpoint's outputs."""
    model = get_peft_model(CLIP["model"](), lora_config(CLIP["model"]()))
    gates = attach_gates(model, GateConfig(kind=kind, target_active=0.2))
    randomize(model)
    gates.set_scores([0.2 if "fc" in name else 0.0 for name in gates.names])
    for name, blocks in {"before": 6 if kind == "straight_through" else 18, "after": 4}.items():
        checkpoint, output = tmp_path / name, tmp_path / f"{name}-folded"
        gates.save_folded(checkpoint)
        fold_checkpoint(checkpoint, output)
        files = {file.name for file in output.iterdir() if not file.name.startswith(".")}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "gates.json"}, (
            "the card is for who asks for one"
        )
        assert len(inspect_adapter(output).modules) == blocks
        assert torch.equal(loaded(CLIP, output), loaded(CLIP, checkpoint))
        gates.freeze()
    for folder, message in ((checkpoint, "own folder"), (write(CLIP, tmp_path / "stock"), "nothing to fold")):
        with pytest.raises(ValueError, match=message):
            fold_checkpoint(folder, checkpoint)


def test_fold_of_a_checkpoint_with_all_closed(tmp_path):
    model = get_peft_model(CLIP["model"](), lora_config(CLIP["model"]()))
    gates = attach_gates(model)
    randomize(model)
    gates.set_scores([0.0] * 18)
    gates.save_folded(tmp_path / "checkpoint")
    fold_checkpoint(tmp_path / "checkpoint", tmp_path / "folded")
    assert len(inspect_adapter(tmp_path / "folded").modules) == 1
    assert torch.equal(loaded(CLIP, tmp_path / "folded"), outputs_of(CLIP, CLIP["model"]()))
