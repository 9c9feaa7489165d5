"""Image data from any source: files, folders, the Hub."""

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from datasets import ClassLabel, Image, load_dataset, load_from_disk
from PIL import Image as PILImage

from .suite import EvalSet


def load_images(source: str):
    """Load a data set with images, without decoding them.

    Args:
        source: a parquet or arrow file, a folder that `Dataset.save_to_disk` wrote, a folder of images, or a Hub id; a
            split may follow a colon (`user/data:test`), the default is `train`.

    Returns:
        A `datasets.Dataset` with the column `image` not decoded, the name of the image column, and, of a data set of
        the Hub, its id and its commit (None where it is not known).

    Raises:
        ValueError: where nothing is found, or there is not exactly one image column.
    """
    origin = {}
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
        data = _load_split(source, "imagefolder", split, data_dir=path)
    elif path.count("/") > 1 or file.suffix:
        raise ValueError(f"{source}: no such file or folder.")
    else:
        data = _load_split(source, path, split)
        # Of the Hub's data sets the cache folder is named by the commit.
        folder = Path(data.cache_files[0]["filename"]).parent.name if data.cache_files else ""
        origin = {"dataset": path, "revision": folder if re.fullmatch("[0-9a-f]{40}", folder) else None}
    columns = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        found = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in data.features.items())
        raise ValueError(
            f"{source}: needs one column of type Image, found {len(columns)} (columns: {found}). Cast the column with "
            'data.cast_column("image", datasets.Image()).'
        )
    return data.cast_column(columns[0], Image(decode=False)), columns[0], origin


def _load_split(source: str, path: str, split: str, **settings):
    try:
        return load_dataset(path, split=split or "train", **settings)
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ValueError(f"{source}: {error} Give one as path:split.") from error


class LabelledImages(torch.utils.data.Dataset):
    """Images of a source with their labels or captions, decoded and transformed on access.

    Args:
        source: as for `load_images`.
        transform: from an RGB image to `pixel_values`.
        class_names: the classes that the labels index, by name; None takes those of the column.
        label_column, caption_column: names of these columns; the label column must hold `ClassLabel`s or strings.

    Attributes:
        origin: `dataset` and `revision` of a data set of the Hub; empty for all others.

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
        self.data, self.image_column, self.origin = load_images(source)
        self.class_names: list[str] | None = None
        self.labels = self.captions = None
        if label_column in self.data.features:
            self._read_labels(label_column, class_names)
        if caption_column in self.data.features:
            self.captions = list(self.data[caption_column])

    def _read_labels(self, column: str, class_names: list[str] | None) -> None:
        feature, values = self.data.features[column], list(self.data[column])
        if isinstance(feature, ClassLabel):
            self.class_names = class_names or list(feature.names)
            if self.class_names != feature.names:  # the same classes in another order, or a part of them
                named = range(len(feature.names))
                values = [feature.names[value] if value in named else value for value in values]
        elif getattr(feature, "dtype", None) == "string":
            self.class_names = class_names or sorted(set(values) - {None})
        else:
            raise ValueError(
                f"{self.source}: column {column!r} holds {feature}, without class names. Cast it with "
                f'data.cast_column("{column}", datasets.ClassLabel(names=[...])), or use strings.'
            )
        index = {name: i for i, name in enumerate(self.class_names)}
        values = [index.get(value, value) for value in values]
        for row, value in enumerate(values):
            if not isinstance(value, int) or not 0 <= value < len(self.class_names):
                shown = [*self.class_names[:5], *(["..."] if len(self.class_names) > 5 else [])]
                raise ValueError(
                    f"{self.source}, row {row}: label {value!r} lies outside the {len(self.class_names)} classes "
                    f"({', '.join(shown)}). Class names are compared letter by letter."
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


def eval_sets(
    role: str,
    named: dict[str, str],
    load: Callable[[str, list[str] | None], LabelledImages],
    class_names: list[str] | None = None,
    banks: dict[str, str] | None = None,
    retrieval: bool = False,
) -> list[EvalSet]:
    """Sources as sets of a suite.

    Args:
        role: of the sets.
        named: sources by name.
        load: makes images of a source and the classes that its labels index (None: its own).
        class_names: these classes.
        banks: by name of a set, the source of the labelled images that vote on it (k-NN); other names are not used.
        retrieval: whether labels are left out where there are captions.

    Raises:
        ValueError: where a set is its own bank.
    """
    sets = []
    for name, source in named.items():
        images, bank = load(source, class_names), None
        if name in (banks or {}):
            if banks[name] == source:
                raise ValueError(f"The bank of {name!r} is that set itself, {source}: give other images.")
            others = load(banks[name], images.class_names)
            bank = EvalSet(role, name, others, banks[name], others.labels, others.class_names)
        labels = None if retrieval and images.captions else images.labels
        known = (images.class_names, images.captions, bank)
        sets.append(EvalSet(role, name, images, source, labels, *known, **images.origin))
    return sets
