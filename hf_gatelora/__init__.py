"""Gated LoRA for Hugging Face Trainer and Accelerate: fine-tune about 5 % of the LoRA blocks, chosen by gates."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.openclip import export_open_clip, load_open_clip
    from .config import GateConfig
    from .gates.targets import lora_targets
    from .training.attach import attach_gates
    from .training.callbacks import GateAnnealingCallback
    from .training.controller import GateController
    from .training.retention import RetentionCallback
    from .training.trainer import GatedLoraTrainer, GatedLoraTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "GateAnnealingCallback",
    "GateConfig",
    "GateController",
    "GatedLoraTrainer",
    "GatedLoraTrainingArguments",
    "RetentionCallback",
    "__version__",
    "attach_gates",
    "export_open_clip",
    "load_open_clip",
    "lora_targets",
]

# The names are imported on first use: whoever needs only one part does not pay for the others.
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

if not TYPE_CHECKING:  # a type checker would take any name for one that this finds

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
