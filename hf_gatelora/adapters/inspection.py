"""What an adapter's folder holds: its blocks, ranks and sizes, and what two adapters have in common."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..gates import lora_layers
from ..records import RESULTS_FILE, SUMMARY_FILE
from .files import (
    PROCESSOR_FILES,
    module_names,
    rank_axis,
    read_config,
    read_shapes,
    read_summary,
    without_patterns,
)
from .schemas import shortened

# The files of an adapter's repository that inspecting, evaluating and merging it need.
NEEDED = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, SUMMARY_FILE, RESULTS_FILE, *PROCESSOR_FILES]


def find_adapter(source: str | os.PathLike) -> Path:
    """The folder of an adapter.

    Args:
        source: a folder, or a Hub id whose adapter files are then downloaded.

    Raises:
        ValueError: if there is no adapter.
    """
    folder = Path(source)
    if not folder.exists() and str(source).count("/") <= 1:
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=NEEDED, ignore_patterns=["*/*"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise ValueError(
                f"{source} is not a local folder and could not be downloaded from the Hub: {shortened(error)}"
            ) from error
    if not (folder / CONFIG_NAME).is_file():
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" There is one in {', '.join(inner)}." if inner else ""
        what = "no such folder" if not folder.exists() else f"it holds no adapter ({CONFIG_NAME} is missing)"
        raise ValueError(f"{source}: {what}.{hint}")
    return folder


@dataclass
class Adapter:
    """What an adapter's files say.

    Attributes:
        folder: where they are.
        config: contents of `adapter_config.json`, as `files.without_patterns`.
        shapes: shape of each tensor in the weight file, by its key.
        bytes: size of the weight file.
        summary: contents of `gates.json`; None if the adapter was not gated.
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
                if rank_axis(key) == 0:
                    entry["rank"] = self.shapes[key][0]
        if self.summary is not None:  # it knows the order of the model
            order = [module for block in self.summary["blocks"] for module in block["modules"]]
            places = {name: place for place, name in enumerate(order)}
            self.modules = dict(sorted(self.modules.items(), key=lambda item: places.get(item[0], len(places))))

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are not of LoRA blocks, by their name in the base model."""
        return {
            key.removeprefix(lora_layers.PREFIX): shape
            for key, shape in self.shapes.items()
            if lora_layers.module_of_key(key) is None
        }

    def base(self, model: str | os.PathLike | None = None) -> tuple[str, dict[str, str]]:
        """Where the base model is, and what `from_pretrained` needs to load the revision that was trained on.

        Args:
            model: folder or Hub id to take in place of the base model that the adapter names.

        Raises:
            ValueError: if neither says where it is.
        """
        if model is not None:
            return str(model), {}
        if not (name := self.config.get("base_model_name_or_path")):
            raise ValueError(f"{self.folder / CONFIG_NAME}: base_model_name_or_path is empty: give the base model.")
        revision = self.config.get("revision")
        return name, {"revision": revision} if revision else {}

    def report(self) -> dict:
        """The files' contents as plain JSON types.

        `open` and `gates` count blocks; `gates` is None if the adapter was not gated. `towers` has both by tower.
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
    """Read an adapter's files, and only the shapes of its weights.

    Args:
        source: as for `find_adapter`. Any PEFT adapter will do; `modules` is empty if it is not LoRA.

    Raises:
        ValueError: if a file is missing or cannot be read.
    """
    folder = find_adapter(source)
    config, (shapes, size) = read_config(folder), read_shapes(folder)
    config = without_patterns(config, module_names(shapes), folder)
    return Adapter(folder, config, shapes, size, read_summary(folder))


def overlap(first: Adapter, second: Adapter) -> dict:
    """Which modules both of two adapters change, and which only one of them.

    Returns:
        `both`, `only_first`, `only_second`: module names; `share`: the part of all these modules that both change;
        `towers`: the three counts by tower; `same_base`: whether both name the same base model.
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
    """The modules of a tower, arranged as layers by names."""

    tower: str
    layers: list[str]  # the numbers in the modules' names, joined by points; "" for a module outside of layers
    columns: list[str]  # the shortest ends of the modules' names that differ
    cells: dict[tuple[str, str], str]  # module name by layer and column


def grids(modules: list[str]) -> list[Grid]:
    """Arrange modules as layers by names, tower by tower, in the order given."""
    towers: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {}
    for name in modules:
        parts = name.split(".")
        layer = ".".join(part for part in parts if part.isdecimal())
        words = tuple(part for part in parts[1:] if not part.isdecimal()) or (parts[0],)
        towers.setdefault(parts[0], {})[name] = layer, words
    found = []
    for tower, places in towers.items():
        kinds = dict.fromkeys(words for _, words in places.values())
        ends = Counter(kind[-n:] for kind in kinds for n in range(1, len(kind) + 1))
        short = {
            kind: ".".join(next((kind[-n:] for n in range(1, len(kind)) if ends[kind[-n:]] == 1), kind))
            for kind in kinds
        }
        cells = {(layer, short[words]): name for name, (layer, words) in places.items()}
        layers = sorted(dict.fromkeys(layer for layer, _ in cells), key=_natural)
        found.append(Grid(tower, layers, list(short.values()), cells))
    return found


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in name.split(".")]
