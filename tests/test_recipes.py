"""The CLIP recipe: data from any source, bad data, modes, outputs."""

import json
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from transformers import CLIPModel
from world import NAMES, ROOT, TASKS, TinyClip, dataset, parse, png, words

from hf_gatelora.evaluation import images as sources
from hf_gatelora.records import Results, read_results

# isort: split
import methods


@pytest.fixture
def run(world, tmp_path, capsys):
    """`run(*words)`: the recipe on the tiny world; returns its output folder and what it printed."""

    def start(*more):
        methods.main(TinyClip, *parse("clip", [*words(world, tmp_path / "out"), *more]))
        return tmp_path / "out", capsys.readouterr().out

    return start


def test_sources(world):
    def transform(image):
        return torch.tensor(image.getpixel((0, 0)))

    for source, count in {
        str(world / "data.parquet"): 16,
        str(world / "saved"): 8,
        str(world / "splits"): 8,
        f"{world / 'splits'}:test": 4,
        str(world / "folder"): 2,
    }.items():
        data = sources.LabelledImages(source, transform)
        assert len(data) == count, source
        row = data[count - 1]
        assert row["pixel_values"].shape == (3,)
        assert data.class_names[row["labels"]] in NAMES


def broken(**columns):
    return dataset(4, **columns)


BAD_DATA = {
    "no_image": (lambda: broken().remove_columns("image"), r"needs one column of type Image, found 0 \(columns: label"),
    "label_outside": (lambda: broken(label=Value("int64")), "holds Value.*without class names"),
    "label_negative": (lambda: broken_label(-1), r"row 0: label -1 lies outside the 4 classes \(red, green"),
    "label_missing": (lambda: broken_label(None), "row 0: label None lies outside"),
}


def broken_label(value):
    return broken().map(lambda row, i: {"label": value if i == 0 else row["label"]}, with_indices=True)


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, tmp_path):
    make, message = BAD_DATA[case]
    make().to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=message):
        sources.LabelledImages(str(tmp_path / "bad.parquet"), lambda image: image)


def test_unreadable_image_is_named_with_its_row(tmp_path):
    data = dataset(4)
    rows = [{"bytes": png(0, 0), "path": "a.png"}, {"bytes": b"no image", "path": "b.png"}]
    data = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
    data.to_parquet(tmp_path / "bad.parquet")
    images = sources.LabelledImages(str(tmp_path / "bad.parquet"), lambda image: image)
    images[0]
    with pytest.raises(ValueError, match=r"bad\.parquet, row 1 \(b\.png\): the image cannot be read"):
        images[1]


def test_string_labels_use_the_classes_of_the_training_set(tmp_path):
    strings = Dataset.from_dict({"image": dataset(2)["image"][:], "label": ["green", "blue"]})
    strings.cast_column("image", Image()).to_parquet(tmp_path / "x.parquet")
    own = sources.LabelledImages(str(tmp_path / "x.parquet"), lambda image: image)
    assert (own.class_names, own.labels.tolist()) == (["blue", "green"], [1, 0])
    given = sources.LabelledImages(str(tmp_path / "x.parquet"), lambda image: image, class_names=NAMES)
    assert (given.class_names, given.labels.tolist()) == (NAMES, [1, 2])
    with pytest.raises(ValueError, match=r"row 1: label 'blue' lies outside the 2 classes \(red, green\)"):
        sources.LabelledImages(str(tmp_path / "x.parquet"), lambda image: image, class_names=NAMES[:2])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data.parquet:test", "without splits"),
        ("splits:validation", r"no split 'validation', there are \['test', 'train'\]"),
        ("missing/data.parquet", "no such file or folder"),
        ("folder:validation", r"folder:validation: .*validation.* one of \['train'\]"),
        ("model/config.json", "give a .parquet or .arrow file"),
    ],
)
def test_bad_sources(world, source, message):
    with pytest.raises(ValueError, match=message):
        sources.load_images(f"{world}/{source}")


def test_classification_writes_adapter_results_and_gate_map(run, world):
    output, printed = run(
        *["--methods", "lora", "gated", "--retention", f"old={world / 'saved'}", "--max_steps", "80"],
        *["--ood", f"one={world / 'splits'}:test", "--ood", f"two={world / 'folder'}"],
    )
    rows = read_results(output / "results.jsonl")
    measured = {(r["method"], r["role"], r["data"]) for r in rows if r["role"] != "cost"}
    sets = [("id", "test"), ("ood", "one"), ("ood", "two"), ("retention", "old")]
    assert measured == {(m, *s) for m in ("base", "lora", "gated") for s in sets}
    assert {r["n"] for r in rows if r["data"] == "old"} == {8}
    assert all(r["arguments"]["learning_rate"] == 1e-2 and r["versions"]["torch"] for r in rows)
    summary = json.loads((output / "gated" / "gates.json").read_text())
    assert (summary["open"], summary["gates"]) == (4, 18)
    pixels = matplotlib.image.imread(output / "gated" / "gate_map.png")
    assert pixels.std() > 0.05
    assert not list(output.rglob("*tmp*"))

    # The table shows what the file says, and the file what the adapter does.
    (row,) = (r for r in rows if (r["method"], r["role"], r["metric"]) == ("gated", "id", "top1"))
    assert f"| gated  | {100 * row['value']:.1f} (" in printed
    clip = TinyClip(SimpleNamespace(model=str(world / "model")))
    data = sources.LabelledImages(str(world / "data.parquet"), clip.pixels)
    tuned = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip.name), output / "gated").eval()
    with torch.no_grad():
        logits = tuned(
            pixel_values=torch.stack([r["pixel_values"] for r in data]),
            **clip.tokens([f"a {name} square" for name in NAMES]),
        ).logits_per_image
    assert row["value"] == pytest.approx((logits.argmax(-1) == data.labels).float().mean().item())
    (base,) = (r for r in rows if (r["method"], r["role"], r["metric"]) == ("base", "id", "top1"))
    assert row["value"] > base["value"] + 0.2


def test_contrastive(run):
    output, printed = run("--mode", "contrastive", "--towers", "vision")
    rows = read_results(output / "results.jsonl")
    metrics = {(r["method"], r["metric"]) for r in rows if r["role"] == "id"}
    recalls = [f"{d}_recall@{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert metrics == {(method, recall) for method in ("base", "gated") for recall in recalls}
    assert "ID test image_to_text_recall@1" in printed
    assert json.loads((output / "gated" / "gates.json").read_text())["gates"] == 12


def test_resume_from_the_command_line(run):
    output, _ = run("--save_steps", "2")
    expected = (output / "gated" / "adapter_model.safetensors").read_bytes()
    for step in (4, 6, 8):
        for file in (output / "gated" / f"checkpoint-{step}").iterdir():
            file.unlink()
        (output / "gated" / f"checkpoint-{step}").rmdir()
    (output / "gated" / "adapter_model.safetensors").unlink()
    run("--save_steps", "2", "--resume_from_checkpoint", "true")
    assert (output / "gated" / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--methods", "qlora"], "--methods"),
        (["--mode", "both"], "--mode 'both' is not known"),
        (["--towers", "audio"], "--towers"),
        (["--prompt", "a photo"], "has no {} for the class name"),
        (["--ood", "sketch"], "give name=source"),
        (
            ["--label_column", "kind"],
            "needs a column 'kind', found image, label, caption. Say which",
        ),
        (["--lora_targets", "query", "fc1"], "'query' matches no module of CLIPModel"),
        (["--methods", "lora", "gated", "--resume_from_checkpoint", "x"], "belongs to one method"),
    ],
)
def test_bad_arguments(run, line, message):
    with pytest.raises(ValueError, match=message):
        run(*line)


@pytest.mark.parametrize(
    ("recipe", "model", "message"),
    [
        ("clip", "dinov2", "is a dinov2, not a CLIP"),
        ("clip", "none", "none is no model that transformers can load"),
        ("dinov2", "none", "none is no model that transformers can load"),
    ],
)
def test_bad_models(world, tmp_path, recipe, model, message):
    data = str(world / "data.parquet")
    line = ["--model", str(world / model), "--train", data, "--test", data, "--output_dir", str(tmp_path), "--use_cpu"]
    task, _ = TASKS[recipe]
    with pytest.raises(ValueError, match=message):
        methods.main(task, *parse(recipe, line))


def test_yaml_and_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    fields = {"model": "m", "train": "a", "test": "b", "ood": ["x=y"], "learning_rate": 0.5, "methods": "gated"}
    config.write_text(yaml.safe_dump(fields))
    arguments, training = parse("clip", [str(config), "--test", "c"])
    assert (arguments.model, arguments.test, arguments.ood, arguments.methods) == ("m", "c", ["x=y"], ["gated"])
    assert training.learning_rate == 0.5
    arguments, _ = parse("clip", [str(config), "--ood", "p=q", "--ood", "r=s"])
    assert arguments.ood == ["p=q", "r=s"]
    config.write_text("modle: m\n")
    with pytest.raises(ValueError, match="unknown field 'modle'"):
        parse("clip", [str(config)])
    with pytest.raises(ValueError, match="--model is missing"):
        parse("clip", [])


def test_yaml_values_are_those_of_the_command_line(tmp_path, capsys):
    config = tmp_path / "c.yaml"

    def parsed(**fields):
        config.write_text(yaml.safe_dump({"model": "m", "train": "a", "test": "b", **fields}))
        return parse("clip", [str(config)])[0]

    found = parsed(wise=0.5, towers="vision", ood={"x": "y:z"}, retention="p=q", lora_r="8")
    assert (found.wise, found.towers, found.ood, found.retention) == ([0.5], ["vision"], ["x=y:z"], ["p=q"])
    assert found.lora_r == 8
    with pytest.raises(ValueError, match=r"c\.yaml: wise: could not convert string to float: 'half'"):
        parsed(wise=["half"])
    for fields in ({"lora_r": 4.5}, {"num_train_epochs": [1]}, {"lora_r": True}):
        with pytest.raises(SystemExit):
            parsed(**fields)
        ((name, value),) = fields.items()
        assert f"--{name}" in (said := capsys.readouterr().err.splitlines()[-1])
        assert f"value: '{value}'" in said


def test_every_recipe_config_parses():
    configs = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
    assert configs
    for config in configs:
        tasks = [task for task in TASKS if task in config.stem] or ["clip"]
        parse(tasks[0], [str(config)])


def test_results_file_is_whole_after_every_row(tmp_path):
    results = Results(tmp_path / "new" / "results.jsonl", seed=1)
    for value in (0.5, 0.25):
        results.extend([{"method": "base", "role": "id", "metric": "top1", "value": value, "n": 10}])
        rows = read_results(results.path)
        assert [r["value"] for r in rows] == [0.5, 0.25][: len(rows)]
    assert rows[-1]["seed"] == 1
    assert [f.name for f in results.path.parent.iterdir()] == ["results.jsonl"]
