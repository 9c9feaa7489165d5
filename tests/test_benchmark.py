"""The benchmark and its sweep: every case runs, tables and figures are those of the rows, memory that of the steps."""

from types import SimpleNamespace

import matplotlib.image
import pytest
from operations import Operations, aten
from world import RECIPES

from hf_gatelora.records import read_results

# isort: split
import benchmark
import scaling
from benchmark_cases import INFERENCE, BenchmarkArguments, Case
from benchmark_plots import growth


def test_benchmark(tmp_path, monkeypatch, capsys):
    """Every case once, on one layer; the ratios are those of the rows' own seconds, the files what was trained."""
    arguments = ["--layers", "1", "--image_size", "28", "--batch_size", "1", "--repeats", "1", "--lora_r", "2"]
    arguments += ["--open_fractions", "0.5", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(benchmark, "memory", lambda names, arguments: [])  # starts a process for each case
    benchmark.main(arguments)
    rows = read_results(tmp_path / "results.jsonl")
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    frozen = [f"frozen@0.5 {place}" for place in ("random", "late", "early")]
    trained = ["full", "lora", "search", "soft search", *frozen]
    assert {method for method, metric in found if metric == "step_ratio"} == {"frozen forward", *trained}
    assert {method for method, metric in found if metric == "forward_ratio"} == set(INFERENCE)
    for method in trained:
        ratio = found[method, "step_seconds"] / found["lora", "step_seconds"]
        assert found[method, "step_ratio"] == pytest.approx(ratio)
    # AdamW holds two numbers per parameter; a folded adapter holds the open blocks and the head, and nothing else.
    head = 4 * (2 * 384 * 100 + 100)
    for method in ("lora", "search", *frozen):
        size = found[method, "trained_bytes"]
        gates = found["search", "blocks"] * 4 if method == "search" else 0
        assert found[method, "adapter_bytes"] <= 1.02 * (size - gates) + found[method, "header_bytes"]
        assert 0 <= found[method, "optimizer_bytes"] - 2 * size <= 4 * 20
    assert found["frozen@0.5 random", "trained_bytes"] < found["lora", "trained_bytes"]
    assert found["frozen@0.5 late", "trained_bytes"] == head + 4 * 2 * (2 * 384 + 2 * (384 + 1536))
    table = (tmp_path / "benchmark.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"| {method} " in table for method in (*trained, *INFERENCE))
    assert matplotlib.image.imread(tmp_path / "step_time.png").std() > 0.02
    # Where the time goes: what the profiler saw is no more than there was, and most of it.
    for method in ("lora", "search", "frozen@0.5 random"):
        spent = [found[method, f"time of {part}"] for part in benchmark.PARTS]
        assert min(spent) >= 0
        assert spent[list(benchmark.PARTS).index("matrix products")] > 0


def test_the_benchmark_refuses_unknown_cases():
    with pytest.raises(ValueError, match="'lor' is no case: give some of frozen forward, full, lora, search"):
        BenchmarkArguments(only=["search", "lor"])


def test_the_benchmarks_memory_is_that_of_its_steps():
    """What a step holds grows with the batch: measured here, in this process."""
    arguments = BenchmarkArguments(layers=1, image_size=112, device="cpu", batch_size=16)
    peak, step = benchmark.peak_memory("lora", arguments)
    assert peak > step > 10 * benchmark.MEBIBYTE


def test_the_benchmarks_memory_is_that_of_tensors():
    """A searching step saves for backward what LoRA's saves; holes that an allocator leaves are no difference."""
    arguments = BenchmarkArguments(layers=2, image_size=224, batch_size=4, device="cpu")
    rows = benchmark.memory(["lora", "search"], arguments)
    found = {row["method"]: row["value"] for row in rows if row["metric"] == "step_bytes_ratio"}
    assert 0.9 < found["search"] < 1.1


def test_the_benchmarks_cases_share_what_is_frozen():
    """A copy that is dropped again would be the peak of a process whose steps need less."""
    arguments = BenchmarkArguments(layers=1, image_size=28, device="cpu")
    base = benchmark.new_base(arguments)
    with Operations() as building:
        case = Case("lora", arguments, base)
    assert not building.seen[aten.clone, base.dinov2.encoder.layer[0].mlp.fc1.weight.shape]
    weight = base.dinov2.encoder.layer[0].mlp.fc1.weight
    own = case.model.get_base_model().dinov2.encoder.layer[0].mlp.fc1.base_layer.weight
    assert own.data_ptr() == weight.data_ptr()
    assert weight.requires_grad
    assert not own.requires_grad


def test_scaling(tmp_path, monkeypatch, capsys):
    """One line per point, of its own rows; a second run measures only what is new."""

    def measured(point):
        asked.append((point.batch_size, point.lora_r))
        row = {"arguments": benchmark.stated(point), "n": 1}
        values = {("lora", "step_seconds"): point.batch_size, ("lora", "step_ratio"): 1.0}
        values |= {("lora", "step_bytes"): 2**20 * point.lora_r, ("search", "blocks"): 6}
        values |= {("search", "step_seconds"): 0.5, ("search", "step_ratio"): 0.5 / point.batch_size}
        values |= {("search", "step_bytes"): 2**20, ("search", "step_bytes_ratio"): 1 / point.lora_r}
        values |= {("search", "machinery_ratio"): 0.01}
        return [{**row, "method": m, "metric": n, "value": value} for (m, n), value in values.items()]

    class Here:
        """In place of a process."""

        def __init__(self, *args, **kwargs):
            self.submit = lambda function, point: SimpleNamespace(result=lambda: function(point))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(scaling, "measured_rows", measured)
    monkeypatch.setattr(scaling, "ProcessPoolExecutor", Here)
    asked = []
    common = ["--batch_size", "4", "--only", "search", "--output_dir", str(tmp_path), "--vary", "lora_r=2,8"]
    scaling.main(common)
    scaling.main([*common, "batch_size=1"])
    assert asked == [(4, 16), (4, 2), (4, 8), (1, 16)]
    lines = (tmp_path / "scaling.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    assert cells[0] == ["point", "blocks", "lora: ms", "search: step", "lora: MiB", "search: memory", "gates %"]
    assert cells[1] == ["dinov2-s, batch_size 4, lora_r 16", "6", "4,000", "0.12", "16", "0.06", "1.00"]
    assert cells[3:] == [
        ["lora_r 8", "6", "4,000", "0.12", "8", "0.12", "1.00"],
        ["batch_size 1", "6", "1,000", "0.50", "16", "0.06", "1.00"],
    ]
    assert "\n".join(lines) in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "scaling.png").std() > 0.02


@pytest.mark.parametrize(
    "other", [{"layers": 3}, {"only": ["full"]}, {"batch_size": 2, "only": ["full"]}, {"model": "clip-b16"}]
)
def test_scaling_draws_what_was_measured(tmp_path, other):
    """Without the searching case, without memory of a method, and beside points that no axis can place."""
    rows = []
    for own in ({}, other):
        arguments = benchmark.stated(BenchmarkArguments(device="cpu", **{"only": ["frozen@0.25 late"]} | own))
        for metric in ("step_seconds", "step_ratio", "step_bytes"):
            rows.append({"arguments": arguments, "method": "lora", "metric": metric, "value": 1.0, "n": 1})
        rows.append({**rows[0], "arguments": arguments, "method": "frozen@0.25 late"})
    growth(scaling.by_point(rows), rows[0]["arguments"], tmp_path / "scaling.png")
    assert matplotlib.image.imread(tmp_path / "scaling.png").std() > 0


@pytest.mark.parametrize("vary", ["depth=3", "lora_r=", "lora_r=two"])
def test_scaling_refuses_what_cannot_be_varied(vary):
    with pytest.raises(ValueError, match=f"--vary {vary}: give NAME=VALUE,VALUE with numbers for model, layers"):
        scaling.ScalingArguments(vary=[vary]).points()


def test_published_benchmarks_are_those_of_their_results():
    page = (RECIPES / "README.md").read_text()
    scripts = {"benchmark_cpu": (benchmark, "step_time.png"), "benchmark_scaling": (scaling, "scaling.png")}
    folders = [path.parent for path in (RECIPES / "results").glob("benchmark_*/results.jsonl")]
    assert {folder.name for folder in folders} == set(scripts)
    for folder in folders:
        script, figure = scripts[folder.name]
        assert script.table(read_results(folder / "results.jsonl")) in page
        assert (folder / figure).is_file()
