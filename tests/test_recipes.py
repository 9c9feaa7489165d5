"""The recipes: data from any source, bad data and arguments, modes, outputs, the scripts by themselves, the toy."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
import world as recipes
import yaml
from backbones import BACKBONES
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPModel, CLIPProcessor
from world import NAMES, RECIPES, TASKS, dataset, parse, png, words

from hf_gatelora import lora_targets
from hf_gatelora.evaluation import images as sources
from hf_gatelora.records import Results, read_results
from hf_gatelora.training.arguments import explained_errors


@pytest.fixture
def run(world, tmp_path, capsys):
    """`run(*words)`: the recipe on the tiny world; returns its output folder and what it printed."""

    def start(*more):
        recipes.run("clip", [*words(world, tmp_path / "out"), *more])
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
    processor = CLIPProcessor.from_pretrained(output / "gated")  # beside the adapter, as users find it
    tuned = PeftModel.from_pretrained(CLIPModel.from_pretrained(world / "model"), output / "gated").eval()
    data, texts = dataset(), [f"a {name} square" for name in NAMES]
    with torch.no_grad():
        inputs = processor(text=texts, images=data["image"][:], return_tensors="pt", padding=True, truncation=True)
        logits = tuned(**inputs).logits_per_image
    assert row["value"] == pytest.approx((logits.argmax(-1) == torch.tensor(data["label"][:])).float().mean().item())
    (base,) = (r for r in rows if (r["method"], r["role"], r["metric"]) == ("base", "id", "top1"))
    assert row["value"] > base["value"] + 0.2


def test_labels_that_are_numbers_take_their_names_from_a_file(run, world, tmp_path):
    dataset(label=Value("int64")).to_parquet(tmp_path / "numbers.parquet")
    numbers = ["--train", str(tmp_path / "numbers.parquet"), "--test", str(tmp_path / "numbers.parquet")]
    with pytest.raises(ValueError, match="--class_names FILE"):
        run(*numbers)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    more = ["--retention", f"old={world / 'data.parquet'}"]
    expected = [row["value"] for row in read_results(run(*more)[0] / "results.jsonl") if row["role"] != "cost"]
    found = read_results(run(*numbers, *more, "--class_names", str(tmp_path / "names.txt"))[0] / "results.jsonl")
    assert [row["value"] for row in found if row["role"] != "cost"] == expected


def test_contrastive(run):
    output, printed = run("--mode", "contrastive", "--towers", "vision")
    rows = read_results(output / "results.jsonl")
    metrics = {(r["method"], r["metric"]) for r in rows if r["role"] == "id"}
    recalls = [f"{d}_recall@{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert metrics == {(method, recall) for method in ("base", "gated") for recall in recalls}
    assert "ID test image to text recall@1 " in printed
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
        (["--methods", "qlora"], "--methods 'qlora' is not known here: use some of lora, gated"),
        (["--methods", "full"], "--methods 'full' is not known here"),
        (["--lora_targets", "text_model.encoder.layers.0.mlp.fc1", "--towers", "vision"], "are not in --towers"),
        (["--wise", "2"], "the scales lie between 0"),
        (["--imagenet", "test"], "does not have ImageNet's 1000 classes"),
        (["--save_openclip", "secret"], "unknown argument --save_openclip: --help"),
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
        ("clip", "none", "none is not a model that transformers can load"),
        ("dinov2", "none", "none is not a model that transformers can load"),
    ],
)
def test_bad_models(world, tmp_path, recipe, model, message):
    line = [*words(world, tmp_path, recipe), "--model", str(world / model)]
    with pytest.raises(ValueError, match=message):
        recipes.run(recipe, line)


@pytest.mark.parametrize("backbone", ["DINOv2 with SwiGLU", "ConvNeXt (Conv2d)"])
def test_targets_are_those_of_the_model_unless_they_are_named(world, tmp_path, backbone):
    """A backbone whose layers have other names than DINOv2's trains by default; named targets are taken as they are."""
    model = BACKBONES[backbone]["model"]()
    model.config.id2label = dict(enumerate("abcd"[: model.config.num_labels]))
    model.save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(world / "dinov2")
    side = getattr(model.config, "image_size", 32)
    processor.size, processor.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    processor.save_pretrained(tmp_path / "model")
    line = [*words(world, tmp_path / "out", "dinov2"), "--model", str(tmp_path / "model"), "--max_steps", "4"]
    expected = lora_targets(AutoModelForImageClassification.from_pretrained(tmp_path / "model"))
    recipes.run("dinov2", line)
    assert json.loads((tmp_path / "out" / "gated" / "gates.json").read_text())["gates"] == len(expected)
    leaf = expected[0].rpartition(".")[2]
    recipes.run("dinov2", [*line, "--lora_targets", leaf, "--methods", "lora"])
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == [leaf]


def test_named_targets_stay_within_the_towers(run):
    output, _ = run("--lora_targets", "fc1", "--towers", "text", "--methods", "lora")
    weights = load_file(output / "lora" / "adapter_model.safetensors")
    name = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    assert set(weights) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}


def launched(script, *arguments, cwd, **environment):
    """What a script did that was started by itself, as `accelerate launch` starts it."""
    command = [sys.executable, script, *map(str, arguments)]
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, **pipes)


@pytest.mark.parametrize("task", TASKS)
def test_a_script_runs_alone(world, tmp_path, task):
    """Copied into an empty folder it needs the package and nothing else; a YAML file names files beside itself."""
    script = shutil.copy(RECIPES / f"train_{task}.py", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for name in ("model", "dinov2", "data.parquet"):
        (tmp_path / name).symlink_to(world / name)
    model = "model" if task == "clip" else task
    fields = {"model": model, "train": "data.parquet", "test": "data.parquet", "retention": {"old": "data.parquet"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(fields))
    done = launched(script, tmp_path / "c.yaml", *words(world, "out", task)[6:], cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert "| gated  |" in done.stdout
    rows = read_results(tmp_path / "elsewhere" / "out" / "results.jsonl")
    assert {row["split"] for row in rows if row["role"] == "id"} == {str(tmp_path / "data.parquet")}
    assert (tmp_path / "elsewhere" / "out" / "gated" / "README.md").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "no/such/model"], "no/such/model is not a model that transformers can load: "),
        (["--train", "missing.parquet"], "missing.parquet: no such file or folder."),
        (["--gate_tau", "x"], "error: argument --gate_tau"),
        (["--hub_tokn", "hf_secret"], "unknown argument --hub_tokn: "),
    ],
)
def test_input_errors_end_in_one_sentence(world, tmp_path, more, said):
    done = launched(RECIPES / "train_clip.py", *words(world, tmp_path / "out"), *more, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train_clip.py: "))
    assert said in line
    assert "Traceback" not in done.stderr
    assert "usage" not in done.stderr
    assert "secret" not in done.stderr + done.stdout


def test_other_errors_keep_their_traceback(capsys):
    with pytest.raises(KeyError), explained_errors("x"):
        raise KeyError("a mistake of the program")
    with pytest.raises(SystemExit) as end, explained_errors("x"):
        raise OSError("two\nlines")
    assert end.value.code == 2
    assert capsys.readouterr().err == "x: two lines\n"


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
    config.write_text("a: [")
    with pytest.raises(ValueError, match="is not a YAML file"):
        parse("clip", [str(config)])


def test_yaml_names_files_beside_itself(tmp_path, monkeypatch):
    """What exists there is taken from there; all else is as on the command line: a Hub id, a path from here."""
    (tmp_path / "configs" / "own").mkdir(parents=True)
    (tmp_path / "configs" / "own" / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    fields = {"model": "own", "train": "./own:test", "test": "user/data:test", "bank": {"x": "own/a.parquet", "y": "z"}}
    (tmp_path / "configs" / "c.yaml").write_text(yaml.safe_dump({**fields, "output_dir": "own"}))
    found, training = parse("dinov2", ["configs/c.yaml"])
    assert (found.model, found.train, found.test) == ("configs/own", "configs/own:test", "user/data:test")
    assert found.bank == ["x=configs/own/a.parquet", "y=z"]
    assert training.output_dir == "own"
    assert parse("dinov2", ["configs/c.yaml", "--model", "own"])[0].model == "own"


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
    configs = sorted((RECIPES / "configs").rglob("*.yaml"))
    assert configs
    threads = torch.get_num_threads()
    for config in configs:
        tasks = [task for task in TASKS if task in config.stem] or ["clip"]
        found, _ = parse(tasks[0], [str(config)])
        if "quickstart" in config.stem:
            named = [*found.ood, *found.retention, *(getattr(found, "bank", None) or [])]
            sources_of = [found.model, found.train, found.test, *(entry.partition("=")[2] for entry in named)]
            assert all(Path(source).exists() and RECIPES / "toy" in Path(source).parents for source in sources_of)
    torch.set_num_threads(threads)


def test_the_toy_is_the_one_that_was_made():
    toy = RECIPES / "toy"
    sums = dict(reversed(line.split("  ")) for line in (toy / "SHA256SUMS").read_text().splitlines())
    kinds = (".parquet", ".safetensors", ".json")
    files = {str(file.relative_to(toy)) for file in toy.rglob("*") if file.suffix in kinds}
    assert set(sums) == files
    for name, digest in sums.items():
        assert hashlib.sha256((toy / name).read_bytes()).hexdigest() == digest, name
    assert sum((toy / name).stat().st_size for name in sums) < 7e6


def test_the_toys_pictures_are_drawn_again(tmp_path):
    """The script that made the files still does, to the pixel."""
    import draw
    import make

    name, (styles, _, seed) = "sketch-test", make.SETS["sketch-test"]
    stored = sources.load_images(str(RECIPES / "toy" / f"{name}.parquet"))[0]
    drawn, kinds = draw.draw_set(styles, len(stored), seed)
    make.save_set(styles, 8, seed, tmp_path / "few.parquet")
    few = sources.LabelledImages(str(tmp_path / "few.parquet"), lambda image: image)
    assert (few.class_names, len(few)) == (draw.SHAPES, 8)
    assert [label // 32 for label in kinds[:20]] == stored["label"][:20]
    found = sources.LabelledImages(str(RECIPES / "toy" / f"{name}.parquet"), lambda image: image)
    for row in (0, 499):
        assert found[row]["pixel_values"].tobytes() == drawn[row].convert("RGB").tobytes()


def test_results_file_is_whole_after_every_row(tmp_path):
    results = Results(tmp_path / "new" / "results.jsonl", seed=1)
    for value in (0.5, 0.25):
        results.extend([{"method": "base", "role": "id", "metric": "top1", "value": value, "n": 10}])
        rows = read_results(results.path)
        assert [r["value"] for r in rows] == [0.5, 0.25][: len(rows)]
    assert rows[-1]["seed"] == 1
    assert [f.name for f in results.path.parent.iterdir()] == ["results.jsonl"]
