"""Fixtures and the trainer that the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import FAMILIES, Images, lora_config

from hf_gatelora import GatedLoraTrainer, GatedLoraTrainingArguments

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(params=list(FAMILIES))
def family(request) -> dict:
    """Each model family in turn."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with the recipes' tiny world."""
    from world import build

    root = tmp_path_factory.mktemp("world")
    build(root)
    return root


@pytest.fixture(scope="session")
def stock_peft():
    """`stock_peft(family, directory)`: outputs of the adapter in a process that cannot import hf_gatelora."""
    script = Path(__file__).with_name("stock_peft.py")
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def outputs(family: dict, directory) -> torch.Tensor:
        process.stdin.write(f"{family['name']}\t{directory}\n")
        process.stdin.flush()
        answer = process.stdout.readline().strip()
        assert answer.startswith("ok "), answer
        return torch.load(answer.removeprefix("ok "))

    with process:
        yield outputs
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def make_trainer(family: dict, output_dir, model=None, trainer_class=GatedLoraTrainer, **arguments):
    """A trainer of 16 steps on one of the families; `arguments` go to the training arguments."""
    own = {
        k: arguments.pop(k) for k in ("callbacks", "eval_dataset", "compute_metrics", "peft_config") if k in arguments
    }
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 16,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "gate_target_active": 0.2,
        "gate_warmup_ratio": 0.25,
    }
    model = family["model"]() if model is None else model
    peft_config = own.pop("peft_config", None) or (None if hasattr(model, "peft_config") else lora_config(model))
    return trainer_class(
        model,
        GatedLoraTrainingArguments(**settings | arguments),
        train_dataset=Images(),
        peft_config=peft_config,
        **family["trainer"],
        **own,
    )
