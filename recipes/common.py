"""What the recipes share: arguments from YAML and command line, image data from any source, timing, the table."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import toy_world
import yaml
from datasets import ClassLabel, Image, load_dataset, load_from_disk
from PIL import Image as PILImage
from transformers import HfArgumentParser, TrainerCallback

TOY = "toy"


def parse_arguments(classes: list[type], argv: list[str]) -> tuple:
    """Parse `[config.yaml] [--field value ...]` into the dataclasses; the command line overrides the file.

    Raises:
        ValueError: where the file has a field that no dataclass has.
    """
    parser = HfArgumentParser(classes)
    defaults = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        defaults = yaml.safe_load(Path(argv[0]).read_text()) or {}
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(defaults) - known)
        if unknown:
            raise ValueError(f"{argv[0]}: unknown field {', '.join(map(repr, unknown))}. See --help for the fields.")
        argv = argv[1:]
    # A list on the command line replaces that of the file, and may be given in several pieces.
    lists = {k: defaults.pop(k) for k in ("ood", "retention") if k in defaults}
    parser.set_defaults(**defaults)
    parsed = parser.parse_args_into_dataclasses(argv)
    for group in parsed:
        for name, value in lists.items():
            if hasattr(group, name) and getattr(group, name) is None:
                setattr(group, name, value)
    return parsed


def load_images(source: str):
    """Load a data set with images, without decoding them.

    Args:
        source: `toy:SET`, a parquet or arrow file, a folder that `Dataset.save_to_disk` wrote, a folder of images, or a
            Hub id; a split may follow a colon (`user/data:test`), the default is `train`.

    Returns:
        A `datasets.Dataset` with the column `image` not decoded, and the name of the image column.

    Raises:
        ValueError: where nothing is found, or there is not exactly one image column.
    """
    if source.startswith(f"{TOY}:"):
        source = str(toy_world.ensure_world() / "data" / f"{source.removeprefix(f'{TOY}:')}.parquet")
    path, _, split = source.rpartition(":") if ":" in source and not Path(source).exists() else (source, "", "")
    file = Path(path)
    if split and (file.is_file() or (file / "state.json").is_file()):
        raise ValueError(f"{source}: {path} holds one data set, without splits. Leave out {split!r}.")
    if file.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(file.suffix)
        if kind is None:
            raise ValueError(f"{path}: give a .parquet or .arrow file, a folder, or a Hub id.")
        data = load_dataset(kind, data_files=path, split="train")
    elif (file / "state.json").is_file():
        data = load_from_disk(path)
    elif (file / "dataset_dict.json").is_file():
        parts = load_from_disk(path)
        if (split or "train") not in parts:
            raise ValueError(
                f"{source}: no split {split or 'train'!r}, there are {sorted(parts)}. Give one as path:split."
            )
        data = parts[split or "train"]
    elif file.is_dir():
        data = load_dataset("imagefolder", data_dir=path, split=split or "train")
    elif path.count("/") > 1 or file.suffix:
        raise ValueError(f"{source}: no such file or folder.")
    else:
        data = load_dataset(path, split=split or "train")
    columns = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        found = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in data.features.items())
        raise ValueError(
            f"{source}: needs one column of type Image, found {len(columns)} (columns: {found}). Cast the column with "
            'data.cast_column("image", datasets.Image()).'
        )
    return data.cast_column(columns[0], Image(decode=False)), columns[0]


class LabelledImages(torch.utils.data.Dataset):
    """Images of a source with their labels or captions, decoded and transformed on access.

    Args:
        source: as for `load_images`.
        transform: from an RGB image to `pixel_values`.
        class_names: the classes that string labels index; None takes those that occur.
        label_column, caption_column: names of these columns; the label column must hold `ClassLabel`s or strings.

    Raises:
        ValueError: where a column is missing or a label lies outside the class list; on access, where an image cannot
            be read.
    """

    def __init__(
        self,
        source: str,
        transform: Callable,
        label_column: str = "label",
        caption_column: str = "caption",
        class_names: list[str] | None = None,
    ):
        self.source, self.transform = source, transform
        self.data, self.image_column = load_images(source)
        self.class_names: list[str] | None = None
        self.labels = self.captions = None
        if label_column in self.data.features:
            self._read_labels(label_column, class_names)
        if caption_column in self.data.features:
            self.captions = list(self.data[caption_column])

    def _read_labels(self, column: str, class_names: list[str] | None) -> None:
        feature, values = self.data.features[column], list(self.data[column])
        if isinstance(feature, ClassLabel):
            self.class_names = list(feature.names)
        elif getattr(feature, "dtype", None) == "string":
            self.class_names = class_names or sorted(set(values) - {None})
            index = {name: i for i, name in enumerate(self.class_names)}
            values = [index.get(value, value) for value in values]
        else:
            raise ValueError(
                f"{self.source}: column {column!r} holds {feature}, without class names. Cast it with "
                f'data.cast_column("{column}", datasets.ClassLabel(names=[...])), or use strings.'
            )
        for row, value in enumerate(values):
            if not isinstance(value, int) or not 0 <= value < len(self.class_names):
                raise ValueError(
                    f"{self.source}, row {row}: label {value!r} lies outside the {len(self.class_names)} classes "
                    f"({', '.join(self.class_names[:5])}, ...)."
                )
        self.labels = torch.tensor(values)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict:
        stored = self.data[row][self.image_column]
        try:
            image = PILImage.open(BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])
            image = image.convert("RGB")
        except (OSError, TypeError) as error:
            name = f" ({stored['path']})" if stored and stored.get("path") else ""
            raise ValueError(f"{self.source}, row {row}{name}: the image cannot be read ({error}).") from error
        item = {"pixel_values": self.transform(image)}
        if self.labels is not None:
            item["labels"] = self.labels[row]
        if self.captions is not None:
            item["captions"] = self.captions[row]
        return item


def parse_named_sources(field: str, entries: list[str] | None) -> dict[str, str]:
    """`["name=source", ...]` as a dict.

    Raises:
        ValueError: where an entry has no name, or a name comes twice.
    """
    named: dict[str, str] = {}
    for entry in entries or []:
        name, equals, source = entry.partition("=")
        if not (name and equals and source) or name in named:
            raise ValueError(f"--{field} {entry!r}: give name=source, each name once.")
        named[name] = source
    return named


class StepTimer(TrainerCallback):
    """Times optimizer steps (forward to update), by whether `is_frozen()` before them."""

    def __init__(self, is_frozen: Callable[[], bool] = lambda: False):
        self.is_frozen = is_frozen
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def on_step_begin(self, args, state, control, **kwargs):
        self._frozen, self._start = self.is_frozen(), time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[self._frozen].append(time.perf_counter() - self._start)

    def median(self, frozen: bool) -> float:
        """Median seconds of a step before or after the freeze."""
        return statistics.median(self.seconds[frozen])


@dataclass
class Column:
    """A column of the table: its title, and the rows that it shows, by role, data and metric."""

    title: str
    role: str
    data: str | None = None
    metric: str | None = None


def table(rows: list[dict]) -> str:
    """One line per method as a Markdown table, every number from the rows of a results file.

    Accuracies are in percent, with their change against the method `base` in points.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = []
    for role, title in (("id", "ID"), ("ood", "OOD"), ("retention", "retention")):
        measured = dict.fromkeys((row["data"], row["metric"]) for row in rows if row["role"] == role)
        several = len({metric for _, metric in measured}) > 1
        columns += [
            Column(f"{title} {data}{f' {metric}' if several else ''}", role, data, metric) for data, metric in measured
        ]
    costs = ["open_blocks", "trainable_parameters", "adapter_bytes", "seconds_per_step"]
    columns += [Column(metric.replace("_", " "), "cost", metric=metric) for metric in costs]

    def find(method: str, column: Column) -> list[dict]:
        return [
            row
            for row in rows
            if row["method"] == method
            and row["role"] == column.role
            and column.data in (None, row["data"])
            and column.metric in (None, row["metric"])
        ]

    def cell(method: str, column: Column) -> str:
        found = find(method, column)
        if not found:
            return "-"
        if column.role == "cost":
            return " / ".join(_number(row) for row in found)
        value = found[0]["value"]
        base = find("base", column)
        change = f" ({100 * (value - base[0]['value']):+.1f})" if base and method != "base" else ""
        return f"{100 * value:.1f}{change}"

    lines = [["method", *[column.title for column in columns]]]
    lines += [[method, *[cell(method, column) for column in columns]] for method in methods]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(entry.ljust(width) for entry, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _number(row: dict) -> str:
    if row["metric"] == "seconds_per_step":
        return f"{row['value']:.3f}"
    if row["metric"] == "open_blocks":
        return f"{row['value']:.0f} of {row['of']}"
    return f"{row['value']:,.0f}"
