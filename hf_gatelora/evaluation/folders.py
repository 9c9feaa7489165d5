"""Folders of images as data sets: CLASS/FILE, SPLIT/CLASS/FILE, or images that a metadata file describes.

The imagefolder of `datasets` does not label a single class, nor any image where one lies outside the class folders. It
also ignores linked folders, takes brackets in a path for a pattern, and shifts the columns of a CSV row with too many.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from pyarrow import csv, json, parquet

from .labels import one_spelling

logger = logging.getLogger(__name__)

LINES = csv.ParseOptions(newlines_in_values=True)
NULLS = csv.ConvertOptions(null_values=[""])  # a class may be called NA
METADATA = {
    "metadata.csv": lambda file: csv.read_csv(file, parse_options=LINES, convert_options=NULLS),
    "metadata.jsonl": json.read_json,
    "metadata.parquet": parquet.read_table,
}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def load_folder(folder: Path, split: str = "") -> Dataset:
    """Read a folder of images without opening them.

    Args:
        split: `train` (the default), `validation`, `test`, or one of their usual spellings. A folder without
            subfolders of these names is one split, `train`.

    Returns:
        The column `image`, and the columns of the metadata files (`metadata.csv`, `.jsonl` or `.parquet`; their column
        `file_name` holds paths relative to the metadata file). Without metadata files, images in class folders also
        have a `label`, the name of the folder that holds them. The classes are those of all splits together.

    Raises:
        ValueError: if there are no images, no such split, images beside the class folders, or bad metadata.
    """
    suffixes = {suffix for suffix, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    images, metadata, empty = [], [], []
    for place, names, subfolders in _walk(folder):
        metadata += [place / name for name in names if name in METADATA]
        found = [place / name for name in names if Path(name).suffix.lower() in suffixes]
        images += found
        if not found and not subfolders:
            empty.append(place)
    if not images:
        raise ValueError(f"{folder} holds no images.")
    splits = _splits_of_metadata(metadata) if metadata else _splits_of_images(sorted(images, key=str))
    wanted = _split_of(split or "train") or split
    if wanted not in splits:
        raise ValueError(
            f"{folder}:{wanted}: there is no split {wanted!r}, it is one of {sorted(splits)}. Give one as path:split."
        )
    if metadata:
        return _described(folder, list(splits[wanted]))
    return _classified(folder, splits, wanted, empty)


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder under `root`, relative to it, with its files and subfolders; follows links, skips hidden names."""
    for here, folders, names in os.walk(root, followlinks=True):
        real = Path(here).resolve()
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith((".", "__"))  # __MACOSX, __pycache__
            and not (os.path.islink(f"{here}/{name}") and real.is_relative_to(Path(here, name).resolve()))  # a loop
        ]
        yield Path(here).relative_to(root), [name for name in names if not name.startswith(".")], folders


def _split_of(name: str) -> str | None:
    """The split that a folder's name stands for, such as `train2017` or `my-val`."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((split for split, known in SPLITS.items() if not set(words).isdisjoint(known)), None)


def _splits_of_metadata(files: list[Path]) -> dict[str, dict[Path, Path]]:
    splits: dict[str, dict[Path, Path]] = {}
    for file in files:
        split = next(filter(None, map(_split_of, file.parent.parts)), "train")
        splits.setdefault(split, {})[file] = file
    return splits


def _splits_of_images(images: list[Path]) -> dict[str, dict[Path, Path]]:
    """Images by split: each one's path, and its path within the split."""
    exact = {word: split for split, known in SPLITS.items() for word in known}
    folders = {image.parent for image in images}
    homes: dict[Path, str] = {}
    for folder in folders:
        # A folder that holds images directly is a class, even if it is called "train station".
        known = [(i, split) for i, part in enumerate(folder.parts[:-1]) if (split := _split_of(part))]
        if known:
            at, split = known[0]
            homes[Path(*folder.parts[: at + 1])] = split
    if not homes and all(folder.name.lower() in exact for folder in folders):  # SPLIT/FILE, without classes
        homes = {folder: exact[folder.name.lower()] for folder in folders}
    if not homes:
        return {"train": {image: image for image in images}}
    home_of = {folder: next((p for p in (folder, *folder.parents) if p in homes), None) for folder in folders}
    splits: dict[str, dict[Path, Path]] = {}
    for image in images:
        home = home_of[image.parent]
        if home is not None:  # others, as in an `extra` folder beside train and test, belong to no split
            splits.setdefault(homes[home], {})[image] = image.relative_to(home)
    return splits


def _classified(folder: Path, splits: dict[str, dict[Path, Path]], split: str, empty: list[Path]) -> Dataset:
    chosen = splits[split]
    depths = Counter(len(inner.parts) for inner in chosen.values())
    usual = max(depths, key=lambda depth: (depths[depth], depth))
    strays = [image for image, inner in chosen.items() if len(inner.parts) != usual]
    if strays:
        shape = "/".join(["*"] * (usual - 2) + ["CLASS", "FILE"][-usual:])
        raise ValueError(
            f"{folder}: {strays[0]} lies at another depth than most images ({shape}), so its class is not known; "
            f"{len(strays)} of {len(chosen)} images are like it. Move them into a class folder or out of {folder.name}."
        )
    columns: dict[str, list] = {"image": [str(folder.absolute() / image) for image in chosen]}
    if usual == 1:
        return Dataset.from_dict(columns, features=Features({"image": Image()}))
    # macOS writes the accents of a file's name as characters of their own.
    labels = [one_spelling(inner.parent.name) for inner in chosen.values()]
    names = {one_spelling(i.parent.name) for images in splits.values() for i in images.values() if len(i.parts) > 1}
    for place in empty:
        if one_spelling(place.name) not in names:
            logger.warning("%s holds no images, so it is not one of the classes.", folder / place)
    numbers = {name: i for i, name in enumerate(sorted(names))}
    columns["label"] = [numbers[label] for label in labels]
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=list(numbers))}))


def _described(folder: Path, files: list[Path]) -> Dataset:
    if len({file.suffix for file in files}) > 1:
        raise ValueError(f"{folder} has metadata of several kinds, {files[0]} and {files[-1]}: keep one.")
    tables = []
    for file in files:
        try:
            table = METADATA[file.name](folder / file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{folder / file} cannot be read ({error}).") from error
        named = [name for name in table.column_names if f"_{name}".endswith("_file_name")]
        if len(named) != 1:
            raise ValueError(f"{folder / file} needs one column file_name, its columns are {table.column_names}.")
        paths = []
        for row, name in enumerate(table[named[0]].to_pylist()):
            inner = Path(os.path.normpath(str(name)))
            if not name or inner.is_absolute() or ".." in inner.parts:
                raise ValueError(f"{folder / file}, row {row}: file_name {name!r} is not a file in this folder.")
            paths.append(str(folder.absolute() / file.parent / inner))
        tables.append(table.drop_columns(named).append_column("image", pa.array(paths, pa.string())))
    try:
        columns = pa.concat_tables(tables, promote_options="default").to_pydict()
    except pa.ArrowException as error:
        raise ValueError(f"{folder}: its metadata files have different columns ({error}).") from error
    return Dataset.from_dict(columns).cast_column("image", Image())
