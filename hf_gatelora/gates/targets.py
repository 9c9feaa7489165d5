"""Which modules LoRA should adapt: the linear layers inside a model's repeated layers, whatever their names."""

import copy

from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from .lora_layers import CONVS, base_layer, describe_linear_layers


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the linear layers (and ungrouped convolutions) inside the model's repeated layers, for `target_modules`.

    Repeated layers are the entries of an `nn.ModuleList` or `nn.Sequential` whose entries are all of one class with
    children. Embeddings, projections between towers, poolers and heads lie outside of them. To adapt one of these too,
    add its name to the list; to adapt one tower, filter the list:

        LoraConfig(target_modules=[name for name in lora_targets(model) if name.startswith("vision_model")])

    Args:
        model: any model; for an adapted one the names are those of its base model.

    Returns:
        Full module names, in module order.

    Raises:
        ValueError: if there is none, listing the linear layers that there are.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    found = [name for name, inside in linear_layers(model).items() if inside]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer inside repeated layers. {describe_linear_layers(model)}"
        )
    return found


def without_heads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """A copy of a LoRA config in which "all-linear" stands for the linear layers inside the model's repeated layers.

    In a model without repeated layers it means what it means to PEFT.
    """
    config = copy.deepcopy(config)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        inside = [name for name, inside in linear_layers(model).items() if inside]
        config.target_modules = [n for n in inside if not _is_conv(base_layer(model.get_submodule(n)))] or "all-linear"
    return config


def outside_of_layers(model: PeftModel, names: list[str]) -> list[str]:
    """The names that lie outside of the model's repeated layers; none if it has no repeated layers."""
    layers = linear_layers(model.get_base_model())
    return [name for name in names if not layers.get(name, True)] if any(layers.values()) else []


def linear_layers(model: nn.Module) -> dict[str, bool]:
    """Every linear layer and ungrouped convolution by name, in module order: whether it lies inside a repeated layer.

    Layers that an `nn.MultiheadAttention` reads without calling them are left out: LoRA would have no effect there.
    """
    found: dict[str, bool] = {}

    def walk(module: nn.Module, name: str, inside: bool) -> None:
        module = base_layer(module)
        if _is_linear(module):
            found[name] = inside
        elif not isinstance(module, nn.MultiheadAttention):
            inside = inside or _repeats(module)
            for child, part in module.named_children():
                walk(part, f"{name}.{child}" if name else child, inside)

    walk(model, "", False)
    return found


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, CONVS)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or (isinstance(module, CONVS) and module.groups == 1)


def _repeats(module: nn.Module) -> bool:
    entries = [base_layer(entry) for entry in module] if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    return len({type(entry) for entry in entries}) == 1 and any(True for _ in entries[0].children())
