"""The CLIP recipe: data from any source, bad data, modes, outputs; and the `gatelora` command."""

import json
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.image
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from models import CLASSES, tiny_clip
from peft import PeftModel
from PIL import Image as PILImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from hf_gatelora.cli import main as gatelora
from hf_gatelora.evaluation.results import Results, read_results
from hf_gatelora.evaluation.retrieval import recall_at
from hf_gatelora.evaluation.zero_shot import top1_accuracy

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import common
import train_clip

NAMES = ["red", "green", "blue", "grey"]


def png(colour: int, shade: int) -> bytes:
    values = [40, 40, 40]
    if colour < 3:
        values[colour] = 150 + shade
    buffer = BytesIO()
    PILImage.new("RGB", (16, 16), tuple(values)).save(buffer, "PNG")
    return buffer.getvalue()


def dataset(count=16, label=None, **columns):
    rows = {
        "image": [{"bytes": png(i % CLASSES, 5 * (i // CLASSES)), "path": None} for i in range(count)],
        "label": [i % CLASSES for i in range(count)],
        "caption": [f"a {NAMES[i % CLASSES]} square" for i in range(count)],
    }
    features = Features({"image": Image(), "label": label or ClassLabel(names=NAMES), "caption": Value("string")})
    return Dataset.from_dict({**rows, **columns}, features=features)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny CLIP with its preprocessing, and images of four colours, as folders and files."""
    root = tmp_path_factory.mktemp("world")
    model = tiny_clip()
    model.config.text_config.eos_token_id = 3
    words = ["<pad>", "<unk>", "<start>", "<end>", "a", "square", *NAMES]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
    model.save_pretrained(root / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(root / "model")
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(root / "model")
    dataset().to_parquet(root / "data.parquet")
    dataset(8).save_to_disk(root / "saved")
    DatasetDict({"train": dataset(8), "test": dataset(4)}).save_to_disk(root / "splits")
    for name in NAMES[:2]:
        (root / "folder" / name).mkdir(parents=True)
        (root / "folder" / name / "0.png").write_bytes(png(NAMES.index(name), 0))
    return root


class TinyClip(train_clip.Clip):
    """The recipe's `Clip`, with a tokenizer that is not CLIP's own."""

    def __init__(self, name):
        from types import SimpleNamespace

        self.name = name
        self.processor = SimpleNamespace(
            image_processor=CLIPImageProcessor.from_pretrained(name),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(name),
            save_pretrained=lambda folder: None,
        )


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """`run(*words)`: the recipe on the tiny world; returns its output folder and what it printed."""
    monkeypatch.setattr(train_clip, "Clip", TinyClip)
    monkeypatch.setattr(train_clip.Trainer, "_validate_args", lambda self: None)

    def start(*words):
        data = str(world / "data.parquet")
        fixed = ["--model", str(world / "model"), "--train", data, "--test", data, "--prompt", "a {} square"]
        fixed += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
        fixed += ["--max_steps", "8", "--per_device_train_batch_size", "8", "--lora_r", "2", "--learning_rate", "1e-2"]
        train_clip.main([*fixed, "--gate_target_active", "0.2", "--gate_warmup_ratio", "0.25", *words])
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
        data = common.LabelledImages(source, transform)
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
        common.LabelledImages(str(tmp_path / "bad.parquet"), lambda image: image)


def test_unreadable_image_is_named_with_its_row(tmp_path):
    data = dataset(4)
    rows = [{"bytes": png(0, 0), "path": "a.png"}, {"bytes": b"no image", "path": "b.png"}]
    data = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
    data.to_parquet(tmp_path / "bad.parquet")
    images = common.LabelledImages(str(tmp_path / "bad.parquet"), lambda image: image)
    images[0]
    with pytest.raises(ValueError, match=r"bad\.parquet, row 1 \(b\.png\): the image cannot be read"):
        images[1]


def test_string_labels_use_the_classes_of_the_training_set(tmp_path):
    strings = Dataset.from_dict({"image": dataset(2)["image"][:], "label": ["green", "blue"]})
    strings.cast_column("image", Image()).to_parquet(tmp_path / "x.parquet")
    own = common.LabelledImages(str(tmp_path / "x.parquet"), lambda image: image)
    assert (own.class_names, own.labels.tolist()) == (["blue", "green"], [1, 0])
    given = common.LabelledImages(str(tmp_path / "x.parquet"), lambda image: image, class_names=NAMES)
    assert (given.class_names, given.labels.tolist()) == (NAMES, [1, 2])
    with pytest.raises(ValueError, match="row 1: label 'blue' lies outside the 2 classes"):
        common.LabelledImages(str(tmp_path / "x.parquet"), lambda image: image, class_names=NAMES[:2])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data.parquet:test", "without splits"),
        ("splits:validation", r"no split 'validation', there are \['test', 'train'\]"),
        ("missing/data.parquet", "no such file or folder"),
        ("model/config.json", "give a .parquet or .arrow file"),
    ],
)
def test_bad_sources(world, source, message):
    with pytest.raises(ValueError, match=message):
        common.load_images(f"{world}/{source}")


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
    (row,) = (r for r in rows if (r["method"], r["role"]) == ("gated", "id"))
    assert f"| gated  | {100 * row['value']:.1f} (" in printed
    clip = TinyClip(str(world / "model"))
    data = common.LabelledImages(str(world / "data.parquet"), clip.pixels)
    tuned = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip.name), output / "gated").eval()
    with torch.no_grad():
        logits = tuned(
            pixel_values=torch.stack([r["pixel_values"] for r in data]),
            **clip.tokens([f"a {name} square" for name in NAMES]),
        ).logits_per_image
    assert row["value"] == pytest.approx((logits.argmax(-1) == data.labels).float().mean().item())
    (base,) = (r for r in rows if (r["method"], r["role"]) == ("base", "id"))
    assert row["value"] > base["value"] + 0.2


def test_contrastive(run):
    output, printed = run("--mode", "contrastive", "--towers", "vision")
    rows = read_results(output / "results.jsonl")
    metrics = {(r["method"], r["metric"]) for r in rows if r["role"] == "id"}
    assert metrics == {(m, f"{d}_recall@1") for m in ("base", "gated") for d in ("image_to_text", "text_to_image")}
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
    ("words", "message"),
    [
        (["--methods", "qlora"], "--methods"),
        (["--mode", "both"], "--mode 'both' is not known"),
        (["--towers", "audio"], "--towers"),
        (["--prompt", "a photo"], "has no {} for the class name"),
        (["--ood", "sketch"], "give name=source"),
        (["--lora_targets", "query", "fc1"], "'query' matches no module of CLIPModel"),
        (["--methods", "lora", "gated", "--resume_from_checkpoint", "x"], "belongs to one method"),
    ],
)
def test_bad_arguments(run, words, message):
    with pytest.raises(ValueError, match=message):
        run(*words)


def test_yaml_and_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    fields = {"model": "m", "train": "a", "test": "b", "ood": ["x=y"], "learning_rate": 0.5, "methods": "gated"}
    config.write_text(yaml.safe_dump(fields))
    classes = [train_clip.ClipArguments, train_clip.GatedLoraTrainingArguments]
    arguments, training = common.parse_arguments(classes, [str(config), "--test", "c"])
    assert (arguments.model, arguments.test, arguments.ood, arguments.methods) == ("m", "c", ["x=y"], ["gated"])
    assert training.learning_rate == 0.5
    arguments, _ = common.parse_arguments(classes, [str(config), "--ood", "p=q", "--ood", "r=s"])
    assert arguments.ood == ["p=q", "r=s"]
    config.write_text("modle: m\n")
    with pytest.raises(ValueError, match="unknown field 'modle'"):
        common.parse_arguments(classes, [str(config)])
    with pytest.raises(ValueError, match="--model is missing"):
        common.parse_arguments(classes, [])


def test_every_recipe_config_parses():
    configs = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
    assert configs
    for config in configs:
        common.parse_arguments([train_clip.ClipArguments, train_clip.GatedLoraTrainingArguments], [str(config)])


def test_metrics_against_values_by_hand():
    images = torch.eye(3)
    assert top1_accuracy(images, images[[1, 0, 2]], torch.tensor([1, 0, 1])) == pytest.approx(2 / 3)
    # Captions 0 and 1 are the same: each matches both; the third image is nearest to a wrong text.
    texts = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.6, 0.6, 0.5]])
    to_text, to_image = recall_at(images, texts, ["a", "a", "b"], k=1)
    assert to_text == pytest.approx(1.0)
    assert to_image == pytest.approx(2 / 3)


def test_results_file_is_whole_after_every_row(tmp_path):
    results = Results(tmp_path / "new" / "results.jsonl", seed=1)
    for value in (0.5, 0.25):
        results.add("base", "id", "top1", value, 10, "test", "x")
        rows = read_results(results.path)
        assert [r["value"] for r in rows] == [0.5, 0.25][: len(rows)]
    assert rows[-1]["seed"] == 1
    assert [f.name for f in results.path.parent.iterdir()] == ["results.jsonl"]


def test_gatelora_inspect(run, tmp_path, capsys):
    output, _ = run()
    assert gatelora(["inspect", str(output / "gated"), "--map", str(tmp_path / "map.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 of 18 blocks open (22.2%)")
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert gatelora(["inspect", str(output / "gated"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["open"] == 4
    assert gatelora(["inspect", str(tmp_path)]) == 2
    assert "no readable gates.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gatelora([])
