"""Several adapters as one: a stock adapter on the union of their blocks."""

import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from ..gates import lora_layers
from .export import check_scalable
from .files import module_names, rank_axis, read_adapter
from .outputs import check_output, write_stock

# What a sum of updates B A cannot express.
UNSUPPORTED = ("lora_bias", "target_parameters", "trainable_token_indices", "layer_replication")


def combine_adapters(
    directories: list[str | os.PathLike],
    weights: list[float],
    output: str | os.PathLike,
    base: torch.nn.Module | None = None,
    force: bool = False,
) -> None:
    """Write a stock adapter whose update of the base is the weighted sum of those of several LoRA adapters.

    It is on the union of their blocks. The matrices of a block that several adapters have are joined along the rank,
    and all blocks are padded with zeros to the largest rank, so that the sum is exact. PEFT's own
    `add_weighted_adapter(..., combination_type="cat")` gives the same in memory, except with heads, rsLoRA and
    `exclude_modules`, which it refuses or gets wrong (seen in 0.21).

    Args:
        directories: two or more stock LoRA adapters on one base model. The processor of the first that has one is kept.
        weights: one number for each, also negative.
        output: another folder, as for `outputs.check_output`.
        base: the base model, for adapters with heads in `modules_to_save` whose weights do not sum to 1: a head is
            that of the base plus the weighted sum of its changes.
        force: write to `output` even if it holds something else.

    Raises:
        ValueError: if numbers and folders do not fit, `output` may not be written to, an adapter cannot be read or is
            not plain LoRA, they name different base models, have blocks or heads of different shapes, or have heads and
            there is no base that fits.
    """
    sources, output = [Path(directory) for directory in directories], Path(output)
    if len(sources) < 2:
        raise ValueError("Give two adapters or more to combine, and then the folder to write.")
    if len(sources) != len(weights):
        raise ValueError(f"{len(sources)} adapters and {len(weights)} weights: give one weight for each adapter.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"The weights {list(weights)} have to be finite numbers.")
    check_output(output, "combine", sources, force)
    configs, tensors = zip(*map(read_adapter, sources), strict=True)
    for directory, config in zip(sources, configs, strict=True):
        check_scalable(config, str(directory))
        if used := [field for field in UNSUPPORTED if config.get(field)]:
            raise ValueError(f"{directory} uses {', '.join(used)}, which cannot be combined.")
    bases = dict.fromkeys(str(config.get("base_model_name_or_path")) for config in configs)
    if len(bases) > 1:
        raise ValueError(
            f"The adapters are on different base models, {' and '.join(bases)}. If these are copies of one model, "
            "write the same base_model_name_or_path into each adapter_config.json."
        )

    combined: dict[str, Tensor] = {}
    # All blocks get that of the first, so that an adapter at weight 1 keeps its values.
    scaling: float | None = None
    for key in dict.fromkeys(key for part in tensors for key in part):
        name, axis = lora_layers.module_of_key(key), rank_axis(key)
        found = [(p[key], w, c) for p, w, c in zip(tensors, weights, configs, strict=True) if key in p]
        if len({tuple(n for i, n in enumerate(value.shape) if i != axis) for value, _, _ in found}) > 1:
            shapes = ", ".join(str(tuple(value.shape)) for value, _, _ in found)
            raise ValueError(f"{key} has the shapes {shapes}: the adapters are on other base models, or other heads.")
        if name is None:
            combined[key] = _head(key.removeprefix(lora_layers.PREFIX), [(value, w) for value, w, _ in found], base)
            continue
        if axis is None:
            raise ValueError(f"{key} is not a LoRA matrix: it cannot be combined.")
        scalings = [lora_layers.scaling(config, name, value.shape[axis]) for value, _, config in found]
        scaling = (scalings[0] or 1.0) if scaling is None else scaling  # of alpha 0 nothing is left anyway
        values = [value for value, _, _ in found]
        if axis == 1:
            values = [value * (w * s / scaling) for (value, w, _), s in zip(found, scalings, strict=True)]
        combined[key] = torch.cat(values, dim=axis)

    axes = {key: axis for key in combined if (axis := rank_axis(key)) is not None}
    if not axes:
        raise ValueError(f"{sources[0]} and the others have no LoRA layers: there is nothing to combine.")
    rank = max(combined[key].shape[axis] for key, axis in axes.items())
    for key, axis in axes.items():
        shape = list(combined[key].shape)
        shape[axis] = rank - shape[axis]
        combined[key] = torch.cat([combined[key], combined[key].new_zeros(shape)], dim=axis)

    modules = module_names(axes)
    fields = lora_layers.exact_targets(modules, modules, {})
    if any(config.get("exclude_modules") for config in configs):
        # Some name catches more than itself, and only the model knows what. A pattern matches in full.
        fields["target_modules"] = "|".join(map(re.escape, modules))
    alpha = float((scaling or 1.0) * rank)
    fields |= {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "use_rslora": False}
    fields["modules_to_save"] = sorted({m for config in configs for m in config.get("modules_to_save") or []}) or None
    write_stock(output, "combine", sources, {**configs[0], **fields}, combined)


def _head(name: str, found: list[tuple[Tensor, float]], base: torch.nn.Module | None) -> Tensor:
    """The base's head plus the weighted sum of its changes. The base's own part cancels if the weights sum to 1."""
    total = torch.stack([value * weight for value, weight in found]).sum(0)
    rest = 1 - sum(weight for _, weight in found)
    if abs(rest) < 1e-9:
        return total
    own = {} if base is None else base.state_dict()
    if name not in own or own[name].shape != total.shape:
        raise ValueError(
            f"{name} of shape {tuple(total.shape)} comes with weights that sum to {1 - rest:g}: pass the base model "
            "whose head it replaces (--model), to add its changes to that."
        )
    return total + rest * own[name].to(total)
