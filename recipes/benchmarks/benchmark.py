"""What gates cost and save: steps, forwards, memory, optimizer state and adapters, as ratios to PEFT LoRA.

    python recipes/benchmarks/benchmark.py --model dinov2-s --batch_size 8

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
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from benchmark_cases import INFERENCE, BenchmarkArguments, Case, new_base, now
from benchmark_plots import step_time
from peft import PeftModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser

from hf_gatelora.card.tables import markdown
from hf_gatelora.records import Results, read_results, write_results, write_text

MEBIBYTE = 2**20
# Where a step's time goes, by what the names of operations hold; the first that fits.
PARTS = {
    "attention": ("attention", "softmax"),
    "matrix products": ("mm", "convolution"),
    "norms and activations": ("layer_norm", "gelu"),
    "optimizer": ("Optimizer", "_fused_adamw", "_foreach"),
    "adding, scaling, copying": ("aten::",),
    "the rest": ("",),
}


def take_turns(work: dict[str, object], arguments: BenchmarkArguments) -> dict[str, list[float]]:
    """Seconds of each piece of work by turn, after turns that do not count: one, or three where they compile."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    warm_up = 3 if arguments.compile else 1
    for turn in range(warm_up + arguments.repeats):
        # Not always after the same neighbour.
        for name in random.Random(turn).sample(list(work), len(work)):
            started = now(arguments)
            work[name]()
            if turn >= warm_up:
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
            # glibc keeps much of what is freed in holes, twice as much of LoRA's temporaries as of others. So read at
            # its start, it gives each tensor back to the system, and the peak is that of what tensors hold.
            with (
                patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"),
                multiprocessing.get_context("spawn").Pool(1) as pool,
            ):
                found[name] = pool.apply(_peak_in_child, (name, arguments))
        else:
            found[name] = peak_memory(name, arguments)
    rows = []
    for name, (peak, steps) in found.items():
        rows.append({"method": name, "metric": "peak_bytes", "value": peak, "n": 1})
        rows.append({"method": name, "metric": "step_bytes", "value": steps, "n": 1})
        rows.append({"method": name, "metric": "step_bytes_ratio", "value": steps / found["lora"][1], "n": 1})
    return rows


def parts(case: Case, steps: int = 3) -> dict[str, float]:
    """Seconds of a step by kind of operation, as torch's profiler sees them: of a GPU where one works."""
    on_gpu = case.arguments.device != "cpu"
    case.step()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiled:
        for _ in range(steps):
            case.step()
        now(case.arguments)  # waits for the GPU
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiled.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels, whose time the operation that launched them has too
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        part = next(part for part, names in PARTS.items() if any(name in event.key for name in names))
        found[part] += microseconds / 1e6 / steps
    return found


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
    """Rows of method, metric, value and n."""
    names, smallest = arguments.cases(), f"@{min(arguments.open_fractions):g} "
    # First, because a process inherits the peak of the one that starts it.
    held = []
    if not arguments.compile or arguments.device != "cpu":  # where the peak would be the compiler's
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
    if not arguments.only:
        for name in ("lora", "search", next(name for name in names if smallest in name)):
            found = parts(cases[name])
            rows += [{"method": name, "metric": f"time of {part}", "value": found[part], "n": 1} for part in found]
    cases.clear()
    if not arguments.only:
        work = {name: Case(name, arguments, base).step for name in INFERENCE}
        seconds = take_turns(work, arguments)
        rows += [row for name in work for row in timed(name, "forward", seconds, name, "base")]
    return rows + held


def cell(row: dict | None, scale: float = 1.0, digits: int = 2) -> str:
    """A measurement for a table, with its quartiles where it has them."""
    if row is None:
        return "-"
    spread = f" ({scale * row['low']:.{digits}f} to {scale * row['high']:.{digits}f})" if "low" in row else ""
    return f"{scale * row['value']:,.{digits}f}{spread}"


def table(rows: list[dict]) -> str:
    """Two Markdown tables: training as ratios to LoRA, and running as ratios to the base."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["metric"]] = row

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
    profiled = [method for method, metrics in found.items() if f"time of {next(iter(PARTS))}" in metrics]
    if profiled:
        spent = [["ms of a step in", *profiled]]
        spent += [[part, *[cell(found[m][f"time of {part}"], 1e3, 1) for m in profiled]] for part in PARTS]
        text += "\n\n" + markdown(spent)
    if "machinery_ratio" in found.get("search", {}):
        share, blocks = found["search"]["machinery_ratio"], found["search"]["blocks"]["value"]
        text += f"\n\nOf a searching step, its {blocks} gates take {cell(share, 100, 2)} %."
    return text


def stated(arguments: BenchmarkArguments) -> dict:
    """The arguments that rows carry."""
    return {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "report")}


def measured_rows(arguments: BenchmarkArguments) -> list[dict]:
    """Measure everything; returns rows for a results file."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which tells of every start
    torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else "CPU"
    results = Results(None, model=arguments.model, seed=0, arguments=stated(arguments))
    common = {"role": "cost", "data": "random pixels", "split": "train", "device": device}
    results.extend([{**common, **row} for row in measure(arguments)])
    return results.rows


def main(argv: list[str]) -> None:
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    output = Path(arguments.output_dir)
    if not arguments.report:
        write_results(measured_rows(arguments), output / "results.jsonl")
    rows = read_results(output / "results.jsonl")
    text = table(rows)
    write_text(text + "\n", output / "benchmark.md")
    step_time(rows, output / "step_time.png")
    print(f"\n{text}\n\nMedians, with the quartiles. All files: {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
