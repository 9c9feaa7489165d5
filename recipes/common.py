"""What the recipes share: arguments from YAML and command line, and the fields that every recipe has."""

from argparse import Action, _ExtendAction
from dataclasses import dataclass, field
from pathlib import Path

import toy_world
import yaml
from transformers import HfArgumentParser

TOY = "toy"

METHODS = {
    "linear_probe": "a linear classifier on the frozen features",
    "full": "every parameter trained",
    "lora": "a LoRA block on every target",
    "lora_equal": "the same, of the rank that comes nearest to the budget's number of parameters",
    "random": "LoRA blocks on as many random targets as the budget opens",
    "gated": "gated LoRA",
}
BUDGETED = ("gated", "random", "lora_equal")
# Keeps more of the prior knowledge (recipes/README.md); the library's own defaults are the plain method.
DEFAULTS = {"gate_rewind": True}


@dataclass
class RecipeArguments:
    """Model, data and methods. A source is `toy:SET`, a file, a folder or a Hub id, with an optional `:split`."""

    model: str = field(default=None, metadata={"help": "Hub id or folder of the base model, or toy"})
    train: str = field(default=None, metadata={"help": "source of the training images"})
    test: str = field(default=None, metadata={"help": "source of the ID test images"})
    validation: str = field(
        default=None, metadata={"help": "source of ID images for evaluation during training (--eval_strategy)"}
    )
    validation_ood: list[str] = field(
        default=None, metadata={"help": "name=source of an OOD set to watch meanwhile", "action": "extend"}
    )
    validation_retention: list[str] = field(
        default=None, metadata={"help": "name=source of a retention set to watch meanwhile", "action": "extend"}
    )
    ood: list[str] = field(
        default=None, metadata={"help": "name=source of an OOD set; may be repeated", "action": "extend"}
    )
    retention: list[str] = field(
        default=None, metadata={"help": "name=source of a retention set; may be repeated", "action": "extend"}
    )
    methods: list[str] = field(
        default_factory=lambda: ["gated"],
        metadata={"help": f"what to train: {', '.join(METHODS)}; gated@0.1 for another budget than the default one"},
    )
    wise: list[float] = field(
        default_factory=list, metadata={"help": "scales of the trained adapter to evaluate as well (WiSE-FT)"}
    )
    label_column: str = field(default="label", metadata={"help": "column of the class labels"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int = field(default=None, metadata={"help": "alpha; default: the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before A"})
    full_learning_rate: float = field(default=2e-4, metadata={"help": "learning rate of the method full"})
    keep_finished: bool = field(
        default=False, metadata={"help": "leave out methods that the output folder has results of"}
    )

    def __post_init__(self):
        for name in ("model", "train", "test"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing: give it on the command line or in the YAML file.")
        for method in self.methods:
            parse_method(method)
        if any(not 0 <= scale <= 1 for scale in self.wise):
            raise ValueError(f"--wise {self.wise}: the scales lie between 0 (the base) and 1 (the adapter).")


def located(source: str) -> str:
    """A source as the library knows it: `toy:SET` is a file of the toy world, which is made where there is none."""
    if not source.startswith(f"{TOY}:"):
        return source
    return str(toy_world.ensure_world() / "data" / f"{source.removeprefix(f'{TOY}:')}.parquet")


def missing_column(data, purpose: str, option: str, column: str) -> ValueError:
    """The error of images without the column that `--option` names."""
    found = ", ".join(data.data.column_names)
    return ValueError(f"{data.source}: {purpose} needs a column {column!r}, found {found}. Say which with --{option}.")


def parse_method(method: str) -> tuple[str, float | None]:
    """`"gated@0.1"` as its name and budget; the budget is None where none is given.

    Raises:
        ValueError: where there is no such method, or it takes no budget.
    """
    name, at, budget = method.partition("@")
    if name not in METHODS or (at and name not in BUDGETED):
        raise ValueError(
            f"--methods {method!r} is not known: use some of {', '.join(METHODS)}, with an own budget as in gated@0.1 "
            f"for {', '.join(BUDGETED)}."
        )
    try:
        return name, float(budget) if at else None
    except ValueError as error:
        raise ValueError(
            f"--methods {method!r}: {budget!r} is not a number. Give the budget as in gated@0.1."
        ) from error


def parse_arguments(classes: list[type], argv: list[str]) -> tuple:
    """Parse `[config.yaml] [--field value ...]` into the dataclasses; the command line overrides the file.

    Raises:
        ValueError: where the file has a field that no dataclass has, or a list something else than numbers.
        SystemExit: where a value is not of its field's type, as argparse says it.
    """
    parser = HfArgumentParser(classes)
    defaults = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        defaults = yaml.safe_load(Path(argv[0]).read_text()) or {}
        actions = {action.dest: action for action in parser._actions}
        unknown = sorted(set(defaults) - set(actions))
        if unknown:
            raise ValueError(f"{argv[0]}: unknown field {', '.join(map(repr, unknown))}. See --help for the fields.")
        for name, value in defaults.items():
            try:
                defaults[name] = _as_on_the_command_line(value, actions[name])
            except ValueError as error:
                raise ValueError(f"{argv[0]}: {name}: {error}.") from error
        argv = argv[1:]
    # A list on the command line replaces that of the file, and may be given in several pieces.
    pieces = {action.dest for action in parser._actions if isinstance(action, _ExtendAction)}
    lists = {name: defaults.pop(name) for name in pieces & set(defaults)}
    parser.set_defaults(**DEFAULTS | defaults)
    parsed = parser.parse_args_into_dataclasses(argv)
    for group in parsed:
        for name, value in lists.items():
            if hasattr(group, name) and getattr(group, name) is None:
                setattr(group, name, value)
    return parsed


def _as_on_the_command_line(value, action: Action):
    """A value of the file for the parser: one value where a list is meant is a list, numbers are checked as strings."""
    if value is None:
        return None
    if action.nargs in ("+", "*"):
        if isinstance(value, dict):  # {name: source}
            return [f"{name}={source}" for name, source in value.items()]
        value = value if isinstance(value, list) else [value]
        return [action.type(item) for item in value]
    return str(value) if action.type in (int, float) else value


# What a run may differ in from one whose results it takes over.
NOT_OF_THE_METHOD = {"methods", "keep_finished", "output_dir", "logging_dir", "resume_from_checkpoint", "disable_tqdm"}
