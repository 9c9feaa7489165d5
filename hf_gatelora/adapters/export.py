"""Stock adapters: of a gated model, of its checkpoint, and between base and adapter."""

import filecmp
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor

from ..gates import lora_layers
from ..records import CARD, FRONTIER, GATE_MAP, RESULTS_FILE, STATE_FILE, SUMMARY_FILE, write_results
from .checkpoint import RAW
from .files import module_names, rank_axis, read_adapter, read_rows, read_summary, replace_files, summary_text
from .names import lowest_transformers
from .outputs import check_output, write_stock


def write_adapter(
    model: PeftModel,
    adapter_name: str,
    factors: dict[str, float],
    state: dict[str, Tensor],
    summary: dict,
    directory: str | os.PathLike,
    state_dict: dict[str, Tensor] | None = None,
    results: list[dict] | None = None,
    **kwargs,
) -> None:
    """Write a stock PEFT adapter with each gate's value folded into its blocks' B. Its card is for the caller to write.

    Each file is written under a temporary name and then renamed. The adapter's files lie in `directory` itself,
    whatever the adapter is called, so that `PeftModel.from_pretrained(base, directory)` finds them.

    Args:
        factors: gate value by LoRA module name.
        state, summary: contents of `gatelora_state.safetensors` and of `gates.json`.
        state_dict: the model's gathered state dict, if the model itself is sharded.
        results: contents of `results.jsonl`. None keeps the file that is there if the weights are still the same.
        kwargs: for `PeftModel.save_pretrained`.
    """
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    state = dict(state)
    for name, factor in factors.items():
        key = lora_layers.b_key(name, adapter_name)
        if factor != 1.0 and key in weights:
            state[RAW + key] = weights[key].detach().cpu().contiguous()
            weights[key] = weights[key] * factor

    directory = Path(directory)
    needed = lowest_transformers(
        getattr(model.get_base_model(), "config", None), [name for name, factor in factors.items() if factor]
    )
    # One weight file may be of an earlier save in the other format, and a gate map is of an earlier state.
    stale = {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, GATE_MAP}

    def write(temporary: Path) -> None:
        PeftModel.save_pretrained(model, str(temporary), selected_adapters=[adapter_name], state_dict=weights, **kwargs)
        folder = temporary / ("" if adapter_name == "default" else adapter_name)
        save_file(state, folder / STATE_FILE)
        (folder / SUMMARY_FILE).write_text(summary_text({**summary, "transformers": needed}), encoding="utf-8")
        if results:
            write_results(results, folder / RESULTS_FILE)
        elif not _same(folder / SAFETENSORS_WEIGHTS_NAME, directory / SAFETENSORS_WEIGHTS_NAME):
            stale.update({RESULTS_FILE, FRONTIER})
        (temporary / CARD).unlink(missing_ok=True)  # PEFT's, with placeholders

    replace_files(directory, write, stale)


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


@contextmanager
def scaled(model: PeftModel, scale: float):
    """Within this context the model lies between its base (scale 0) and its adapter (1): WiSE-FT (arXiv 2109.01903).

    The LoRA update is scaled, and heads in `modules_to_save` are interpolated with those of the base.
    """
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    pairs = [
        (own, base)
        for head in heads
        for name in head.active_adapters
        for own, base in zip(head.modules_to_save[name].parameters(), head.original_module.parameters(), strict=True)
    ]
    kept = [own.detach().clone() for own, _ in pairs]
    try:
        with torch.no_grad():
            for own, base in pairs:
                own.copy_(torch.lerp(base, own, scale))
        with rescale_adapter_scale(model, scale):
            yield
    finally:
        with torch.no_grad():
            for (own, _), value in zip(pairs, kept, strict=True):
                own.copy_(value)


def check_scalable(config: dict, source: str) -> None:
    """Check that scaling an adapter to 0 gives the base.

    Args:
        config: contents of its `adapter_config.json`.
        source: how the message calls it.

    Raises:
        ValueError: if it is not plain LoRA: DoRA, trained biases, an initialisation that changed the base weights.
    """
    reasons = {
        f"peft_type is {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "it uses DoRA": config.get("use_dora"),
        f"it trained biases (bias={config.get('bias')!r})": config.get("bias", "none") != "none",
        f"init_lora_weights={config.get('init_lora_weights')!r} changed the base weights": config.get(
            "init_lora_weights", True
        )
        not in lora_layers.PLAIN_INITS,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"{source} cannot be scaled: {' and '.join(found)}. Only plain LoRA is the base at scale 0.")


def scale_adapter(
    directory: str | os.PathLike,
    scale: float,
    output: str | os.PathLike,
    base: torch.nn.Module | None = None,
    force: bool = False,
) -> None:
    """Write a copy of a LoRA adapter that lies between the base and it, as `scaled` (WiSE-FT).

    Args:
        directory: a stock LoRA adapter, for instance one that this package wrote.
        scale: 0 gives the base, 1 the adapter.
        output: another folder, as for `outputs.check_output`. What resuming needs is not written there.
        base: the base model, for an adapter with heads in `modules_to_save`: they are interpolated with those of it.
        force: write to `output` even if it holds something else.

    Raises:
        ValueError: if the scale is out of range, `output` may not be written to, no LoRA adapter is found, it is not
            plain LoRA (`check_scalable`), or it has heads and there is no base that fits.
    """
    directory, output = Path(directory), Path(output)
    if not 0 <= scale <= 1:
        raise ValueError(f"scale={scale} is out of range: it must be a number in [0, 1].")
    check_output(output, "wise", [directory], force)
    config, weights = read_adapter(directory)
    check_scalable(config, str(directory))
    heads = base.state_dict() if base is not None else {}
    for key, value in weights.items():
        if rank_axis(key) == 1:
            weights[key] = value * scale
        elif lora_layers.module_of_key(key) is None:
            name = key.removeprefix(lora_layers.PREFIX)
            if name not in heads or heads[name].shape != value.shape:
                raise ValueError(
                    f"{directory} also has {name} of shape {tuple(value.shape)}: pass the base model whose head it "
                    "replaces (--model), so that the two can be interpolated."
                )
            if value.is_floating_point():  # a head may also count its batches
                weights[key] = torch.lerp(heads[name].to(value), value, scale)
    summary = read_summary(directory)
    rows = [row for row in read_rows(directory) if row["method"] == "base" or row.get("wise") == scale]
    measured = any("wise" in row for row in rows)
    rows = [{key: value for key, value in row.items() if key != "wise"} for row in rows if measured]
    write_stock(output, "wise", [directory], config, weights, summary and {**summary, "scale": scale}, rows)


def fold_checkpoint(directory: str | os.PathLike, output: str | os.PathLike, force: bool = False) -> None:
    """Write a checkpoint as a stock adapter with the blocks that its gates left open, and nothing to resume from.

    The gates keep the values that they had: before the freeze this is the model of that moment, and its budget is not
    applied. If all gates are closed one block is kept, with B = 0, because PEFT knows no adapter without layers.

    Args:
        directory: a checkpoint or adapter that this package wrote.
        output: another folder, as for `outputs.check_output`.
        force: write to `output` even if it holds something else.

    Raises:
        ValueError: if `output` may not be written to, or `directory` holds no adapter or no `gates.json`.
    """
    directory, output = Path(directory), Path(output)
    summary = read_summary(directory)
    if summary is None:
        raise ValueError(f"{directory} was not written by gated LoRA (no {SUMMARY_FILE}): there is nothing to fold.")
    check_output(output, "fold", [directory], force)
    config, weights = read_adapter(directory)
    adapted = module_names(weights)
    closed = {module for block in summary["blocks"] if block["gate"] == 0 for module in block["modules"]}
    kept = [name for name in adapted if name not in closed] or adapted[:1]
    if not kept:
        raise ValueError(f"{directory} is a {config['peft_type']} adapter without LoRA layers: it cannot be folded.")
    names = {None, *kept}
    weights = {key: value for key, value in weights.items() if lora_layers.module_of_key(key) in names}
    if len(kept) < len(adapted):
        config |= lora_layers.exact_targets(kept, adapted, config)
    write_stock(output, "fold", [directory], config, weights, summary, read_rows(directory))
