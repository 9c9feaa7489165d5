"""What lies in an adapter's folder: its blocks, ranks and sizes, and what two adapters have in common."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..gates import lora_layers
from ..records import RESULTS_FILE, SUMMARY_FILE
from .files import read_shapes

# Of a repository with an adapter, what its inspection, evaluation and merging need.
NEEDED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, SUMMARY_FILE, RESULTS_FILE, "*processor*.json")
NEEDED += ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


def find_adapter(source: str | os.PathLike) -> Path:
    """The folder of an adapter.

    Args:
        source: a folder, or a Hub id, whose adapter files are then downloaded.

    Raises:
        ValueError: where there is no adapter.
    """
    folder = Path(source)
    if not folder.exists() and str(source).count("/") <= 1:
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=[*NEEDED], ignore_patterns=["*/*"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            reason = " ".join([line for line in str(error).splitlines() if line.strip()][:2])
            raise ValueError(
                f"{source} is no folder, and as a repository on the Hub it cannot be had: {reason}"
            ) from error
    if not (folder / CONFIG_NAME).is_file():
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" There is one in {', '.join(inner)}." if inner else ""
        what = "no such folder" if not folder.exists() else f"no adapter is there ({CONFIG_NAME} is missing)"
        raise ValueError(f"{source}: {what}.{hint}")
    return folder


@dataclass
class Adapter:
    """What an adapter's files say.

    Attributes:
        folder: where they lie.
        config: contents of `adapter_config.json`.
        shapes: of each tensor in the weight file, by its key.
        bytes: size of the weight file.
        summary: contents of `gates.json`; None where the adapter was not gated.
        modules: parameters and rank of each LoRA module, by its name in the base model, in model order.
    """

    folder: Path
    config: dict
    shapes: dict[str, tuple[int, ...]]
    bytes: int
    summary: dict | None

    def __post_init__(self):
        self.modules: dict[str, dict[str, int]] = {}
        for key in sorted(self.shapes, key=_natural):
            name = lora_layers.module_of_key(key)
            if name is not None:
                entry = self.modules.setdefault(name, {"parameters": 0, "rank": 0})
                entry["parameters"] += math.prod(self.shapes[key])
                if ".lora_A." in key or key.endswith("lora_embedding_A"):
                    entry["rank"] = self.shapes[key][0]
        if self.summary is not None:  # which knows the order of the model
            order = [module for block in self.summary["blocks"] for module in block["modules"]]
            places = {name: place for place, name in enumerate(order)}
            self.modules = dict(sorted(self.modules.items(), key=lambda item: places.get(item[0], len(places))))

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the adapter holds beside LoRA, by name in the base model."""
        return {
            key.removeprefix(lora_layers.PREFIX): shape
            for key, shape in self.shapes.items()
            if lora_layers.module_of_key(key) is None
        }

    def report(self) -> dict:
        """What there is to say, as plain JSON types.

        `open` and `gates` count blocks, `gates` None where the adapter was not gated; `towers` has the same by tower.
        """
        if self.summary is not None:
            counted = {key: self.summary[key] for key in ("open", "gates", "towers")}
        else:
            towers: dict[str, dict] = {}
            for name in self.modules:
                tower = towers.setdefault(name.split(".")[0], {"open": 0, "gates": None})
                tower["open"] += 1
            counted = {"open": len(self.modules), "gates": None, "towers": towers}
        return {
            "adapter": str(self.folder),
            "base": self.config.get("base_model_name_or_path"),
            "peft_type": self.config.get("peft_type"),
            "r": self.config.get("r"),
            "lora_alpha": self.config.get("lora_alpha"),
            **counted,
            "lora_parameters": sum(entry["parameters"] for entry in self.modules.values()),
            "other_parameters": sum(map(math.prod, self.heads.values())),
            "others": list(self.heads),
            "bytes": self.bytes,
            "modules": self.modules,
            "summary": self.summary,
        }


def inspect_adapter(source: str | os.PathLike) -> Adapter:
    """Read an adapter's files; of the weights only their shapes.

    Args:
        source: as for `find_adapter`. Any PEFT adapter will do; `modules` is empty where it is not LoRA.

    Raises:
        ValueError: where a file is missing or cannot be read.
    """
    folder = find_adapter(source)
    shapes, size = read_shapes(folder)
    summary = None
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        if (folder / SUMMARY_FILE).is_file():
            summary = json.loads((folder / SUMMARY_FILE).read_text())
        return Adapter(folder, config, shapes, size, summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {CONFIG_NAME} or {SUMMARY_FILE} cannot be read ({error!r}).") from error


def overlap(first: Adapter, second: Adapter) -> dict:
    """Which modules two adapters change: both of them, or one alone; in all and by tower.

    Returns:
        `both`, `only_first`, `only_second`: module names; `share`: those of both in all of either; `towers`: the three
        counts by tower; `same_base`: whether both name the same base model.
    """
    names = {
        "both": [name for name in first.modules if name in second.modules],
        "only_first": [name for name in first.modules if name not in second.modules],
        "only_second": [name for name in second.modules if name not in first.modules],
    }
    towers: dict[str, dict[str, int]] = {}
    for part, found in names.items():
        for name in found:
            tower = towers.setdefault(name.split(".")[0], dict.fromkeys(names, 0))
            tower[part] += 1
    either = sum(map(len, names.values()))
    bases = {adapter.config.get("base_model_name_or_path") for adapter in (first, second)}
    share = len(names["both"]) / either if either else 0.0
    return {**names, "share": share, "towers": towers, "same_base": len(bases) == 1}


class Grid(NamedTuple):
    """The modules of a tower as layers by names."""

    tower: str
    layers: list[str]  # the numbers in the modules' names, joined by points; "" for a module outside of layers
    columns: list[str]  # the end of the modules' names, as short as still tells them apart
    cells: dict[tuple[str, str], str]  # module name by layer and column


def grids(modules: list[str]) -> list[Grid]:
    """Arrange modules as layers by names, tower by tower, in the order given."""
    towers: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {}
    for name in modules:
        parts = name.split(".")
        layer = ".".join(part for part in parts if part.isdigit())
        words = tuple(part for part in parts[1:] if not part.isdigit()) or (parts[0],)
        towers.setdefault(parts[0], {})[name] = layer, words
    found = []
    for tower, places in towers.items():
        kinds = dict.fromkeys(words for _, words in places.values())
        short = {kind: _shortest(kind, list(kinds)) for kind in kinds}
        cells = {(layer, short[words]): name for name, (layer, words) in places.items()}
        layers = sorted(dict.fromkeys(layer for layer, _ in cells), key=_natural)
        found.append(Grid(tower, layers, list(short.values()), cells))
    return found


def _shortest(kind: tuple[str, ...], kinds: list[tuple[str, ...]]) -> str:
    length = 1
    while length < len(kind) and sum(other[-length:] == kind[-length:] for other in kinds) > 1:
        length += 1
    return ".".join(kind[-length:])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]
