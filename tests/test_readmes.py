"""Every code block of every README runs: Python and diffs on tiny models, shell commands as far as they parse."""

import re
import shlex
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
import yaml
from accelerate import Accelerator
from models import FAMILIES, Images, collate, lora_config, prompts
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import hf_gatelora
from hf_gatelora.cli import parser

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/**/README.md")]
    if path.is_file() and "outputs" not in path.parts and not any(part.startswith(".") for part in path.parts)
)
CLIP, DINO = FAMILIES["clip"], FAMILIES["dinov2"]
NAMES = list("abcd")


def blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def tokenize(texts: list[str]) -> dict:
    tokens = prompts()
    rows = torch.arange(len(texts)) % len(tokens["input_ids"])
    return {key: value[rows] for key, value in tokens.items()}


class Processor(transformers.CLIPImageProcessor):
    """Saves itself, as a Trainer's processing class does."""


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What the snippets take for granted: a base, an adapted model, data, adapters and a Hub that is not asked."""

    def tiny(*args, **kwargs):
        return CLIP["model"]() if "CLIP" in str(args[:1]) else DINO["model"]()

    for kind in (transformers.AutoModelForImageClassification, transformers.CLIPModel):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, kind=kind, **kwargs: tiny(kind))
    monkeypatch.setattr(hf_gatelora, "load_open_clip", lambda *args: (CLIP["model"](), None))
    monkeypatch.setattr("hf_gatelora.card.push.push_adapter", lambda *args: None)
    images = Images()
    model = get_peft_model(DINO["model"](), lora_config(DINO["model"]()))
    for folder in ("sketch", "photo", "outputs/sketch/gated"):
        model.save_pretrained(tmp_path / folder)
    given = {
        "torch": torch,
        "PeftModel": PeftModel,
        "LoraConfig": LoraConfig,
        "get_peft_model": get_peft_model,
        "AdamW": AdamW,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "AutoModelForImageClassification": transformers.AutoModelForImageClassification,
        "BitsAndBytesConfig": transformers.BitsAndBytesConfig,
        "trainer": SimpleNamespace(push_to_hub=lambda license: None),
        "accelerator": Accelerator(cpu=True),
        "base": DINO["model"](),
        "clip": CLIP["model"](),
        "config": lora_config(DINO["model"]()),
        "data": images,
        "processor": Processor(),
        "held_out": Images(12),
        "sample": Images(8),
        "others": images,
        "labels": Images(12).labels,
        "sample_labels": Images(8).labels,
        "other_labels": images.labels,
        "names": NAMES,
        "other_names": NAMES,
        "tokenize": tokenize,
        "epochs": 4,
    }
    return given | {name: getattr(hf_gatelora, name) for name in hf_gatelora.__all__ if name != "__version__"}


WITH_CODE = [path for path in READMES if blocks(path, "python", "diff")]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_runs(path, namespace, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    cpu = {"use_cpu": True, "report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True}
    for kind in (TrainingArguments, hf_gatelora.GatedLoraTrainingArguments):
        made = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, _made=made, **k: _made(self, *a, **(cpu | k)))
    with chdir(tmp_path):
        for text in blocks(path, "python", "diff"):
            if text.lstrip().startswith(("+", "-", " ")):  # a diff: what is there after it
                text = "\n".join(line[1:] for line in text.splitlines() if not line.startswith("-"))
            base = DINO["model"]()
            fresh = {"model": get_peft_model(base, lora_config(base)), "base": DINO["model"]()}
            optimizer = AdamW(fresh["model"].parameters())
            loader = DataLoader(Images(), batch_size=8, collate_fn=collate)
            exec(compile(text, str(path), "exec"), namespace | fresh | {"optimizer": optimizer, "loader": loader})


def commands(path: Path) -> list[list[str]]:
    lines = []
    for text in blocks(path, "sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                lines.append(words)
    return lines


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_name_what_there_is(path):
    for words in commands(path):
        if words[0].endswith("gatelora"):
            parser().parse_args(words[1:])
        for word in words:
            if re.fullmatch(r"(recipes|tests|accelerate_configs)/[\w/.]+\.(py|yaml)", word):
                assert (ROOT / word).is_file(), f"{path.name} names {word}"
        for word in words:
            if word.endswith(".yaml") and (ROOT / word).is_file():
                yaml.safe_load((ROOT / word).read_text())


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300
