"""What a run leaves behind: the names of its files, how they are written, and the rows of `results.jsonl`.

Every table and card reads its numbers from those rows, one per measurement.
"""

import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS_FILE, SUMMARY_FILE, STATE_FILE = "results.jsonl", "gates.json", "gatelora_state.safetensors"
RUN_FILE = "gatelora_run.txt"  # in an output folder: which run was last started there
CARD, GATE_MAP, FRONTIER = "README.md", "gate_map.png", "frontier.png"
EVAL_RESULTS = ".eval_results/hf_gatelora.yaml"

TITLES = {"id": "ID", "ood": "OOD", "retention": "retention"}  # in tables, by role
ROLES = tuple(TITLES)
TRAINED = "cost", "train"  # role and data of the rows that name what an adapter was trained on
# What stands for a set where one number is wanted: the first of these that was measured on it, else its first metric.
PRIMARY = ("knn_top1", "top1", "image_to_text_recall@1")
PACKAGES = ("hf_gatelora", "torch", "transformers", "peft", "accelerate", "datasets")
# Arguments of an evaluation that do not change the value of a row: which rows there are, and how fast they come.
SAME_VALUES = ("id", "ood", "retention", "scales", "batch_size", "device")


class Results:
    """Measurements of one run, written to `path` after each one.

    Args:
        path: the JSONL file; what it held is replaced at the first measurement. None, for all processes but one,
            writes nothing.
        common: fields that every row gets, for instance model, seed and arguments.
    """

    def __init__(self, path: str | os.PathLike | None, **common):
        self.path = path and Path(path)
        self.common = {**common, "versions": package_versions()}
        self.rows: list[dict] = []

    def extend(self, rows: list[dict]) -> None:
        """Add measurements and write the file (under a temporary name, then renamed).

        Args:
            rows: each with the fields
                `method`: how the model was made, for instance `"base"`, `"lora"` or `"gated"`;
                `role`: `"id"`, `"ood"`, `"retention"`, or `"cost"` for sizes and times;
                `data`, `split`: name of the data set and its part;
                `metric`, `value`: what was measured; accuracies are fractions;
                `n`: number of samples behind the value;
                and whatever else is known.
        """
        self.rows += [{**row, **self.common} for row in rows]
        if self.path is not None:
            write_results(self.rows, self.path)


def write_results(rows: list[dict], path: str | os.PathLike) -> None:
    """Write rows to a results file, under a temporary name that is then renamed."""
    write_text("".join(json.dumps(row) + "\n" for row in rows), path)


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write a text file under a temporary name, then rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the context ends without an error.

    It lies in a new folder beside `path`, so that it never goes through a link and no other process writes there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        yield Path(folder) / path.name
        os.replace(Path(folder) / path.name, path)


def read_results(path: str | os.PathLike) -> list[dict]:
    """The rows of a results file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_earlier(path: str | os.PathLike) -> list[dict]:
    """The rows of a results file that others are to be added to; none where there is no file.

    Raises:
        ValueError: where it cannot be read, or is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give a file for the results.")
    try:
        return read_results(path) if Path(path).is_file() else []
    except ValueError as error:
        raise ValueError(f"{path} is no results file, and is left as it is ({error}).") from error


def update_results(rows: list[dict], path: str | os.PathLike) -> None:
    """Add rows to a results file; those of the same measurement (adapter, method, set, metric, scale) are replaced.

    Of what is measured again two kinds of rows are dropped, as they cannot be compared with the new ones: those of a
    set of the same name from another source, and those of other scales that were measured with other arguments.

    Raises:
        ValueError: where the file cannot be read.
    """

    def on_set(row: dict) -> tuple:
        return tuple(row.get(key) for key in ("adapter", "method", "role", "data"))

    def measured(row: dict) -> tuple:
        return *on_set(row), row["metric"], row.get("wise")

    def how(row: dict) -> str:
        stated = {key: value for key, value in row.get("arguments", {}).items() if key not in SAME_VALUES}
        return json.dumps(stated, sort_keys=True)

    before = read_earlier(path)
    new = {measured(row) for row in rows}
    sources = {(row.get("adapter"), row["role"], row["data"]): row["split"] for row in rows}
    ways = {on_set(row): how(row) for row in rows}
    kept = [
        row
        for row in before
        if measured(row) not in new
        and sources.get((row.get("adapter"), row["role"], row["data"]), row["split"]) == row["split"]
        and ("wise" not in row or ways.get(on_set(row), how(row)) == how(row))
    ]
    write_results([*kept, *rows], path)


def primary(rows: list[dict], role: str) -> float | None:
    """Mean over the sets of a role of each one's primary metric; None where nothing was measured."""
    sets: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["role"] == role:
            sets.setdefault(row["data"], {})[row["metric"]] = row["value"]
    values = [found[next((m for m in PRIMARY if m in found), next(iter(found)))] for found in sets.values()]
    return sum(values) / len(values) if values else None


def label(row: dict) -> str:
    """Method of a row, with the scale of its adapter where that is not 1."""
    return row["method"] + (f" x {row['wise']:g}" if "wise" in row else "")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not installed as a package, for instance run from a source tree
            continue
    return found


def not_default(training) -> dict:
    """The training arguments (`TrainingArguments`) that differ from their defaults, as plain values for JSON.

    Without tokens and the folders of this machine, because they are published with the adapter.
    """
    # Not from an instance with the defaults: making one would set the processes up anew, without use_cpu.
    defaults = {f.name: f.default for f in fields(training)}
    found = {
        name: without_paths(value)
        for name, value in training.to_dict().items()
        if (value or defaults[name]) and str(value) != str(defaults[name]) and not name.endswith("_token")
    }
    return json.loads(json.dumps(found, default=lambda value: without_paths(str(value))))


def without_paths(value):
    """A value with folders of this machine taken out: `/home/me/photos.parquet` becomes `photos.parquet (local)`."""
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value]
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if not isinstance(value, str):
        return value
    name, equals, source = value.rpartition("=")
    if re.match(r"(/|~|\.{1,2}/|[A-Za-z]:[\\/])", source) or ("/" in source and Path(source).exists()):
        last = re.split(r"[/\\]", source.rstrip("/"))[-1]
        return f"{name}{equals}{last} (local)"
    return value
