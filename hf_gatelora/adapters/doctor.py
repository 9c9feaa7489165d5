"""What gating a model would do and what this machine can launch, without loading weights or training."""

import os
import shutil
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO

import torch
import yaml
from accelerate.commands.config import default_config_file
from accelerate.commands.env import env_command, env_command_parser
from accelerate.utils import is_bf16_available
from peft import LoraConfig, get_peft_model

from ..config import GateConfig
from ..gates import lora_layers
from ..gates.blocks import find_towers, open_counts, smallest_fraction
from ..gates.targets import linear_layers, lora_targets, outside_of_layers, without_heads
from ..records import PACKAGES, package_versions
from .bases import empty_model, load_config, quiet
from .inspection import grids

OPTIONAL = ("deepspeed", "open_clip_torch", "bitsandbytes")


def examine_model(
    model: str | os.PathLike,
    target_modules: list[str] | None = None,
    budget: float | dict[str, float] = 0.05,
    r: int = 16,
) -> dict:
    """Which blocks of a model would be gated, what is left out, and what a budget opens.

    Args:
        model: folder or Hub id, of which only the config is read.
        target_modules: as in `LoraConfig`; None takes `lora_targets(model)`.
        budget: `target_active` of `GateConfig`.
        r: rank.

    Returns:
        Plain JSON types. `blocks`: number of LoRA blocks by tower and name of the module; `heads`: blocks outside the
        repeated layers; `left_out`: linear layers without a block, `inside` and `outside` the repeated layers.
        `gates`: number of gates, one per block; `smallest_budget`: the smallest fraction that opens a block; `budget`:
        `open` and `gates` of each part; `open`: number of blocks that the budget opens. `lora_parameters`: of all
        blocks; `open_parameters`: of as many as the budget opens, on average. `problems`: what would fail; if there
        are some, other fields may be missing.

    Raises:
        ValueError: if the model's config cannot be read.
    """
    base = empty_model(load_config(model))
    problems: list[str] = []
    size = sum(p.numel() for p in base.parameters())
    report = {"model": str(model), "class": type(base).__name__, "parameters": size}
    report |= {"target_modules": target_modules or "lora_targets", "r": r, "problems": problems}
    layers = linear_layers(base)
    try:
        targets = list(target_modules or lora_targets(base))
        if missing := lora_layers.missing_targets(base, targets):
            problems.append(lora_layers.explain_missing(base, missing))
        targets = [target for target in targets if target not in missing]
        if not targets:
            return report
        config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear" if targets == ["all-linear"] else targets)
        with quiet():
            adapted = get_peft_model(base, without_heads(base, config))
        adapters = lora_layers.lora_layers(adapted, "default")
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return report

    kinds = {grid.tower: Counter(column for _, column in grid.cells) for grid in grids(list(adapters))}
    left_out = [name for name in layers if name not in adapters]
    report["blocks"] = {tower: dict(counts) for tower, counts in kinds.items()}
    report["heads"] = outside_of_layers(adapted, list(adapters))
    report["left_out"] = {
        "inside": [name for name in left_out if layers[name]],
        "outside": [name for name in left_out if not layers[name]],
    }
    count = len(adapters)
    parameters = sum(lora_layers.multiplications(layer, "default")[0] for layer in adapters.values())
    report |= {"gates": count, "smallest_budget": smallest_fraction(count), "lora_parameters": parameters}
    try:
        gating = GateConfig(target_active=budget)
        towers = find_towers({name: [name] for name in adapters}, gating)
        parts = [
            {"open": opened, "gates": len(members)} for members, opened in open_counts(towers, count, gating) or []
        ]
    except ValueError as error:
        problems.append(str(error))
        return report
    names = list(towers) if isinstance(budget, dict) else ["all"]
    report["budget"] = dict(zip(names, parts, strict=True))
    opened = sum(part["open"] for part in parts)
    return report | {"open": opened, "open_parameters": round(parameters * opened / count)}


def examine_environment() -> dict:
    """What is installed here and what can be launched, as plain JSON types.

    Returns:
        `versions` of the packages, None if one is not installed; `machine`: what `accelerate env` reports;
        `devices`: number of accelerators, `bf16`: whether they support it; `mpi`: path of `mpirun`;
        `accelerate_config`: contents of accelerate's default config, None if there is none; `launchers`: by name of a
        file in `accelerate_configs/`, None if it works, else why it does not.

    Raises:
        ValueError: if accelerate's default config cannot be read.
    """
    found, packages = package_versions((*PACKAGES, *OPTIONAL)), ("python", *PACKAGES, *OPTIONAL)
    try:
        with redirect_stdout(StringIO()):
            machine = env_command(env_command_parser().parse_args([]))
    except (AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{default_config_file}, accelerate's default config, cannot be read ({error}). Run `accelerate config`."
        ) from error
    config, devices = machine.pop("`Accelerate` configs"), torch.accelerator.device_count()
    return {
        "versions": {name: found.get(name) for name in packages},
        "machine": machine,
        "devices": devices,
        "bf16": is_bf16_available(),
        "mpi": shutil.which("mpirun"),
        "accelerate_config": {"file": default_config_file, **config} if isinstance(config, dict) else None,
        "launchers": _launchers(devices, "deepspeed" in found),
    }


def _launchers(devices: int, deepspeed: bool) -> dict[str, str | None]:
    no_gpu = None if devices else "no GPU was found"
    zero = None
    if not deepspeed:
        zero = 'DeepSpeed is not installed: pip install "hf_gatelora[deepspeed]"'
    elif shutil.which("c++") is None:
        zero = "DeepSpeed needs a C++ compiler (c++), and none was found"
    elif not devices:
        zero = "no GPU was found; for the CPU set use_cpu: true in the file and add --use_cpu to the recipe"
    return {
        "cpu": None,
        "multi_cpu": None,
        "single_gpu": no_gpu,
        "multi_gpu": None if devices > 1 else f"needs two GPUs, found {devices}",
        **dict.fromkeys(("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"), zero),
        "fsdp2": no_gpu,
    }
