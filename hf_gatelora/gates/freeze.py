"""What the freeze makes of a model: open blocks become stock LoRA, closed ones leave it for good."""

from peft import PeftModel
from torch import Tensor, nn

from . import engines, lora_layers


def check_freezable(model: PeftModel, layers: dict) -> None:
    """Check that closed blocks can be taken out of a model now.

    Raises:
        RuntimeError: where an adapter is merged, or DDP does not allow unused parameters.
    """
    if any(lora_layers.is_merged(layer) for layer in layers.values()):
        raise RuntimeError("Cannot freeze: the adapter is merged into the base weights. Unmerge it first.")
    refuse_strict_ddp(model)


def refuse_strict_ddp(model: PeftModel) -> None:
    """Refuse a model within a DDP that wants a gradient of every parameter.

    Raises:
        RuntimeError: saying how to allow parameters without one.
    """
    if engines.strict_ddp_wrapper(model) is not None:
        raise RuntimeError(
            "Gates cannot freeze here: DistributedDataParallel would fail at the step after, because closed "
            "blocks get no gradient. Pass Accelerator(kwargs_handlers=[DistributedDataParallelKwargs("
            "find_unused_parameters=True)]), or leave ddp_find_unused_parameters=False out of the arguments."
        )


def close_blocks(model: PeftModel, adapter: str, layers: dict, kept: list[str]) -> list[nn.Parameter]:
    """Make the layers in `kept` stock LoRA, and take the adapter out of all others; returns the removed parameters.

    Args:
        layers: the gated LoRA layers by module name.
    """
    removed: list[nn.Parameter] = []
    first = next(iter(layers))
    for name, layer in layers.items():
        if name in kept:
            lora_layers.uninstall(layer, adapter)
        elif kept or name != first:
            removed += lora_layers.remove_adapter(layer, adapter)
        else:
            # PEFT cannot express an adapter without layers: with nothing open, one block stays, with B = 0 and a gate
            # that keeps it so.
            lora_layers.reset(layer, adapter)
            lora_layers.install(layer, adapter, None)
    lora_layers.narrow_targets(model, adapter, kept or [first])
    lora_layers.unwrap_empty_layers(model)
    return removed


def explain_degenerate(is_open: Tensor) -> str | None:
    """What is wrong with a result in which every gate ended the same way; None where it is not so."""
    if 0 < int(is_open.sum()) < len(is_open):
        return None
    if is_open.all():
        return (
            f"All {len(is_open)} gates ended open: this is plain LoRA. Set target_active, or raise lambda_ or "
            "the number of search steps."
        )
    return (
        f"All {len(is_open)} gates ended closed: the adapter does nothing (it is written as one block with "
        "B = 0, because PEFT cannot load an adapter without layers). Set target_active > 0, or lower lambda_."
    )
