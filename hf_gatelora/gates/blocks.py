"""What the gates stand for: how LoRA modules form blocks, blocks form towers, and what an open block costs."""

import math

import regex
import torch
from peft import PeftModel
from torch import Tensor

from ..config import GateConfig
from . import lora_layers

SECONDS = 1.0  # for one regex on one name: some patterns would take years


def group_modules(model: PeftModel, modules: list[str], config: GateConfig) -> dict[str, list[str]]:
    """LoRA modules by gate name: each its own, or by transformer layer, or by the regexes of `granularity`."""
    if config.granularity == "module":
        return {name: [name] for name in modules}
    if config.granularity == "layer":
        blocks: dict[str, list[str]] = {}
        for name in modules:
            blocks.setdefault(lora_layers.layer_of(model, name), []).append(name)
        return blocks
    texts = [[name] for name in modules]
    groups = _partition("granularity", list(config.granularity), modules, texts, "LoRA module")
    return {pattern: [modules[i] for i in members] for pattern, members in groups.items()}


def find_towers(blocks: dict[str, list[str]], config: GateConfig) -> dict[str, list[int]]:
    """Gate indices by tower: the regexes of a budget per tower, else the first part of the gates' names."""
    named_by_regex = not isinstance(config.granularity, str)  # what tells the tower of a group are its modules
    if isinstance(config.target_active, dict):
        texts = [members if named_by_regex else [name] for name, members in blocks.items()]
        return _partition("target_active", list(config.target_active), list(blocks), texts, "gate")
    towers: dict[str, list[int]] = {}
    for i, name in enumerate(blocks):
        towers.setdefault("all" if named_by_regex else name.split(".")[0], []).append(i)
    return towers


def open_counts(towers: dict[str, list[int]], count: int, config: GateConfig) -> list[tuple[list[int], int]] | None:
    """The budget as (gate indices, how many of them stay open); None if the threshold decides.

    Raises:
        ValueError: if a positive fraction rounds to no gate.
    """
    target = config.target_active
    if target is None:
        return None
    if isinstance(target, dict):
        return [
            (members, open_count(target[tower], len(members), f"target_active[{tower!r}]"))
            for tower, members in towers.items()
        ]
    return [(list(range(count)), open_count(target, count))]


def open_count(fraction: float, blocks: int, what: str = "target_active") -> int:
    """Gates that stay open: round(fraction * blocks).

    Raises:
        ValueError: if a positive fraction rounds to no gate at all.
    """
    count = round(fraction * blocks)
    if fraction > 0 and count == 0:
        raise ValueError(
            f"{what}={fraction:g} of {blocks} gates rounds to 0 open gates. The smallest fraction that keeps one "
            f"open is {smallest_fraction(blocks):g}; 0.0 closes all of them on purpose."
        )
    return count


def smallest_fraction(blocks: int) -> float:
    """The smallest fraction, to six digits, that keeps one gate open."""
    return math.floor(0.5 / blocks * 1e6 + 1) / 1e6


def select_open(values: Tensor, towers: list[list[int]], counts: list[int]) -> Tensor:
    """Boolean mask of the `counts[t]` best of each tower's `values`, ties broken by block order. Shape of `values`."""
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for members, count in zip(towers, counts, strict=True):
        best = sorted(members, key=lambda i: (-values[i].item(), i))[:count]
        mask[best] = True
    return mask


def gate_costs(
    blocks: dict[str, list[str]], multiplications: dict[str, tuple[int, int]], config: GateConfig
) -> list[float]:
    """Cost of each gate in the penalty.

    Args:
        multiplications: per LoRA module and token, those of its adapter and of its base layer, in module order.

    Raises:
        ValueError: if given costs do not name every gate once.
    """
    cost = config.cost
    if cost == "uniform":
        return [1.0] * len(blocks)
    if cost == "parameters":
        return [float(sum(multiplications[m][0] for m in members)) for members in blocks.values()]
    if not isinstance(cost, dict):  # "compute"
        # Three products for an adapter's forward and backward, and one for each base layer between the block and the
        # output of its tower, through which the gradient has to come down: what the block costs on its own. Of several
        # open blocks the earliest decides how far down, which no sum over blocks can say.
        above: dict[str, float] = {}
        reach: dict[str, float] = {}
        for name in reversed(multiplications):
            tower = name.split(".")[0]
            reach[name] = above.get(tower, 0.0)
            above[tower] = reach[name] + multiplications[name][1]
        return [
            3.0 * sum(multiplications[m][0] for m in members) + max(reach[m] for m in members)
            for members in blocks.values()
        ]
    unknown, missing = sorted(set(cost) - set(blocks)), [name for name in blocks if name not in cost]
    if unknown or missing:
        raise ValueError(
            f"cost must name every gate once: {len(missing)} are missing (first: {missing[:3]}), "
            f"{len(unknown)} are unknown (first: {unknown[:3]}). The gates are listed in `names`."
        )
    return [float(cost[name]) for name in blocks]


def _search(field: str, pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(f"{field}: the regex {pattern!r} takes too long on {text!r}. Write a simpler one.") from error


def _partition(field: str, patterns: list[str], names: list[str], texts: list[list[str]], what: str) -> dict:
    """Indices of names by regex: a name belongs to the one regex that is found in all its texts."""
    found: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    for i, name in enumerate(names):
        matches = [pattern for pattern in patterns if all(_search(field, pattern, text) for text in texts[i])]
        if len(matches) != 1:
            how = f"by several regexes, {matches}" if matches else f"by none of the regexes {patterns}"
            raise ValueError(f"{field}: {what} {name!r} is matched {how}. Each must match exactly one.")
        found[matches[0]].append(i)
    empty = [pattern for pattern, members in found.items() if not members]
    if empty:
        raise ValueError(f"{field}: {empty} matches no {what}. The first ones are {names[:3]}.")
    return found
