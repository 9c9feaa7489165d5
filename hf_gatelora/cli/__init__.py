"""The `gatelora` command: its arguments. What the commands do is in the files beside this one, imported when called."""

import argparse
import json
import logging
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

DESCRIPTION = "Gated LoRA: look at models and adapters, measure adapters, and make other adapters or models of them."
EPILOG = """
An ADAPTER is a folder or a Hub id, of this package or any other LoRA of PEFT; a MODEL is a folder or a Hub id.
A block is the LoRA update of one layer. Every block has a gate; only open blocks change the model.
Every command takes --json, for machines. Exit status: 0 done, 1 a check or a push failed, 2 bad input.
Each command has more help: gatelora inspect --help
"""
SOURCES = """
A SOURCE of images is a Hub id, a folder of images, a folder that save_to_disk wrote, or a parquet or arrow file, with
an optional :split. Labels are a ClassLabel column, strings, or numbers that --class-names
FILE names; in a folder of images they are the names of its subfolders.
Prompts, --retrieval and --knn-k are by default those of the results beside the adapter, if there are any.

  gatelora evaluate outputs/gated --id user/sketches:test --ood photo=user/photos:test --retention old=user/old:test
"""
# Control characters, which a terminal would obey, and changes of the direction of text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SECRET = re.compile(r"((?<![\w-])--\w*tok[\w-]*[ =]+)\S+|\bhf_[A-Za-z0-9]{16,}", re.IGNORECASE)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = argparse.Namespace(json="--json" in argv)
    try:
        arguments = parser().parse_args(argv)
        module, _, name = arguments.run.partition(":")
        with messages():
            report, text, status = getattr(import_module(f".{module}", __name__), name)(arguments)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, TypeError, ImportError) as error:
        report, text, status = {"error": str(error)}, None, 2
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        reason = f"{type(error).__name__}: {error}. If the input is intact, please report what PYTHONDEVMODE=1 shows."
        report, text, status = {"error": reason}, None, 2
    if text is None:
        report = {"error": printable(" ".join(report["error"].split()))}
        print(f"gatelora: {report['error']}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(report, indent=1))
    elif text is not None:
        print(printable(text))
    return status


def printable(text: str) -> str:
    """A text as it may go to a terminal: what is unsafe there as escapes such as `\\x1b`, and no tokens of the Hub."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    text = UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
    return SECRET.sub(lambda found: f"{found.group(1) or ''}***", text)


@contextmanager
def messages():
    """Within this context our log, warnings and all prints go to stderr; other libraries log only errors."""
    own, others, handler = logging.getLogger("hf_gatelora"), logging.getLogger(), logging.StreamHandler(sys.stderr)
    handler.format = lambda record: printable(f"gatelora: {record.getMessage()}")
    before = own.propagate, own.level, others.level
    own.addHandler(handler)
    own.propagate = False
    own.setLevel(logging.WARNING)
    others.setLevel(logging.ERROR)
    try:
        # Only the answer goes to stdout, whatever libraries print.
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: own.warning(message)
            yield
    finally:
        own.removeHandler(handler)
        own.propagate = before[0]
        own.setLevel(before[1])
        others.setLevel(before[2])


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises errors, for `main` to report like all others."""

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="gatelora", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: str, summary: str, epilog: str = "", more: str = "") -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}.{more}"
        command = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=raw)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help='print the answer as JSON; errors as {"error": ...}')
        return command

    command = add("doctor", "doctor:doctor", "which layers of a model would get a gated block, and what runs here")
    command.add_argument("model", metavar="MODEL", nargs="?", help="Hub id or folder; its weights are not loaded")
    command.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="as in LoraConfig; default: hf_gatelora.lora_targets(model)"
    )
    command.add_argument(
        "--budget", type=_budget, help='fraction of the blocks to keep open, or JSON {"regex": fraction}; default 0.05'
    )
    command.add_argument("--rank", type=_positive, help="of LoRA; default 16")

    command = add("inspect", "inspect:inspect", "the blocks of an adapter or checkpoint: open ones, scores and sizes")
    command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of an adapter or checkpoint")
    command.add_argument("other", metavar="OTHER", nargs="?", help="a second one: also report which blocks both have")
    command.add_argument("--map", metavar="PNG", help="also draw the scores of all blocks (the gate map) to this file")

    command = add("evaluate", "evaluate:evaluate", "measure an adapter beside its base: ID, OOD, retention", SOURCES)
    command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    _base(command)
    command.add_argument("--id", metavar="SOURCE", help="images like those it was tuned on, not seen in training")
    named: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME=SOURCE"}
    command.add_argument("--ood", **named, help="sets with the same classes in another domain")
    command.add_argument("--retention", **named, help="sets of what the base could do before")
    command.add_argument("--bank", **named, help="labelled images for the k-NN measurement of the set of that name")
    command.add_argument(
        "--head-label-map",
        **{**named, "metavar": "NAME=FILE"},
        help="JSON {class of that retention set: output of the published head}",
    )
    command.add_argument("--wise", type=float, nargs="+", default=[], metavar="SCALE", help="also measure at scales")
    prompts = command.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help='CLIP: class prompt; default "a photo of a {}"')
    prompts.add_argument("--templates", choices=("simple", "openai"), help="CLIP: an ensemble of prompts instead")
    command.add_argument(
        "--retrieval",
        action=argparse.BooleanOptionalAction,
        help="CLIP: measure ID and OOD sets that have captions by retrieval",
    )
    command.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    command.add_argument(
        "--class-names",
        "--class_names",
        metavar="FILE",
        help="classes of the ID and OOD sets, by which numbers in the label column are named: one name per line, or a "
        "JSON list or {number: name}",
    )
    command.add_argument("--caption-column", default="caption", metavar="NAME", help="default: caption")
    command.add_argument("--knn-k", type=_positive, metavar="K", help="neighbours that vote; default 20")
    command.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default 64")
    command.add_argument("--device", help="default: a GPU if there is one")
    command.add_argument(
        "--output",
        metavar="FILE",
        help="results file; default: results.jsonl in the adapter's folder. Rows of the "
        "same measurements are replaced, others stay; what cannot be compared with the new rows is dropped, and named",
    )

    more = "\nBefore the freeze this is the model of that moment: its gates stay as they are, no budget is applied."
    summary = "write a checkpoint as a stock adapter of the blocks that are open in it"
    command = add("fold", "adapters:fold", summary, more=more)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, from before or after the freeze")
    _output(command)

    command = add("merge", "adapters:merge", "write the base model with an adapter merged into it, and its processor")
    command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    _output(command)
    _base(command)
    command.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: that of the base"
    )

    command = add("wise", "adapters:wise", "write an adapter between the base (scale 0) and itself (1): WiSE-FT")
    command.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    command.add_argument("scale", metavar="SCALE", type=float, help="from 0 to 1")
    _output(command)
    _base(command, "needed if the adapter has a head")

    command = add("combine", "adapters:combine", "write the weighted sum of two or more adapters, on all their blocks")
    weighted: dict[str, Any] = {"metavar": "ADAPTER[=WEIGHT]", "help": "weight: default 1, may be negative"}
    command.add_argument("first", **weighted)
    command.add_argument("others", **weighted, nargs="+")
    _output(command)
    _base(command, "needed if adapters have heads whose weights do not sum to 1")

    command = add("card", "adapters:card", "write the model card of an adapter again, from the files in its folder")
    command.add_argument("adapter", metavar="ADAPTER", help="folder")
    _metadata(command)

    more = "\nOnly files that gatelora, PEFT or the processor writes are uploaded."
    command = add("push", "adapters:push", "put an adapter on the Hub, with its card", more=more)
    command.add_argument("adapter", metavar="ADAPTER", help="folder")
    command.add_argument("repo", metavar="REPO", help="user/name")
    _metadata(command)
    command.add_argument("--private", action="store_true", default=None, help="if the repository is new")
    command.add_argument("--revision", metavar="BRANCH", help="default: main")
    command.add_argument("--message", metavar="TEXT", help="of the commit")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")
    return top


def _base(command: argparse.ArgumentParser, when: str = "default: the one that the adapter names") -> None:
    command.add_argument("--model", metavar="MODEL", help=f"folder or Hub id of the base model; {when}")


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", metavar="OUTPUT", help="folder to write; must be empty, or written by this command")
    command.add_argument("--force", action="store_true", help="replace another adapter or model in OUTPUT")


def _metadata(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", metavar="ID", help="Hub id of the base model, if a local copy of it was trained on")
    command.add_argument("--license", metavar="ID", help="of the adapter, such as mit; default: that of the base model")


def _budget(text: str) -> float | dict[str, float]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float, dict)):
        raise argparse.ArgumentTypeError(f'{text!r} is neither a number nor JSON such as {{"vision": 0.1, "text": 0}}')
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
