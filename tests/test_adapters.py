"""Adapters as files: combining, folding, merging, overlap; where they are written, and what travels with them."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from models import FAMILIES, lora_config, outputs_of, randomize
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2ForImageClassification,
)

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.adapters.bases import load_base, merge_adapter
from hf_gatelora.adapters.combine import combine_adapters
from hf_gatelora.adapters.export import fold_checkpoint, scale_adapter
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


def on_world(world, folder, kind="model", changes=None, **settings):
    """A gated adapter of one of the world's base models."""
    base = (CLIPModel if kind == "model" else Dinov2ForImageClassification).from_pretrained(world / kind)
    model = get_peft_model(base, lora_config(base, **settings))
    gates = attach_gates(model, GateConfig(target_active=0.5))
    randomize(model)
    gates.freeze()
    gates.save_folded(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | (changes or {})))
    return folder


# What writes to a folder: from an adapter, and a second one that only a combination reads.
WRITERS = {
    "fold": lambda one, two, output, **force: fold_checkpoint(one, output, **force),
    "wise": lambda one, two, output, **force: scale_adapter(one, 0.5, output, **force),
    "combine": lambda one, two, output, **force: combine_adapters([one, two], [1, 1], output, **force),
    "merge": lambda one, two, output, **force: merge_adapter(inspect_adapter(one), output, **force),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", WRITERS)
def test_nothing_of_others_is_overwritten(command, world, tmp_path):
    one, two, write = on_world(world, tmp_path / "one"), on_world(world, tmp_path / "two"), WRITERS[command]
    other, output = on_world(world, tmp_path / "other"), tmp_path / "output"
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    for place, what in ((other, "an adapter"), (tmp_path / "model", "a model"), (tmp_path / "notes", "notes.txt")):
        before = contents(place)
        with pytest.raises(ValueError, match=rf"holds {what} that `{command}` did not write from .*one.*--force"):
            write(one, two, place)
        assert contents(place) == before
    with pytest.raises(ValueError, match="own folder"):
        write(one, two, one, force=True)

    write(one, two, output)
    first = contents(output)
    write(one, two, output)  # its own
    assert contents(output).keys() == first.keys()
    with pytest.raises(ValueError, match="did not write from"):
        write(other, two, output)
    weights = next(file for file in output.glob("*.safetensors"))
    save_file(load_file(weights), weights)
    with pytest.raises(ValueError, match="was changed since"):
        write(one, two, output)

    (other / "results.jsonl").write_text("")
    write(one, two, other, force=True)
    write(one, two, tmp_path / "model", force=True)
    for place in (other, tmp_path / "model"):
        assert contents(place).keys() - {"README.md"} == first.keys(), "nothing is left of what was there"
    write(one, two, tmp_path / "notes", force=True)
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["save", *WRITERS])
def test_links_and_temporary_names(command, world, tmp_path):
    one, two, output = on_world(world, tmp_path / "one"), on_world(world, tmp_path / "two"), tmp_path / "output"
    outside = tmp_path / "outside"
    outside.write_text("mine")
    output.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "gates.json", "model.safetensors", "config.json"):
        (output / name).symlink_to(outside)
    for name in (".README.md.tmp", ".tmp-adapter-link", ".gates.json.tmp", ".gatelora_written"):
        (output / name).symlink_to(outside)
    (output / ".tmp-adapter-x").write_text("a file")
    (output / ".tmp-adapter-y").mkdir()
    (output / ".tmp-adapter-y" / "adapter_config.json").write_text("of another process that saves")
    if command == "save":
        on_world(world, output)
    else:
        WRITERS[command](one, two, output, force=True)
    assert outside.read_text() == "mine"
    assert (output / ".tmp-adapter-x").read_text() == "a file"
    assert (output / ".tmp-adapter-y" / "adapter_config.json").exists()
    assert (output / ("config.json" if command == "merge" else "adapter_config.json")).stat().st_size > 100
    assert not (output / ("model.safetensors" if command == "merge" else "adapter_model.safetensors")).is_symlink()
    assert {path.name for path in output.glob(".tmp-*")} == {".tmp-adapter-link", ".tmp-adapter-x", ".tmp-adapter-y"}


def test_the_processor_travels(world, tmp_path, caplog):
    """The adapter's own image processor is another one than that of the base, which also has a tokenizer."""
    one, two = on_world(world, tmp_path / "one"), on_world(world, tmp_path / "two")
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 16, "width": 16}).save_pretrained(one)
    for command, write in WRITERS.items():
        write(one, two, tmp_path / command)
        assert list(AutoImageProcessor.from_pretrained(tmp_path / command).image_mean) == [0.1, 0.2, 0.3], command
    merged, base = (AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "merge", world / "model"))
    assert merged.tokenizer("a red square")["input_ids"] == base.tokenizer("a red square")["input_ids"]
    merge_adapter(inspect_adapter(two), tmp_path / "plain")
    assert AutoImageProcessor.from_pretrained(tmp_path / "plain").image_mean == base.image_processor.image_mean
    assert "different processors" not in caplog.text

    AutoImageProcessor.from_pretrained(world / "model").save_pretrained(two)
    combine_adapters([one, two], [1, 1], tmp_path / "both")
    assert f"different processors: that of {one} is kept" in caplog.text
    (two / "preprocessor_config.json").unlink()
    (two / "tokenizer.json").symlink_to(world / "model" / "tokenizer.json")
    fold_checkpoint(two, tmp_path / "linked")
    assert not (tmp_path / "linked" / "tokenizer.json").exists()
    assert "tokenizer.json is a link and is not copied" in caplog.text


def test_merge_takes_the_revision_that_was_trained_on(world, tmp_path, monkeypatch):
    cached = tmp_path / "models--user--clip"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("new")
    for revision in ("old", "new"):
        shutil.copytree(world / "model", cached / "snapshots" / revision)
    weights = load_file(world / "model" / "model.safetensors")
    changed = {key: value * 2 for key, value in weights.items()}
    save_file(changed, cached / "snapshots" / "new" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    adapter = on_world(world, tmp_path / "adapter", changes={"base_model_name_or_path": "user/clip", "revision": "old"})
    found, _ = load_base(inspect_adapter(adapter))
    key = "visual_projection.weight"
    assert torch.equal(found.state_dict()[key], weights[key])
    merge_adapter(inspect_adapter(adapter), tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[key], weights[key])
    merge_adapter(inspect_adapter(adapter), tmp_path / "given", model="user/clip")  # as a user says, who means main
    assert torch.equal(load_file(tmp_path / "given" / "model.safetensors")[key], changed[key])


def test_the_release_that_has_the_names(world, tmp_path):
    dino = on_world(world, tmp_path / "dino", "dinov2", target_modules=["q_proj", "fc1"])
    mlp = on_world(world, tmp_path / "mlp", "dinov2", target_modules=["fc1"])
    clip = on_world(world, tmp_path / "clip")
    found = [json.loads((folder / "gates.json").read_text())["transformers"] for folder in (dino, mlp, clip)]
    assert found[1:] == [None, None]
    modules = inspect_adapter(dino).modules
    assert found[0] == ("5.18.0" if any("q_proj" in name for name in modules) else None)

    def renamed(old, new, needed):
        weights = load_file(dino / "adapter_model.safetensors")
        save_file({k.replace(old, new): v for k, v in weights.items()}, dino / "adapter_model.safetensors")
        summary = json.loads((dino / "gates.json").read_text())
        (dino / "gates.json").write_text(json.dumps(summary | {"transformers": needed}))

    renamed("fc1", "first", "99.1.0")
    with pytest.raises(ValueError, match=r"no .*first.* since transformers 99\.1\.0, and .* is installed: upgrade"):
        merge_adapter(inspect_adapter(dino), tmp_path / "merged")
    renamed("first", "query", None)
    with pytest.raises(ValueError, match=r"no .*query.*: transformers 5\.18\.0 renamed the layers of dinov2"):
        merge_adapter(inspect_adapter(dino), tmp_path / "merged")
    renamed("query", "other", None)
    with pytest.raises(ValueError, match="give the base model that it was trained on"):
        merge_adapter(inspect_adapter(dino), tmp_path / "merged")


def test_what_is_not_finite(world, tmp_path):
    adapter = on_world(world, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({key: value * 1e6 for key, value in weights.items()}, file)
    with pytest.raises(ValueError, match=r"is not finite in torch\.float16: give another --dtype"):
        merge_adapter(inspect_adapter(adapter), tmp_path / "merged", dtype=torch.float16)
    save_file({key: value * float("nan") for key, value in weights.items()}, file)
    for write in WRITERS.values():
        with pytest.raises(ValueError, match="weights are not finite"):
            write(adapter, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    model = get_peft_model(CLIP["model"](), lora_config(CLIP["model"]()))
    gates = attach_gates(model)
    with torch.no_grad():
        for parameter, value in zip(gates.score_group()["params"][::17], (float("nan"), float("inf")), strict=True):
            parameter.fill_(value)
    gates.step(0.01)
    gates.save_folded(tmp_path / "scores")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads((tmp_path / "scores" / "gates.json").read_text(), parse_constant=refuse)
    assert [block["score"] for block in summary["blocks"]][::17] == [None, None]
    assert inspect_adapter(tmp_path / "scores").summary["gates"] == 18


def test_merge_keeps_the_order_of_the_classes_that_the_base_knows(world, tmp_path):
    """Of more than ten classes, earlier versions wrote the names in the order of their numbers as strings."""
    names = [f"class {i}" for i in range(12)]
    base = Dinov2ForImageClassification.from_pretrained(world / "dinov2", num_labels=12, ignore_mismatched_sizes=True)
    base.config.id2label = dict(enumerate(names))
    base.save_pretrained(tmp_path / "base")
    base = Dinov2ForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora_config(base, modules_to_save=["classifier"]))
    attach_gates(model, GateConfig(target_active=0.2)).save_folded(tmp_path / "adapter")
    summary = json.loads((tmp_path / "adapter" / "gates.json").read_text())
    summary["base_model"]["classes"] = sorted(names)
    (tmp_path / "adapter" / "gates.json").write_text(json.dumps(summary))
    merge_adapter(inspect_adapter(tmp_path / "adapter"), tmp_path / "merged")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").config
    assert [config.id2label[i] for i in range(12)] == names


def test_patterns_of_a_file_are_matched_as_peft_does(tmp_path):
    """Ranks and alphas by regular expressions that PEFT itself would match, here into names."""
    patterns = {"rank_pattern": {r".*layers\.[01]\.mlp\.fc2": 2}, "alpha_pattern": {r"(q|k)_proj": 16, "text.*": 1}}
    one = write(CLIP, tmp_path / "one", **patterns)
    found = inspect_adapter(one)
    assert any("text_model" in key and value == 1 for key, value in found.config["alpha_pattern"].items())
    combine_adapters([one, one], [0.5, 0.5], tmp_path / "same")
    torch.testing.assert_close(loaded(CLIP, tmp_path / "same"), loaded(CLIP, one), atol=1e-5, rtol=1e-5)
