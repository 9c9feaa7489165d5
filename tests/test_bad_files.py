"""Damaged and hostile files of an adapter: each command gives one sentence and status 2, or a right result, in time."""

import json
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import FAMILIES, lora_config, randomize
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.adapters import files
from hf_gatelora.card import write
from hf_gatelora.cli import main
from hf_gatelora.records import write_results

CONFIG, WEIGHTS, GATES, RESULTS = "adapter_config.json", "adapter_model.safetensors", "gates.json", "results.jsonl"
PROCESSOR = "preprocessor_config.json"
EXPLODING = r"(\w|[a-z_.]|.)+[^a-z0-9_.]"  # takes years on the name of a module
SECONDS = 20  # of one command; the slowest takes one

COMMANDS = {
    "inspect": ["inspect", "{bad}", "{good}"],
    "fold": ["fold", "{bad}", "{new}"],
    "wise": ["wise", "{bad}", "0.5", "{new}"],
    "combine": ["combine", "{good}", "{bad}", "{new}"],
    "card": ["card", "{bad}"],
    "merge": ["merge", "{bad}", "{new}"],
    "evaluate": ["evaluate", "{bad}", "--id", "{world}/data.parquet", "--prompt", "a {{}}", "--output", "{new}"],
}


@pytest.fixture(scope="module")
def good(world, tmp_path_factory):
    """A frozen gated adapter with results and the preprocessing that it was trained with."""
    folder = tmp_path_factory.mktemp("adapters") / "good"
    model = get_peft_model(CLIPModel.from_pretrained(world / "model"), lora_config(FAMILIES["clip"]["model"]()))
    gates = attach_gates(model, GateConfig(target_active=2 / 18))
    randomize(model)
    gates.freeze()
    gates.save_folded(folder)
    row = {"role": "id", "data": "test", "split": "x", "metric": "top1", "value": 0.5, "n": 8, "seed": 0}
    write_results([{**row, "method": method} for method in ("base", "gated")], folder / RESULTS)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


class Hang(BaseException):
    """Not an Exception, which some code may catch."""


@pytest.fixture
def run(good, world, capsys, monkeypatch):
    """`run(command, bad, new, more)`: status and everything that the command printed."""
    monkeypatch.setattr(files, "MATCHING_SECONDS", 0.05)

    def hang(*_):
        raise Hang

    def command(name: str, bad: Path, new: Path, more: tuple | list = ()) -> tuple[int, str]:
        known = {"good": good, "bad": bad, "new": new, "world": world}
        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(SECONDS)
        try:
            status = main([*(word.format(**known) for word in COMMANDS[name]), *more])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return status, "".join(capsys.readouterr())

    return command


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file with other contents."""
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def field(name: str, path: str, value) -> Callable[[Path], None]:
    """A JSON file with another value at a path of keys; without the key where the value is `GONE`."""

    def mutate(folder: Path) -> None:
        data = here = json.loads((folder / name).read_text())
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
        for part in parents:
            here = here[part]
        if value is GONE:
            del here[last]
        else:
            here[last] = value
        (folder / name).write_text(json.dumps(data))

    return mutate


GONE = object()


def row(**values) -> Callable[[Path], None]:
    """A results file whose last row has other values."""

    def mutate(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
        rows[-1] = {key: value for key, value in {**rows[-1], **values}.items() if value is not GONE}
        (folder / RESULTS).write_text("\n".join(map(json.dumps, rows)))

    return mutate


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Other weights."""
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def binary(make: Callable[[dict], object] | bytes) -> Callable[[Path], None]:
    """Weights in a .bin file."""

    def mutate(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        if isinstance(make, bytes):
            (folder / "adapter_model.bin").write_bytes(make)
        else:
            torch.save(make(weights), folder / "adapter_model.bin")

    return mutate


def without(name: str, replacement: str = "") -> Callable[[Path], None]:
    """No file, or in its place a folder or a link that leads nowhere."""

    def mutate(folder: Path) -> None:
        (folder / name).unlink()
        if replacement == "folder":
            (folder / name).mkdir()
        elif replacement == "link":
            (folder / name).symlink_to("nowhere")

    return mutate


class Harmful:
    def __reduce__(self):
        return print, ("code of a file was run",)


def first(weights: dict, end: str) -> str:
    return next(key for key in weights if key.endswith(end))


GARBAGE = {
    "empty": b"",
    "null": b"null",
    "a list": b"[1]",
    "a string": b'"x"',
    "an object": b"{}",
    "half": b'{"peft_type": "LO',
    "bytes": bytes(range(256)) * 20_000,
    "UTF-16": '{"r": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deeper": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a huge number": b"9" * 100_000,
}


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A file with another text in place of one that it has."""
    return lambda folder: (folder / name).write_text(
        (folder / name).read_text(encoding="utf-8").replace(old, new), encoding="utf-8"
    )


MANY = [f"layer.{i}.fc1" for i in range(12_000)]
ESCAPE = "\x1b[2J"
LONG = "x" * 1_000_000


def garbage(name: str, says: str | None, *left_out: str) -> dict:
    """All the garbage as the contents of a file."""
    return {f"{name}: {kind}": (text(name, data), says) for kind, data in GARBAGE.items() if kind not in left_out}


def wrong(name: str, path: str, *values) -> dict:
    """Values of a field that each reader of the file refuses, naming the field."""
    return {f"{case}, wrong": (mutate, f"{name}: {path}") for case, (mutate, _) in odd(name, path, *values).items()}


def odd(name: str, path: str, *values) -> dict:
    """Values of a field with which a right result is as good as a refusal."""
    return {f"{name}: {path[:40]} = {str(v)[:20]!r}": (field(name, path, v), None) for v in values}


def wrong_row(key: str, *values) -> dict:
    """Values of a field of a row."""
    return {f"a row with {key} = {value!r}": (row(**{key: value}), key) for value in values}


# Each mutation: what happens to the folder, and what all readers of the file say (None: or they give a right result).

CONFIGS = {
    **garbage(CONFIG, CONFIG),
    "no config": (without(CONFIG), CONFIG),
    "the config is a folder": (without(CONFIG, "folder"), CONFIG),
    "the config is a link": (without(CONFIG, "link"), CONFIG),
    **wrong(CONFIG, "peft_type", GONE, "NEW", ["LORA"], None),
    **wrong(CONFIG, "base_model_name_or_path", 3, LONG, ESCAPE),
    **wrong(CONFIG, "revision", 3),
    **wrong(CONFIG, "auto_mapping", [1], {"base_model_class": 1}),
    **wrong(CONFIG, "r", "4", 0, 10**9, True),
    **wrong(CONFIG, "lora_alpha", "x", None, float("nan"), float("inf")),
    **wrong(CONFIG, "target_modules", 3, [f"layer.{i}" for i in range(100_000)]),
    **wrong(CONFIG, "alpha_pattern", ["x"], {"fc1": "x"}, dict.fromkeys(MANY, 1)),
    **wrong(CONFIG, "rank_pattern", {"fc1": 0}),
    **wrong(CONFIG, "modules_to_save", 3),
    **wrong(CONFIG, "use_dora", "yes"),
    **wrong(CONFIG, "init_lora_weights", {}),
    **odd(CONFIG, "peft_type", "LOHA"),
    **odd(CONFIG, "base_model_name_or_path", GONE, None, "/nowhere"),
    **odd(CONFIG, "auto_mapping", {"base_model_class": "pipeline"}, {"base_model_class": "ViTModel"}),
    **odd(CONFIG, "r", GONE, 60_000),
    **odd(CONFIG, "lora_alpha", GONE, 0),
    **odd(CONFIG, "lora_dropout", "x"),
    **odd(CONFIG, "target_modules", [], ["nothing"], EXPLODING, "(("),
    **odd(CONFIG, "exclude_modules", EXPLODING),
    **odd(CONFIG, "layers_pattern", EXPLODING),
    **odd(CONFIG, "modules_to_save", ["nothing"]),
    **odd(CONFIG, "bias", "all"),
    **odd(CONFIG, "use_dora", True),
    **odd(CONFIG, "init_lora_weights", "x"),
    **odd(CONFIG, "layer_replication", [[0, 10**9]]),
    **odd(CONFIG, "target_parameters", ["x"]),
    **odd(CONFIG, "trainable_token_indices", [1]),
    **odd(CONFIG, "megatron_config", {"a": 1}),
    **odd(CONFIG, "task_type", "X"),
    **odd(CONFIG, "a field of a later PEFT", 1),
}
PATTERNS = {
    "alpha_pattern explodes": (field(CONFIG, "alpha_pattern", {EXPLODING: 3}), "alpha_pattern: matching"),
    "rank_pattern explodes": (field(CONFIG, "rank_pattern", {EXPLODING: 3}), "rank_pattern: matching"),
    "alpha_pattern is no pattern": (field(CONFIG, "alpha_pattern", {"((": 3}), "alpha_pattern: '((' is not a valid"),
}
REQUIRED = ["blocks", "gates", "open", "active_fraction", "towers", "phase", "progress", "steps", "total_steps"]
REQUIRED += ["lora_parameters", "open_parameters", "config", "degenerate"]
BLOCK = {"modules": ["a"], "score": 0.1, "gate": 0.0, "open": False, "parameters": 1}
SUMMARIES = {
    **garbage(GATES, GATES),
    "gates.json is a folder": (without(GATES, "folder"), GATES),
    "gates.json is a link": (without(GATES, "link"), GATES),
    **{name: case for key in REQUIRED for name, case in wrong(GATES, key, GONE).items()},
    **{name: case for key in ("name", *BLOCK) for name, case in wrong(GATES, f"blocks.0.{key}", GONE).items()},
    **wrong(GATES, "blocks", None, [], [{"name": name, **BLOCK} for name in MANY]),
    **wrong(GATES, "blocks.3", "x"),
    **wrong(GATES, "blocks.0.modules", 3, []),
    **wrong(GATES, "blocks.0.name", ESCAPE, LONG),
    **wrong(GATES, "blocks.0.score", "x"),
    **wrong(GATES, "blocks.0.gate", [1]),
    **wrong(GATES, "blocks.0.open", "yes"),
    **wrong(GATES, "blocks.0.parameters", -1),
    "gates.json: another number of gates": (field(GATES, "gates", 99), "gates is 99, but blocks has 18"),
    **wrong(GATES, "towers", [1]),
    **wrong(GATES, "towers.all", {"gates": 18}),
    **wrong(GATES, "phase", ESCAPE),
    **wrong(GATES, "active_fraction", 7),
    **wrong(GATES, "steps", -3),
    **wrong(GATES, "total_steps", "x"),
    **wrong(GATES, "config", [1], {}),
    **wrong(GATES, "base_model", [1], {"class": 1}, {"classes": [1]}),
    **wrong(GATES, "arguments", [1]),
    **wrong(GATES, "scale", 5),
    **wrong(GATES, "weights_step", "x"),
    **wrong(GATES, "transformers", "new"),
    "no gates.json": (without(GATES), None),
    **odd(GATES, "blocks.0.score", None, float("nan")),
    **odd(GATES, "base_model", None, {"class": "CLIPModel", "library": "transformers", "classes": ["a"]}),
    **odd(GATES, LONG, 1),
}
TENSORS = {
    **garbage(WEIGHTS, WEIGHTS),
    "no weights": (without(WEIGHTS), WEIGHTS),
    "the weights are a folder": (without(WEIGHTS, "folder"), WEIGHTS),
    "the weights are a link": (without(WEIGHTS, "link"), WEIGHTS),
    "weights cut off": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40]), WEIGHTS),
    "A alone": (tensors(lambda w: {k: v for k, v in w.items() if "lora_A" in k}), "are not a pair"),
    "ranks differ": (tensors(lambda w: {k: v[:2] if "lora_A" in k else v for k, v in w.items()}), "are not a pair"),
    "A is a number": (tensors(lambda w: {**w, first(w, "lora_A.weight"): torch.tensor(1.0)}), "is not a matrix"),
    "keys with escapes": (tensors(lambda w: {ESCAPE + k: v for k, v in w.items()}), "control characters"),
    "long keys": (tensors(lambda w: {k + LONG[:9_999]: v for k, v in w.items()}), WEIGHTS),
    "many tensors": (tensors(lambda w: {f"{i}": torch.ones(1) for i in range(41_000)}), "more than 40,000 tensors"),
    "no tensors": (tensors(lambda w: {}), None),
    "A of another width": (
        tensors(lambda w: {k: v[:, :3].contiguous() if "lora_A" in k else v for k, v in w.items()}),
        None,
    ),
    "integers": (tensors(lambda w: {k: v.int() for k, v in w.items()}), None),
    "a module of no model": (tensors(lambda w: {k.replace("fc", "no"): v for k, v in w.items()}), None),
    "a head of no model": (tensors(lambda w: {**w, "base_model.model.head": torch.ones(2)}), None),
    "a magnitude": (tensors(lambda w: {**w, first(w, "A.weight")[:-8] + "magnitude_vector": torch.ones(4)}), None),
    "bin": (binary(lambda w: w), None),
    "bin: empty": (binary(b""), "adapter_model.bin"),
    "bin: bytes": (binary(bytes(range(256))), "adapter_model.bin"),
    "bin: half a zip": (binary(b"PK\x03\x04" + b"\0" * 100), "adapter_model.bin"),
    "bin: code": (binary(pickle.dumps(Harmful())), "adapter_model.bin"),
    "bin: code in a zip": (binary(lambda w: Harmful()), "adapter_model.bin"),
    "bin: a list": (binary(lambda w: list(w.values())), "adapter_model.bin"),
    "bin: numbers": (binary(lambda w: dict.fromkeys(w, 1)), "adapter_model.bin"),
    "bin: numbers as keys": (binary(lambda w: dict(enumerate(w.values()))), "adapter_model.bin"),
    "bin: views": (binary(lambda w: {k: v[:1, :1].expand(10**6, 10**6) for k, v in w.items()}), "larger than the file"),
}
NOT_FINITE = {"NaN": (tensors(lambda w: {k: v * float("nan") for k, v in w.items()}), "weights are not finite")}
ROWS = {
    **garbage(RESULTS, RESULTS, "empty"),
    "results.jsonl is a folder": (without(RESULTS, "folder"), RESULTS),
    "results.jsonl is a link": (without(RESULTS, "link"), RESULTS),
    **{
        f"a row without {key}": (row(**{key: GONE}), key)
        for key in ("method", "role", "data", "split", "metric", "value", "n")
    },
    **wrong_row("method", 5),
    **wrong_row("role", "x"),
    **wrong_row("data", None, ESCAPE),
    **wrong_row("split", []),
    **wrong_row("metric", 1),
    **wrong_row("value", "x", None, True),
    **wrong_row("n", -1, 0.5),
    **{name: case for key in ("seed", "wise", "step", "frozen") for name, case in wrong_row(key, "x").items()},
    **{name: case for key in ("dataset", "arguments", "versions", "model") for name, case in wrong_row(key, 5).items()},
    "a row is a list": (text(RESULTS, "[1]\n"), RESULTS),
    "no results.jsonl": (without(RESULTS), None),
    "results.jsonl: empty": (text(RESULTS, ""), None),
    "blank lines": (edited(RESULTS, "\n", "\n\n"), None),
    "U+2028": (edited(RESULTS, '"x"', '"a\u2028b"'), None),
    "a row without seed": (row(seed=GONE), None),
    "value NaN": (row(value=float("nan")), None),
    "two methods": (row(method="other", seed=3), None),
}
TRAINED_WITH = {
    **garbage(PROCESSOR, "its processor cannot be read", "an object"),
    "no processor": (without(PROCESSOR), None),
    "tokenizer.json: empty": (text("tokenizer.json", b""), None),
    "tokenizer.json: an object": (text("tokenizer.json", b"{}"), None),
    "processor_config.json: a list": (text("processor_config.json", b"[]"), None),
    **odd(PROCESSOR, "size", {"shortest_edge": "x"}),
}
OTHERS = {**garbage("README.md", None), **garbage("gatelora_state.safetensors", None)}
# The commands that read a file, and its mutations.
GROUPS = [
    (list(COMMANDS), {**CONFIGS, **SUMMARIES, **TENSORS}),
    ([name for name in COMMANDS if name != "card"], PATTERNS),
    (["fold", "wise", "combine", "merge", "evaluate"], NOT_FINITE),
    (["fold", "wise", "card", "evaluate"], ROWS),
    (["merge", "evaluate"], TRAINED_WITH),
    (["card", "fold"], OTHERS),
]
CASES = {name: (commands, *case) for commands, cases in GROUPS for name, case in cases.items()}

BASE = "config.json"
BASES = {
    **garbage(BASE, ""),
    **odd(BASE, "vision_config.num_hidden_layers", 10**9, -1, "x"),
    **odd(BASE, "vision_config.patch_size", 0),
    **odd(BASE, "vision_config.hidden_size", "x", 10**9),
    **odd(BASE, "architectures", 3, ["pipeline"]),
    **odd(BASE, "model_type", "x", 3),
    **odd(BASE, "auto_map", {"AutoConfig": "code.Config"}),
    "no weights": (without("model.safetensors"), None),
    **garbage("model.safetensors", None),
    **garbage("tokenizer.json", None),
}


def test_the_unchanged_folder(good, run, tmp_path):
    """What the mutations are measured against."""
    for name in COMMANDS:
        status, said = run(name, bad=good, new=tmp_path / name)
        assert status == 0, said


def check(status: int, said: str, new: Path) -> None:
    assert status in (0, 2), said
    assert "Traceback" not in said
    assert "code of a file" not in said
    assert "\x1b" not in said
    if status == 2:
        assert len(said) < 1_200, f"{len(said)} characters"
        assert not new.exists()


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about what the files hold
@pytest.mark.parametrize("mutation", CASES)
def test_bad_files(mutation, good, run, tmp_path, monkeypatch):
    commands, mutate, says = CASES[mutation]
    if GATES not in mutation:  # drawing takes longer than all the rest, and reads nothing else
        monkeypatch.setattr(write, "gate_map", lambda *_: None)
    shutil.copytree(good, bad := tmp_path / "bad")
    mutate(bad)
    for name in commands:
        status, said = run(name, bad=bad, new=tmp_path / name)
        check(status, said.replace(str(tmp_path), ""), tmp_path / name)
        if says is not None:
            assert (status, says in said) == (2, True), f"{name}: {said[:1000]}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutation", BASES)
def test_bad_base_models(mutation, world, good, run, tmp_path):
    mutate, says = BASES[mutation]
    shutil.copytree(world / "model", base := tmp_path / "base")
    mutate(base)
    status, said = run("merge", bad=good, new=tmp_path / "new", more=["--model", str(base)])
    check(status, said.replace(str(tmp_path), ""), tmp_path / "new")
    assert status == 2 or says is None
