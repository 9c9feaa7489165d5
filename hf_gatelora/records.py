"""What a run leaves behind: the names of its files, how they are written, and the rows of `results.jsonl`.

Tables and cards read every number from those rows, one row per measurement.
"""

import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

RESULTS_FILE, SUMMARY_FILE, STATE_FILE = "results.jsonl", "gates.json", "gatelora_state.safetensors"
RUN_FILE = "gatelora_run.txt"  # in an output folder: which run was last started there
CARD, GATE_MAP, FRONTIER = "README.md", "gate_map.png", "frontier.png"
EVAL_RESULTS = ".eval_results/hf_gatelora.yaml"

TITLES = {"id": "ID", "ood": "OOD", "retention": "retention"}  # in tables, by role
ROLES = tuple(TITLES)
TRAINED = "cost", "train"  # role and data of the rows that name what an adapter was trained on
# Types of a row's fields, as far as tables and cards rely on them. The first three are in every row.
FIELDS = {
    "method": str,
    "metric": str,
    "value": int | float,
    "n": int,
    "wise": int | float,
    "step": int,
    **dict.fromkeys(("role", "data", "split", "title", "unit", "model", "dataset", "revision"), str),
    "arguments": dict,
    "versions": dict,
    "classes": list,
}
# Training arguments that are recorded even if they have their defaults.
ALWAYS = {"learning_rate", "num_train_epochs", "per_device_train_batch_size"}
PACKAGES = ("hf_gatelora", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Metric:
    """What the value of a results row means.

    Rows hold only the name if `METRICS` has the metric, else all of these fields. So every reader knows them, and a new
    metric needs no entry in this file.

    Args:
        name: in rows and in the log of a Trainer.
        title: in tables; default: the name.
        unit: `"%"` for fractions, which tables show in percent; else the text behind the value, by default none.
        higher_is_better: None, the default: not known, or neither.
        needs_head: whether a classification head gives the value; default: False.
    """

    name: str
    title: str = ""
    unit: str = ""
    higher_is_better: bool | None = None
    needs_head: bool = False

    def __post_init__(self):
        object.__setattr__(self, "title", self.title or self.name.replace("_", " "))

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def number(self, value: float, sign: str = "") -> str:
        """A value as text, without its unit; `sign="+"` for a change, in points where the unit is percent."""
        return f"{100 * value:{sign}z.1f}" if self.unit == "%" else f"{value:{sign}z.4g}"

    def fields(self) -> dict:
        """What a row says of its metric."""
        stated = asdict(self) if METRICS.get(self.name) != self else {"name": self.name}
        return {"metric": stated.pop("name"), **stated}


TOP1 = Metric("top1", "accuracy", "%", True, needs_head=True)
ECE = Metric("ece", "ECE", "%", False, needs_head=True)
KNN_TOP1 = Metric("knn_top1", "k-NN accuracy", "%", True)
RECALLS = [
    Metric(f"{way}_recall@{k}", unit="%", higher_is_better=True)
    for way in ("image_to_text", "text_to_image")
    for k in (1, 5, 10)
]
METRICS = {metric.name: metric for metric in (TOP1, ECE, KNN_TOP1, *RECALLS)}
# The metric that stands for a set is the first of these that was measured on it, else its first one.
PRIMARY = (KNN_TOP1.name, TOP1.name, RECALLS[0].name)


def metric_of(row: dict) -> Metric:
    """The metric of a row, by its name or its own fields; one that nobody knows is a plain number."""
    stated = {key: row[key] for key in ("title", "unit", "higher_is_better", "needs_head") if key in row}
    known = METRICS.get(row["metric"])
    return known if known and not stated else Metric(row["metric"], **stated)


class Results:
    """Measurements of one run, written to `path` after each one.

    Args:
        path: the JSONL file, which the first measurement replaces. None, for all processes but one, writes nothing.
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
                `metric`, `value`: name and value of what was measured, with the other fields of a `Metric` that is not
                    in `METRICS`;
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
    """The rows of a results file.

    Raises:
        ValueError: if it is not a results file; names the line.
    """
    rows = []
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(_checked(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a row of a results file ({error}).") from error
    return rows


def _checked(row) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} in place of an object")
    for key, kind in FIELDS.items():
        found = row.get(key)
        if not isinstance(found, kind) and (found is not None or key in ("method", "metric", "value")):
            raise ValueError(f"{key!r} is {'missing' if found is None else repr(found)[:50]}")
    return row


def read_earlier(path: str | os.PathLike) -> list[dict]:
    """The rows of a results file that others are to be added to; none if there is no file.

    Raises:
        ValueError: if it cannot be read or is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give a file for the results.")
    return read_results(path) if Path(path).is_file() else []


def primary_rows(rows: list[dict], role: str) -> list[dict]:
    """For each set of a role the row that stands for it: of the first metric of `PRIMARY`, else of its first metric.

    Percentages and other numbers have no common mean: sets without a percentage are left out if others have one, and
    so are those of another unit or direction than the first.
    """
    sets: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["role"] == role:
            sets.setdefault(row["data"], {})[row["metric"]] = row
    chosen = [found[next((m for m in PRIMARY if m in found), next(iter(found)))] for found in sets.values()]
    kinds = [(metric_of(row).unit, metric_of(row).higher_is_better) for row in chosen]
    kind = min(kinds, key=lambda kind: kind[0] != "%", default=None)
    return [row for row, own in zip(chosen, kinds, strict=True) if own == kind]


def primary(rows: list[dict], role: str) -> float | None:
    """Mean over the sets of a role of each one's primary metric; None if nothing was measured."""
    found = primary_rows(rows, role)
    return fmean(row["value"] for row in found) if found else None


def label(row: dict) -> str:
    """Method of a row, with the scale of its adapter if it is not 1."""
    return row["method"] + (f" x {row['wise']:g}" if "wise" in row else "")


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not installed as a package, for instance run from a source tree
            continue
    return found


def not_default(training) -> dict:
    """The training arguments (`TrainingArguments`) that differ from their defaults, and rate, epochs and batch size.

    As plain values for JSON, without tokens and the folders of this machine: they are published with the adapter.
    """
    # Not from an instance with the defaults: making one would set up the processes again, without use_cpu.
    defaults = {f.name: f.default for f in fields(training)}
    always = ALWAYS - ({"num_train_epochs"} if training.max_steps > 0 else set())
    found = {
        name: without_paths(value)
        for name, value in training.to_dict().items()
        if name in always
        or ((value or defaults[name]) and str(value) != str(defaults[name]) and not name.endswith("_token"))
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
