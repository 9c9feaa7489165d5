"""A world for the recipes' tests: images of four colours in every kind of source, and tiny models with processors."""

import sys
from io import BytesIO
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from models import CLASSES, tiny_clip, tiny_dinov2
from PIL import Image as PILImage
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from hf_gatelora import GatedLoraTrainingArguments
from hf_gatelora.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
sys.path += [str(RECIPES), *(str(RECIPES / name) for name in ("comparison", "benchmarks", "toy"))]

import train_clip
import train_dinov2

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


def merges_of(word: str) -> list[tuple[str, str]]:
    """The merges that make one token of a word."""
    parts, found = [*word[:-1], f"{word[-1]}</w>"], []
    while len(parts) > 1:
        found.append((parts[0], parts[1]))
        parts[:2] = ["".join(parts[:2])]
    return found


def build(root: Path) -> None:
    """Write a tiny CLIP and a tiny DINOv2 with their preprocessing, and images of four colours as folders and files."""
    # A word is one token, merged from its letters from left to right.
    words = ["a", "square", *NAMES]
    merges = list(dict.fromkeys(merge for word in words for merge in merges_of(word)))
    letters = sorted(set("".join(words)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=24)
    model = tiny_clip(len(vocabulary), 24)
    model.save_pretrained(root / "model")
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(images, tokenizer).save_pretrained(root / "model")
    dataset().to_parquet(root / "data.parquet")
    dataset(8).save_to_disk(root / "saved")
    DatasetDict({"train": dataset(8), "test": dataset(4)}).save_to_disk(root / "splits")
    for name in NAMES[:2]:
        (root / "folder" / name).mkdir(parents=True)
        (root / "folder" / name / "0.png").write_bytes(png(NAMES.index(name), 0))
    model = tiny_dinov2()
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(root / "dinov2")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(root / "dinov2")


TASKS = {
    "clip": (train_clip, train_clip.ClipArguments),
    "dinov2": (train_dinov2, train_dinov2.ClassifierArguments),
}


def words(root: Path, output: Path, task: str = "clip") -> list[str]:
    """A short run of a recipe on the tiny world, as a command line."""
    data = str(root / "data.parquet")
    fixed = ["--model", str(root / ("model" if task == "clip" else task)), "--train", data, "--test", data]
    fixed += ["--prompt", "a {} square"] if task == "clip" else []
    fixed += ["--output_dir", str(output), "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    fixed += ["--max_steps", "8", "--per_device_train_batch_size", "8", "--lora_r", "2", "--learning_rate", "1e-2"]
    return [*fixed, "--gate_target_active", "0.2", "--gate_warmup_ratio", "0.25"]


def parse(task: str, line: list[str]) -> tuple:
    """A recipe's command line as its arguments."""
    return parse_arguments([TASKS[task][1], GatedLoraTrainingArguments], line)


def run(task: str, line: list[str]) -> None:
    """Run a recipe from its command line."""
    TASKS[task][0].main(*parse(task, line))
