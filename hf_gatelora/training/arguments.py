"""What the recipes read: their common arguments, from a YAML file and the command line, and the images they name."""

import os
import sys
import warnings
from argparse import SUPPRESS, Action, _ExtendAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.utils import logging

from ..evaluation.images import LabelledImages, eval_sets, parse_named_sources
from ..evaluation.labels import read_class_names
from ..evaluation.suite import EvalSet
from .retention import RetentionCallback
from .trainer import GatedLoraTrainingArguments

METHODS = ("lora", "gated")
# Fields that name files: those of a YAML file may be relative to it.
NAMED = ("validation_ood", "validation_retention", "ood", "retention", "bank", "head_label_map")
PATHS = ("model", "train", "test", "validation", "class_names", *NAMED)
# Keeps more of the prior knowledge (recipes/README.md); the library's own defaults are the plain method. Labels and
# images are not always arguments of the model's forward: Trainer would drop them.
DEFAULTS = {"gate_rewind": True, "remove_unused_columns": False, "label_names": ["labels"]}


def several(text: str) -> dict[str, str]:
    """Metadata of a field that takes several values and may be repeated on the command line."""
    return {"help": text, "action": "extend"}


@dataclass
class RecipeArguments:
    """Model, data and methods. A source is a file, a folder or a Hub id, with an optional `:split`."""

    model: str = field(default="", metadata={"help": "Hub id or folder of the base model"})
    train: str = field(default="", metadata={"help": "source of the training images"})
    test: str = field(default="", metadata={"help": "source of the ID test images"})
    ood: list[str] | None = field(default=None, metadata=several("name=source of an OOD set; may be repeated"))
    retention: list[str] | None = field(
        default=None, metadata=several("name=source of a retention set; may be repeated")
    )
    validation: str | None = field(
        default=None, metadata={"help": "source of ID images for evaluation during training (--eval_strategy)"}
    )
    validation_ood: list[str] | None = field(
        default=None, metadata=several("name=source of an OOD set to watch meanwhile")
    )
    validation_retention: list[str] | None = field(
        default=None, metadata=several("name=source of a retention set to watch meanwhile")
    )
    label_column: str = field(default="label", metadata={"help": "column of the class labels"})
    class_names: str | None = field(
        default=None, metadata={"help": "file that names labels which are numbers: one name per line, or JSON"}
    )
    methods: list[str] = field(default_factory=lambda: ["gated"], metadata={"help": f"some of {', '.join(METHODS)}"})
    wise: list[float] = field(
        default_factory=list, metadata={"help": "scales of the trained adapter to evaluate as well (WiSE-FT)"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int | None = field(default=None, metadata={"help": "alpha; default: the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before A"})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "modules that get a LoRA block; default: all that lora_targets(model) names"}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads of torch; default: as launched"})

    def __post_init__(self):
        for name in ("model", "train", "test"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: give it on the command line or in the YAML file.")
        if any(not 0 <= scale <= 1 for scale in self.wise):
            raise ValueError(f"--wise {self.wise}: the scales lie between 0 (the base) and 1 (the adapter).")
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def images(self, pixels: Callable, caption_column: str = "caption") -> tuple[LabelledImages, Callable]:
        """The training images, and `load(source, class_names)` for those of the sets.

        Args:
            pixels: from an RGB image to the pixel values of shape (3, H, W) that the model takes.
        """
        names = read_class_names(self.class_names) if self.class_names else None

        def load(source: str, class_names: list[str] | None = None) -> LabelledImages:
            numbers = names if class_names else None  # retention sets have classes of their own
            return LabelledImages(source, pixels, self.label_column, caption_column, class_names, numbers)

        return load(self.train, names), load

    def eval_sets(self, load: Callable, class_names: list[str] | None, **more) -> list[EvalSet]:
        """The ID, OOD and retention sets to measure at the end.

        Args:
            load: of `images`.
            class_names: of the ID and OOD sets.
            more: `banks`, name=source entries; `retrieval`, whether captions replace the labels of ID and OOD sets.
        """
        return _sets(load, class_names, {"test": self.test}, self.ood, self.retention, **more)

    def watching(
        self, eval_strategy: str, suite_of: Callable, load: Callable, class_names, trained_head=None, **more
    ) -> dict:
        """Arguments for a Trainer that evaluates during training; empty if `eval_strategy` is `"no"`.

        Args:
            suite_of: makes a suite of sets.
            load, class_names, more: as for `eval_sets`.
            trained_head: as for `RetentionCallback`.

        Raises:
            ValueError: if there is nothing but test images to choose a model by.
        """
        if eval_strategy == "no":
            return {}
        if self.validation is None:
            raise ValueError("--eval_strategy needs --validation: the test images are not for choosing a model.")
        named = {"validation": self.validation}
        sets = _sets(load, class_names, named, self.validation_ood, self.validation_retention, **more)
        # What is watched goes to the log alone: the results file holds what was measured at the end.
        callback = RetentionCallback(suite_of(sets), file=None, trained_head=trained_head)
        return {"eval_dataset": sets[0].images, "callbacks": [callback]}


def _sets(load, class_names, id_sets, ood, retention, banks=None, retrieval=False) -> list[EvalSet]:
    old, banks = parse_named_sources("retention", retention), parse_named_sources("bank", banks)
    for name, source in banks.items():
        if name not in old or old[name] == source:
            raise ValueError(
                f"--bank {name}={source}: its name must be that of a retention set (there are {sorted(old)}), and its "
                "images others than that set's own."
            )
    sets = eval_sets("id", id_sets, load, class_names, retrieval=retrieval)
    sets += eval_sets("ood", parse_named_sources("ood", ood), load, class_names, retrieval=retrieval)
    return sets + eval_sets("retention", old, load, None, banks)


def method_runs(
    methods: list[str], training: GatedLoraTrainingArguments, known: tuple[str, ...] = METHODS
) -> Iterator[tuple[str, GatedLoraTrainingArguments]]:
    """Each method with its training arguments: an output folder of its own, and only gated LoRA is pushed to the Hub.

    `resume_from_checkpoint` becomes True where a method has a checkpoint to go on from, None where it has not started.

    Raises:
        ValueError: if a method is unknown, or one checkpoint is given for several of them.
    """
    if unknown := [method for method in methods if method not in known]:
        raise ValueError(f"--methods {unknown[0]!r} is not known here: use some of {', '.join(known)}.")
    resume = training.resume_from_checkpoint
    latest = str(resume).lower() == "true"
    if resume and not latest and len(methods) > 1:
        raise ValueError("--resume_from_checkpoint FOLDER belongs to one method: give that one as --methods, or true.")
    for method in methods:
        folder = Path(str(training.output_dir)) / method
        changed: dict[str, Any] = {"output_dir": str(folder)}
        if latest:
            changed["resume_from_checkpoint"] = True if any(folder.glob("checkpoint-*")) else None
        if training.push_to_hub and method == "gated":
            changed["hub_model_id"] = training.hub_model_id or Path(str(training.output_dir)).absolute().name
        else:
            changed |= {"push_to_hub": False, "hub_token": None}
        yield method, replace(training, **changed)  # this also sets the engine up again


def missing_column(data: LabelledImages, purpose: str, option: str, column: str) -> ValueError:
    """The error of images without the column that `--option` names."""
    found = ", ".join(data.data.column_names)
    return ValueError(f"{data.source}: {purpose} needs a column {column!r}, found {found}. Say which with --{option}.")


def parse_arguments(classes: list[Any], argv: list[str]) -> tuple:
    """Parse `[config.yaml] [--field value ...]` into the dataclasses; the command line overrides the file.

    Files that the YAML file names are looked for beside it first, then in the working directory.

    Raises:
        ValueError: if there is an argument that no dataclass has, or the file has a value of the wrong type in a list.
        SystemExit: if a value is not of its field's type, as argparse says it.
    """
    parser = HfArgumentParser(classes, usage=SUPPRESS)
    actions = {action.dest: action for action in parser._actions}
    defaults = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        defaults, argv = _read_yaml(Path(argv[0]), actions), argv[1:]
    # A list on the command line replaces that of the file, and may be given in several pieces.
    lists = {name: defaults.pop(name) for name, action in actions.items() if _extends(action) and name in defaults}
    parser.set_defaults(**DEFAULTS | defaults)
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:  # without values: one of them may be a token
        names = [word.partition("=")[0] for word in rest if word.startswith("-")]
        listed = ", ".join(names) or f"of {len(rest)} words without a name"
        raise ValueError(f"unknown argument {listed}: --help lists them all. A YAML file comes first.")
    for group in parsed:
        for name, value in lists.items():
            if hasattr(group, name) and getattr(group, name) is None:
                setattr(group, name, value)
    return tuple(parsed)


def _extends(action: Action) -> bool:
    return isinstance(action, _ExtendAction)


def _read_yaml(file: Path, actions: dict[str, Action]) -> dict:
    try:
        fields = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not a YAML file: {error}") from error
    if unknown := sorted(set(fields) - set(actions)):
        raise ValueError(f"{file}: unknown field {', '.join(map(repr, unknown))}. See --help for the fields.")
    for name, value in fields.items():
        try:
            fields[name] = _as_on_the_command_line(value, actions[name])
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}.") from error
        if name in PATHS and fields[name]:
            one = fields[name]
            fields[name] = _beside(file, one) if isinstance(one, str) else [_beside(file, entry) for entry in one]
    return fields


def _as_on_the_command_line(value, action: Any):
    """A value of the file for the parser: one value where a list is meant is a list, numbers are checked as strings."""
    if value is None:
        return None
    if action.nargs in ("+", "*"):
        if isinstance(value, dict):  # {name: source}
            return [f"{name}={source}" for name, source in value.items()]
        value = value if isinstance(value, list) else [value]
        return [action.type(item) for item in value]
    return str(value) if action.type in (int, float) else value


def _beside(file: Path, entry: str) -> str:
    """A source `[name=]path[:split]` of a YAML file, from where this process works if the path exists beside the file.

    Hub ids and paths that do not exist there stay as they are.
    """
    name, equals, source = entry.rpartition("=")
    there = os.path.normpath(file.parent / source)
    path, _, _ = there.partition(":")
    return f"{name}{equals}{there}" if Path(there).exists() or Path(path).exists() else entry


@contextmanager
def explained_errors(program: str = Path(sys.argv[0]).name) -> Iterator[None]:
    """Within this context an input error ends the program with one sentence on stderr and exit code 2.

    With TRANSFORMERS_VERBOSITY=debug it ends with its traceback.
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if logging.get_verbosity() <= logging.DEBUG:
            raise
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    PartialState().destroy_process_group()  # without it a process now and then aborts as it exits
