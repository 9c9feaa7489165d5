"""What the freeze makes of a model: open blocks become stock LoRA, closed ones leave it for good."""

from peft import PeftModel
from torch import Tensor, nn

from ..config import GateConfig
from . import engines, lora_layers


def check_freezable(model: PeftModel, layers: dict) -> None:
    """Check that closed blocks can be taken out of a model now.

    Raises:
        RuntimeError: if an adapter is merged, or DDP does not allow unused parameters.
    """
    if any(lora_layers.is_merged(layer) for layer in layers.values()):
        raise RuntimeError("Cannot freeze: the adapter is merged into the base weights. Unmerge it first.")
    refuse_strict_ddp(model)


def refuse_strict_ddp(model: PeftModel) -> None:
    """Refuse a model within a DDP that demands a gradient for every parameter.

    Raises:
        RuntimeError: saying how to allow parameters without one.
    """
    wrapper = engines.strict_ddp_wrapper(model)
    if wrapper is not None:
        what = "static_graph=True" if wrapper.static_graph else "find_unused_parameters=False"
        raise RuntimeError(
            f"Gates cannot freeze here: DistributedDataParallel with {what} would fail at the step after, because "
            "closed blocks get no gradient. Pass Accelerator(kwargs_handlers=[DistributedDataParallelKwargs("
            "find_unused_parameters=True)]), or leave ddp_find_unused_parameters=False and ddp_static_graph=True out "
            "of the arguments."
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
    """What is wrong with a result in which every gate ended the same way; None if it is not so."""
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


def explain_ties(scores: Tensor, counts: list[tuple[list[int], int]]) -> str | None:
    """What is wrong if the order of blocks, and not their scores, decided which of them are open; else None.

    Args:
        scores: at the freeze, shape (N,).
        counts: the budget as `blocks.open_counts` gives it.
    """
    for members, count in counts:
        ranked = scores[members].sort(descending=True).values
        if 0 < count < len(members) and ranked[count - 1] == ranked[count]:
            tied = int((ranked == ranked[count]).sum())
            return (
                f"{tied} of {len(members)} gates tie at the score {ranked[count]:.4g}, and their order decided which "
                "of them are open: the scores did not learn. Check that the optimizer was made after attach_gates and "
                "holds gates.score_group(), that learning rates and lora_alpha are not 0, and that the search has "
                "steps."
            )
    return None


def explain_short_search(config: GateConfig, total_steps: int | None) -> str | None:
    """What is wrong if the search is too short for a score to come down from `init` to `tau`; else None.

    Adam moves a score by at most about its learning rate per step.
    """
    if total_steps is None or config.lambda_ == 0:
        return None
    search = int((config.freeze_ratio - config.warmup_ratio) * total_steps)
    reach = search * config.learning_rate
    if config.init - config.tau <= reach:
        return None
    return (
        f"tau={config.tau} is out of reach: the scores start at init={config.init}, and {search} search steps with "
        f"learning_rate={config.learning_rate} move them by at most {reach:.3g}. Raise gate_learning_rate, train "
        "longer, or bring init closer to tau."
    )
