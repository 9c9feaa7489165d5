"""Measuring an image classifier with the head that its base model was published with."""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from .labels import one_spelling
from .suite import ClassifierSuite, EvalSet


def classifier_suite(
    sets: list[EvalSet],
    head: nn.Module | None,
    id2label: dict[int, str],
    maps: dict[str, str] | None = None,
    **settings,
) -> ClassifierSuite:
    """The suite of an image classifier, with the published head on the retention sets whose classes it has.

    Args:
        head: the head that the base model was published with, on the CPU; None if it had none.
        id2label: names of its classes by their number.
        maps: by the name of a retention set, a file as for `head_classes`.
        settings: for `ClassifierSuite`.

    Raises:
        ValueError: if a set has no labels, or a retention set has neither classes of that head nor a bank.
    """
    classes: dict[str, torch.Tensor] = {}
    for data in sets:
        if data.labels is None:
            raise ValueError(
                f"{data.role} set {data.name!r} ({data.split}) has no labels: name the column that holds them."
            )
        if data.role == "retention":
            if head is not None:
                classes |= head_classes(data, id2label, (maps or {}).get(data.name))
            if data.bank is None and data.name not in classes:
                first = ", ".join((data.class_names or [])[:3])
                raise ValueError(
                    f"Retention set {data.name!r} cannot be measured: the published head does not have its classes "
                    f"({first}, ...), and there is no bank for k-NN. Give {data.name}=SOURCE "
                    f"with labelled images as bank, or {data.name}=FILE as head label map."
                )
    return ClassifierSuite(sets=sets, original_head=head, head_classes=classes, **settings)


def plain_name(name: str) -> str:
    """A class name for comparison: data sets and heads write the same one as `tree_frog` and `Tree frog`."""
    return one_spelling(name).lower().replace("_", " ")


def head_classes(data: EvalSet, id2label: dict[int, str], file: str | None) -> dict[str, torch.Tensor]:
    """For each class of a set its output of the published head, by the set's name; empty if the head lacks one.

    Args:
        file: JSON {class: output}, all classes by name or all by number; None compares the names.

    Raises:
        ValueError: if the file does not give every class an output.
    """
    names = data.class_names or []
    if file is None:
        labels = [plain_name(id2label[key]) for key in sorted(id2label, key=int)]
        counts = Counter(labels)
        places = {label: i for i, label in enumerate(labels) if counts[label] == 1}
        found = [places.get(plain_name(name)) for name in names]
        return {} if None in found else {data.name: torch.tensor(found)}
    try:
        mapping = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable JSON file ({error}).") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{file} holds a {type(mapping).__name__}, expected an object {{class: output}}.")
    mapping = {one_spelling(key): place for key, place in mapping.items()}
    by_name = any(name in mapping for name in names)
    found = [mapping.get(name if by_name else str(i)) for i, name in enumerate(names)]
    wrong = [
        name
        for name, place in zip(names, found, strict=True)
        if not isinstance(place, int) or place not in range(len(id2label))
    ]
    if wrong:
        raise ValueError(
            f"{file} gives {len(wrong)} of the {len(names)} classes of {data.name!r} no output of the published head "
            f"(first: {wrong[0]!r}; outputs are 0 to {len(id2label) - 1})."
        )
    return {data.name: torch.tensor(found)}
