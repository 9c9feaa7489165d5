"""Gated LoRA for Hugging Face Trainer and Accelerate: fine-tune about 5 % of the LoRA blocks, chosen by gates."""

from importlib import import_module

__version__ = "0.1.0"

# The names below are imported on first use: whoever needs only one part does not pay for the others.
_HOME = {
    "GateConfig": "config",
    "GateController": "training.controller",
    "attach_gates": "training.attach",
    "lora_targets": "gates.targets",
    "GateAnnealingCallback": "training.callbacks",
    "RetentionCallback": "training.retention",
    "GatedLoraTrainer": "training.trainer",
    "GatedLoraTrainingArguments": "training.trainer",
    "load_open_clip": "adapters.openclip",
    "export_open_clip": "adapters.openclip",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
