"""Image data from any source: files, folders, the Hub."""

import glob
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .decoding import decode_rgb
from .folders import load_folder
from .labels import read_labels
from .suite import EvalSet

logger = logging.getLogger(__name__)

FILES = {".parquet": "parquet", ".arrow": "arrow"}


def load_images(source: str) -> tuple[Dataset, str, dict]:
    """Load a data set with images, without decoding them.

    Args:
        source: a parquet or arrow file, a folder that `Dataset.save_to_disk` wrote, a folder of images (see
            `load_folder`), or a Hub id. A split may follow a colon (`user/data:test`); the default is `train`.

    Returns:
        The data, with its image column not decoded; the name of that column; and for a data set of the Hub its id
        (`dataset`) and commit (`revision`, None if not known), else an empty dict.

    Raises:
        ValueError: if nothing is found, it cannot be read, or it does not have exactly one image column.
    """
    data, origin = _open(source)
    if not len(data):
        raise ValueError(f"{source} holds no images.")
    columns = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        found = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in data.features.items())
        raise ValueError(
            f"{source}: needs one column of type Image, found {len(columns)} (columns: {found}). Cast the column with "
            'data.cast_column("image", datasets.Image()).'
        )
    return data.cast_column(columns[0], Image(decode=False)), columns[0], origin


def _open(source: str) -> tuple[Dataset, dict]:
    path, _, split = source.rpartition(":") if ":" in source and not Path(source).exists() else (source, "", "")
    file = Path(path)
    if split and (file.is_file() or (file / "state.json").is_file()):
        raise ValueError(f"{source}: {path} holds one data set, without splits. Leave out {split!r}.")
    if file.is_file():
        if file.suffix not in FILES:
            raise ValueError(f"{path}: give a .parquet or .arrow file, a folder, or a Hub id.")
        return _read(path, load_dataset, FILES[file.suffix], data_files=glob.escape(path), split="train"), {}
    if (file / "state.json").is_file():
        return _read(path, load_from_disk, path), {}
    if (file / "dataset_dict.json").is_file():
        parts = _read(path, load_from_disk, path)
        if (split or "train") not in parts:
            raise ValueError(
                f"{source}: no split {split or 'train'!r}, there are {sorted(parts)}. Give one as path:split."
            )
        return parts[split or "train"], {}
    if file.is_dir():
        return load_folder(file, split), {}
    if path.count("/") > 1 or file.suffix in FILES:
        raise ValueError(f"{source}: no such file or folder.")
    try:
        data = load_dataset(path, split=split or "train")
    except DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read ({error.__cause__ or error}).") from error
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise ValueError(f"{source}: {error} Give one as path:split.") from error
    # The cache folder of a data set of the Hub is named after the commit.
    folder = Path(data.cache_files[0]["filename"]).parent.name if data.cache_files else ""
    return data, {"dataset": path, "revision": folder if re.fullmatch("[0-9a-f]{40}", folder) else None}


def _read(path: str, load: Callable, *arguments, **settings) -> Dataset | DatasetDict:
    try:
        return load(*arguments, **settings)
    except (DatasetGenerationError, ValueError, KeyError, TypeError, AttributeError) as error:  # damaged data or JSON
        raise ValueError(f"{path} cannot be read ({error.__cause__ or repr(error)}).") from error


class LabelledImages(torch.utils.data.Dataset):
    """Images of a source with their labels or captions, decoded and transformed on access.

    Args:
        source: as for `load_images`.
        transform: from an RGB image to `pixel_values`.
        label_column, caption_column: names of these columns. Labels are `ClassLabel`s, strings, or whole numbers.
        class_names: the classes that `labels` index; None takes those of the column.
        label_names: names of labels that are whole numbers, in the order of the numbers.

    Attributes:
        labels: indices into `class_names`, of shape (n,); None without a label column.
        captions: one string per image; None without a caption column.
        origin: `dataset` and `revision` of a data set of the Hub; empty for all others.

    Raises:
        ValueError: if the labels have no names, or one of them is not among the classes; on access, if an image cannot
            be read.
    """

    def __init__(
        self,
        source: str,
        transform: Callable,
        label_column: str = "label",
        caption_column: str = "caption",
        class_names: list[str] | None = None,
        label_names: list[str] | None = None,
    ):
        self.source, self.transform = source, transform
        self.data, self.image_column, self.origin = load_images(source)
        self.class_names: list[str] | None = None
        self.labels = self.captions = None
        if label_column in self.data.features:
            try:
                self.labels, self.class_names = read_labels(self.data, label_column, class_names, label_names)
            except ValueError as error:
                raise ValueError(f"{source}, {error}") from error
            if len(self.class_names) == 1:
                logger.warning("%s has one class only, %s: its accuracy says nothing.", source, self.class_names[0])
        if caption_column in self.data.features:
            self.captions = list(self.data[caption_column])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict:
        stored = self.data[row][self.image_column]
        try:
            image = decode_rgb(stored)
        except ValueError as error:
            name = f" ({stored['path']})" if stored and stored["path"] else ""
            raise ValueError(f"{self.source}, row {row}{name}: the image cannot be read ({error}).") from error
        item = {"pixel_values": self.transform(image)}
        if self.labels is not None:
            item["labels"] = self.labels[row]
        if self.captions is not None:
            item["captions"] = self.captions[row]
        return item


def parse_named_sources(field: str, entries: list[str] | None) -> dict[str, str]:
    """Parse `["name=source", ...]` into a dict.

    Raises:
        ValueError: if an entry has no name, or a name occurs twice.
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
    """Load sources as the sets of a suite.

    Args:
        role: role of all sets: `"id"`, `"ood"` or `"retention"`.
        named: sources by the name of their set.
        load: loads the images of a source, given the source and the classes that its labels index.
        class_names: these classes; None takes each source's own.
        banks: sources of the labelled images that vote in k-NN, by the name of the set. Other names are ignored.
        retrieval: leave out the labels of sets that have captions.

    Raises:
        ValueError: if a set is its own bank.
    """
    sets = []
    for name, source in named.items():
        images, bank = load(source, class_names), None
        if banks and name in banks:
            if banks[name] == source:
                raise ValueError(f"The bank of {name!r} is that set itself, {source}: give other images.")
            others = load(banks[name], images.class_names)
            bank = EvalSet(role, name, others, banks[name], others.labels, others.class_names)
        labels = None if retrieval and images.captions else images.labels
        known = (images.class_names, images.captions, bank)
        sets.append(EvalSet(role, name, images, source, labels, *known, **images.origin))
    return sets
