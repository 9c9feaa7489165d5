"""Labels of a data set as indices into a list of class names, and such lists from files."""

import json
import unicodedata
from collections import Counter
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset

STRINGS = ("string", "large_string", "string_view")


def read_labels(
    data: Dataset, column: str, class_names: list[str] | None = None, label_names: list[str] | None = None
) -> tuple[torch.Tensor, list[str]]:
    """Read a column of labels, `ClassLabel`s, strings or whole numbers.

    Args:
        class_names: the classes to index; None takes those of the column.
        label_names: names of labels that are whole numbers, in the order of the numbers.

    Returns:
        Indices of shape (n,), and the names that they index.

    Raises:
        ValueError: if the labels have no names, or one of them is not among the classes.
    """
    feature, values = data.features[column], list(data[column])
    dtype = str(getattr(feature, "dtype", ""))
    if dtype in STRINGS:
        own = sorted({one_spelling(value) for value in values if value})
        names = [value and one_spelling(value) for value in values]
    elif isinstance(feature, ClassLabel) or (label_names and (dtype == "bool" or "int" in dtype)):
        own = [one_spelling(name) for name in getattr(feature, "names", label_names)]
        names = [own[value] if value in range(len(own)) else value for value in values]
    else:
        raise ValueError(
            f"column {column!r} holds {feature}, without class names. Name whole numbers of ID and OOD sets "
            f"with --class_names FILE (one name per line, or JSON). Otherwise use strings, or cast the column with "
            f'data.cast_column("{column}", datasets.ClassLabel(names=[...])).'
        )
    classes = [one_spelling(name) for name in class_names] if class_names else own
    times = Counter(classes)
    if dtype not in STRINGS and classes == own:  # by number, because some lists, such as ImageNet's, have a name twice
        places = [int(value) if value in range(len(own)) else None for value in values]
    else:
        index = {name: i for i, name in enumerate(classes) if times[name] == 1}
        places = [index.get(name) for name in names]
    if None in places:
        row = places.index(None)
        fault = "is the name of several of" if times[names[row]] else "lies outside"
        shown = ", ".join([*classes[:5], *(["..."] if len(classes) > 5 else [])])
        raise ValueError(
            f"row {row}: label {names[row]!r} {fault} the {len(classes)} classes ({shown}). Class names are compared "
            "letter by letter."
        )
    return torch.tensor(places), classes


def read_class_names(file: str) -> list[str]:
    """Read the names of classes from a file: one per line, or JSON, a list or `{"0": name, "1": name, ...}`.

    Raises:
        ValueError: if the file cannot be read, or does not name every class from 0 on.
    """
    if not Path(file).is_file() or Path(file).stat().st_size > 2**24:
        raise ValueError(f"{file} is not a file of at most 16 MB. Give a file with class names.")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.rstrip().split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}).") from error
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(len(names))]
    for i, name in enumerate(names or [None]):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{file}: class {i} has no name. Give one name per line, or JSON: a list of names, or an object "
                '{"0": name, "1": name, ...}.'
            )
    return [name.strip() for name in names]


def one_spelling(name: str) -> str:
    """A class name in the form in which names are compared (NFC): macOS writes é as two characters."""
    return unicodedata.normalize("NFC", name)
