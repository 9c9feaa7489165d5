"""What gates cost and save: steps, forwards, memory, optimizer state and adapters, as ratios to PEFT LoRA.

    python recipes/benchmark.py --model dinov2-s --batch_size 8

All cases live in one process and take turns; every ratio is between two of the same turn. Weights and pixels are
random. Seconds are those of the processor on a CPU, which other programs on the machine disturb least, and of the clock
on a GPU. Writes results.jsonl, benchmark.md and step_time.png.
"""

import copy
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from report import markdown
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    HfArgumentParser,
)

from hf_gatelora import GateConfig, attach_gates, lora_targets
from hf_gatelora.evaluation.results import Results, read_results
from hf_gatelora.hub.plots import step_time

CLASSES = 100
# Width, layers, heads, patch size. CLIP is its vision tower with a head.
MODELS = {
    "clip-b16": (768, 12, 12, 16),
    "clip-l14": (1024, 24, 16, 14),
    "dinov2-s": (384, 12, 6, 14),
    "dinov2-b": (768, 12, 12, 14),
    "dinov2-l": (1024, 24, 16, 14),
}
PLACES = ("random", "late", "early")
# What a model is that only runs: the base, adapters beside it, an adapter merged into it.
INFERENCE = ("base", "lora, unmerged", "folded, unmerged", "folded, merged")
MEBIBYTE = 2**20


@dataclass
class BenchmarkArguments:
    """What is measured, and how often."""

    model: str = field(default="dinov2-s", metadata={"help": ", ".join(MODELS)})
    layers: int = field(default=None, metadata={"help": "another number of layers than the model's"})
    image_size: int = field(default=224, metadata={"help": "pixels"})
    batch_size: int = field(default=8, metadata={"help": "images per step"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    open_fractions: list[float] = field(
        default_factory=lambda: [0.05, 0.25, 0.5], metadata={"help": "of blocks, of the frozen models"}
    )
    dtype: str = field(default="fp32", metadata={"help": "fp32, or autocast to bf16 or fp16"})
    device: str = field(default=None, metadata={"help": "default: cuda where there is one, else cpu"})
    threads: int = field(default=1, metadata={"help": "of torch, on a CPU"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the models"})
    repeats: int = field(default=9, metadata={"help": "turns that every case takes"})
    only: list[str] = field(default_factory=list, metadata={"help": "some of the cases alone, and lora"})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "where the results go"})
    report: bool = field(default=False, metadata={"help": "run nothing: table and plot of results.jsonl"})

    def __post_init__(self):
        if self.model not in MODELS or self.dtype not in ("fp32", "bf16", "fp16"):
            raise ValueError(
                f"--model {self.model} --dtype {self.dtype}: give one of {', '.join(MODELS)}, and of fp32, bf16, fp16."
            )
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.cases()

    def cases(self) -> list[str]:
        """Names of the training cases.

        Raises:
            ValueError: where `only` names none of them.
        """
        names = ["frozen forward", "full", "lora", "search", "soft search"]
        names += [f"frozen@{fraction:g} {place}" for fraction in self.open_fractions for place in PLACES]
        if unknown := [name for name in self.only if name not in names]:
            raise ValueError(f"--only {unknown[0]!r} is no case: give some of {', '.join(names)}.")
        return [name for name in names if not self.only or name in (*self.only, "lora")]


def new_base(arguments: BenchmarkArguments) -> nn.Module:
    """The base model, with a head; the same weights at each call."""
    width, layers, heads, patch = MODELS[arguments.model]
    shape = {"hidden_size": width, "num_hidden_layers": arguments.layers or layers, "num_attention_heads": heads}
    shape |= {"image_size": arguments.image_size, "patch_size": patch}
    torch.manual_seed(0)
    if torch.device(arguments.device).index is not None:
        torch.accelerator.set_device_index(torch.device(arguments.device).index)  # whose time and memory are measured
    if arguments.model.startswith("dinov2"):
        model = Dinov2ForImageClassification(Dinov2Config(**shape, num_labels=CLASSES))
    else:
        config = CLIPConfig(vision_config={**shape, "intermediate_size": 4 * width}, num_labels=CLASSES)
        model = CLIPForImageClassification(config)
    return model.to(arguments.device)


class Case:
    """A model with its optimizer, as one way of training has it.

    Args:
        base: its weights are shared where they are frozen.
    """

    def __init__(self, name: str, arguments: BenchmarkArguments, base: nn.Module):
        self.arguments, self.gates = arguments, None
        self.model = copy.deepcopy(base)
        if name not in ("full", "folded, merged"):
            self.model.load_state_dict(base.state_dict(), assign=True)
        if name not in ("full", "frozen forward", "base"):
            self._adapt(name)
        self.trains = name not in ("frozen forward", *INFERENCE)
        if self.gates and not self.gates.frozen:
            self.optimizer = torch.optim.AdamW(self.gates.param_groups(lr=1e-5))
        elif self.trains:
            self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.model.train(self.trains)
        self._call = torch.compile(self.model) if arguments.compile else self.model
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(arguments.batch_size, 3, *[arguments.image_size] * 2, generator=generator)
        labels = torch.randint(CLASSES, (arguments.batch_size,), generator=generator)
        self._batch = {"pixel_values": pixels.to(arguments.device), "labels": labels.to(arguments.device)}

    def _adapt(self, name: str) -> None:
        rank, targets = self.arguments.lora_r, lora_targets(self.model)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=["classifier"])
        self.model = get_peft_model(self.model, config)
        if name.startswith("lora"):
            return
        kind = "sigmoid" if name == "soft search" else "straight_through"
        # Without a budget the scores say which blocks are open after the freeze.
        self.gates = attach_gates(self.model, GateConfig(kind=kind, target_active=None, lambda_=1e-6))
        if "search" in name:
            return
        fraction, place = 0.05, "random"
        if name.startswith("frozen@"):
            first, place = name.removeprefix("frozen@").split()
            fraction = float(first)
        blocks = len(self.gates.names)
        count = max(1, round(fraction * blocks))
        order = list(range(blocks))
        # Of random draws that whose earliest block, which decides how far backward goes, is in the middle of theirs.
        draws = sorted(sorted(random.Random(seed).sample(order, count)) for seed in range(99))
        chosen = {"random": draws[49], "early": order[:count], "late": order[-count:]}
        self.gates.set_scores([float(i in chosen[place]) for i in order])
        started = now(self.arguments)
        if name.startswith("folded"):
            self.model = self.gates.fold()
        else:
            self.gates.freeze()
        self.fold_seconds = now(self.arguments) - started
        if name.endswith(" merged"):
            self.model = self.model.merge_and_unload()

    def _forward(self) -> torch.Tensor:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.arguments.dtype)
        with torch.autocast(torch.device(self.arguments.device).type, dtype, enabled=dtype is not None):
            return self._call(**self._batch).loss

    def step(self) -> None:
        """A training step; a forward alone, without gradient, where nothing trains."""
        if not self.trains:
            with torch.no_grad():
                self._forward()
            return
        loss = self._forward()
        if self.gates:
            loss = loss + self.gates.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.gates:
            self.gates.step(self.gates.progress)

    def machinery(self) -> None:
        """What a searching step does for the gates' sake, without the model: their values, penalty and schedule."""
        values = torch.cat([gate(noisy=True) * 1.0 for gate in self.model.get_submodule("gates.default")])
        (values.sum() + self.gates.penalty()).backward()
        self.gates.step(self.gates.progress)
        self.optimizer.zero_grad()

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        tensors = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def now(arguments: BenchmarkArguments) -> float:
    """Seconds: of the processor on a CPU, of the clock where a GPU works."""
    if arguments.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(work: dict[str, object], arguments: BenchmarkArguments) -> dict[str, list[float]]:
    """Seconds of each piece of work by turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(arguments.repeats + 1):
        # Not always after the same neighbour.
        for name in random.Random(turn).sample(list(work), len(work)):
            started = now(arguments)
            work[name]()
            if turn:
                seconds[name].append(now(arguments) - started)
    return seconds


def timed(method: str, metric: str, seconds: dict[str, list[float]], name: str, reference: str) -> list[dict]:
    """Rows of the median seconds and of the median ratio to the reference in the same turn, with their quartiles."""
    ratios = [own / other for own, other in zip(seconds[name], seconds[reference], strict=True)]
    rows = []
    for kind, values in ((f"{metric}_seconds", seconds[name]), (f"{metric}_ratio", ratios)):
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        row = {"method": method, "metric": kind, "value": statistics.median(values), "n": len(values)}
        rows.append({**row, "low": low, "high": high})
    return rows


def peak_memory(name: str, arguments: BenchmarkArguments) -> tuple[int, int]:
    """Bytes at the peak of two steps, all of them and those beyond what was held before the first."""
    small = replace(arguments, layers=1, batch_size=1, compile=False)
    Case(name, small, new_base(small)).step()  # what libraries take at their first use
    case = Case(name, arguments, new_base(arguments))
    if arguments.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            case.step()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        case.step()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak - before


def _peak_in_child(name: str, arguments: BenchmarkArguments) -> tuple[int, int]:
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    return peak_memory(name, arguments)


def memory(names: list[str], arguments: BenchmarkArguments) -> list[dict]:
    """Rows of the peak memory; on a CPU, where only a process has a peak, each of a process of its own."""
    found = {}
    for name in names:
        if arguments.device == "cpu":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name] = pool.apply(_peak_in_child, (name, arguments))
        else:
            found[name] = peak_memory(name, arguments)
    rows = []
    for name, (peak, steps) in found.items():
        rows.append({"method": name, "metric": "peak_bytes", "value": peak, "n": 1})
        rows.append({"method": name, "metric": "step_bytes", "value": steps, "n": 1})
        rows.append({"method": name, "metric": "step_bytes_ratio", "value": steps / found["lora"][1], "n": 1})
    return rows


def adapter(case: Case, base: nn.Module) -> dict[str, float]:
    """Bytes of a case's adapter, what they are made of, and the seconds to save and to load it."""
    with tempfile.TemporaryDirectory() as folder:
        started = now(case.arguments)
        case.model.save_pretrained(folder)
        saved = now(case.arguments)
        file = Path(folder) / "adapter_model.safetensors"
        fresh = copy.deepcopy(base)
        loading = now(case.arguments)
        PeftModel.from_pretrained(fresh, folder)
        loaded = now(case.arguments)
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        found = {"adapter_bytes": file.stat().st_size, "header_bytes": header}
    trained = sum(p.nbytes for p in case.model.parameters() if p.requires_grad)
    return {**found, "trained_bytes": trained, "save_seconds": saved - started, "load_seconds": loaded - loading}


def measure(arguments: BenchmarkArguments) -> list[dict]:
    """Measure everything; returns rows of method, metric, value and n."""
    names, smallest = arguments.cases(), f"@{min(arguments.open_fractions):g} "
    # First, because a process inherits the peak of the one that starts it.
    held = memory([name for name in names if "@" not in name or smallest in name], arguments)
    base = new_base(arguments)
    cases = {name: Case(name, arguments, base) for name in names}
    work = {name: case.step for name, case in cases.items()}
    if "search" in cases:
        work["gates"] = cases["search"].machinery
    seconds = take_turns(work, arguments)
    rows = [row for name in names for row in timed(name, "step", seconds, name, "lora")]
    if "gates" in work:
        rows += timed("search", "machinery", seconds, "gates", "search")
        rows.append({"method": "search", "metric": "blocks", "value": len(cases["search"].gates.names), "n": 1})
    for name, case in cases.items():
        if case.trains:
            rows.append({"method": name, "metric": "optimizer_bytes", "value": case.optimizer_bytes(), "n": 1})
        if case.trains and name != "full":
            found = adapter(case, base)
            if name.startswith("frozen@"):
                found["fold_seconds"] = case.fold_seconds
            rows += [{"method": name, "metric": metric, "value": value, "n": 1} for metric, value in found.items()]
    cases.clear()
    if not arguments.only:
        work = {name: Case(name, arguments, base).step for name in INFERENCE}
        seconds = take_turns(work, arguments)
        rows += [row for name in work for row in timed(name, "forward", seconds, name, "base")]
    return rows + held


def table(rows: list[dict]) -> str:
    """Two Markdown tables: training as ratios to LoRA, and running as ratios to the base."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["metric"]] = row

    def cell(row: dict | None, scale: float = 1.0, digits: int = 2) -> str:
        if row is None:
            return "-"
        spread = f" ({scale * row['low']:.{digits}f} to {scale * row['high']:.{digits}f})" if "low" in row else ""
        return f"{scale * row['value']:,.{digits}f}{spread}"

    columns = {
        "step / LoRA's": ("step_ratio", 1.0, 2),
        "ms": ("step_seconds", 1e3, 0),
        "memory of a step / LoRA's": ("step_bytes_ratio", 1.0, 2),
        "MiB": ("step_bytes", 1 / MEBIBYTE, 0),
        "optimizer MiB": ("optimizer_bytes", 1 / MEBIBYTE, 2),
        "adapter KiB": ("adapter_bytes", 1 / 1024, 0),
        "save ms": ("save_seconds", 1e3, 0),
        "fold ms": ("fold_seconds", 1e3, 0),
        "load ms": ("load_seconds", 1e3, 0),
    }
    training = [["training", *columns]]
    running = [["running", "forward / base's", "ms"]]
    for method, metrics in found.items():
        if "step_ratio" in metrics:
            training.append([method, *[cell(metrics.get(m), scale, digits) for m, scale, digits in columns.values()]])
        else:
            numbers = [cell(metrics.get("forward_ratio"), 1.0, 3), cell(metrics.get("forward_seconds"), 1e3, 0)]
            running.append([method, *numbers])
    text = markdown(training)
    if len(running) > 1:
        text += "\n\n" + markdown(running)
    if "machinery_ratio" in found.get("search", {}):
        share, blocks = found["search"]["machinery_ratio"], found["search"]["blocks"]["value"]
        text += f"\n\nOf a searching step, its {blocks} gates take {cell(share, 100, 2)} %."
    return text


def main(argv: list[str]) -> None:
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    output = Path(arguments.output_dir)
    if not arguments.report:
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        torch.set_num_threads(arguments.threads)
        device = torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else "CPU"
        stated = {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "report")}
        results = Results(output / "results.jsonl", model=arguments.model, seed=0, arguments=stated)
        common = {"role": "cost", "data": "random pixels", "split": "train", "device": device}
        results.extend([{**common, **row} for row in measure(arguments)])
    rows = read_results(output / "results.jsonl")
    text = table(rows)
    temporary = output / ".benchmark.md.tmp"
    temporary.write_text(text + "\n")
    os.replace(temporary, output / "benchmark.md")
    step_time(rows, output / "step_time.png")
    print(f"\n{text}\n\nMedians, with the quartiles. All files: {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
