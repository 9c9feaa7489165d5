"""A world for the recipes' tests: images of four colours in every kind of source, and tiny models with processors."""

import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from models import CLASSES, tiny_clip, tiny_dinov2
from PIL import Image as PILImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "recipes"))  # last: the recipe evaluate.py is not the package evaluate

import common
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


def build(root: Path) -> None:
    """Write a tiny CLIP and a tiny DINOv2 with their preprocessing, and images of four colours as folders and files."""
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
    model = tiny_dinov2()
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(root / "dinov2")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(root / "dinov2")


class TinyClip(train_clip.Clip):
    """The recipe's `Clip`, with a tokenizer that is not CLIP's own."""

    def load_processor(self):
        return SimpleNamespace(
            image_processor=CLIPImageProcessor.from_pretrained(self.name),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(self.name),
            save_pretrained=lambda folder: None,
        )


TASKS = {
    "clip": (TinyClip, train_clip.ClipArguments),
    "dinov2": (train_dinov2.Classifier, train_dinov2.ClassifierArguments),
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
    return common.parse_arguments([TASKS[task][1], train_clip.GatedLoraTrainingArguments], line)
