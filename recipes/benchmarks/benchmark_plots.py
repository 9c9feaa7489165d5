"""Figures of `benchmark.py` and `scaling.py`."""

import os

from benchmark_cases import MODELS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hf_gatelora.card.plots import save


def step_time(rows: list[dict], path: str | os.PathLike) -> None:
    """Draw the time of a training step of frozen models against their open fraction, as ratios to PEFT LoRA.

    Args:
        rows: of `recipes/benchmarks/benchmark.py`; the methods are called `frozen@FRACTION PLACE`.
        path: PNG file, written under a temporary name and then renamed.
    """
    lines: dict[str, list[dict]] = {}
    levels = {}
    for row in rows:
        if row["metric"] == "step_ratio":
            name, _, rest = row["method"].partition("@")
            if rest:
                fraction, place = rest.split()
                lines.setdefault(f"{name}, {place} blocks", []).append({**row, "fraction": 100 * float(fraction)})
            else:
                levels[name] = row["value"]
    figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for label, points in lines.items():
        points.sort(key=lambda row: row["fraction"])
        fractions, values = ([row[key] for row in points] for key in ("fraction", "value"))
        (line,) = axis.plot(fractions, values, marker="o", markersize=4, label=label)
        low, high = ([row[key] for row in points] for key in ("low", "high"))
        axis.fill_between(fractions, low, high, color=line.get_color(), alpha=0.15)
    for i, (name, value) in enumerate(sorted(levels.items(), key=lambda level: level[1])):
        axis.axhline(value, color="grey", linewidth=0.8, linestyle="--")
        # Side by side, as some of them are close.
        place = (0.99 - 0.17 * (i % 2), value)
        axis.annotate(_spoken(name), place, xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom")
    axis.set_xlabel("open blocks (%)")
    axis.set_ylabel("time of a step / PEFT LoRA's")
    axis.set_title("What a frozen step costs (band: quartiles)", fontsize=10)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    save(figure, path)


def growth(points: list[tuple[dict, dict]], own: dict, path: str | os.PathLike) -> None:
    """Draw time and memory of a step against each number that was varied, one line per method.

    Args:
        points: of `scaling.py`: what each has other than the first, and its rows by method and metric.
        own: arguments of the first point.
        path: PNG file, written under a temporary name and then renamed.
    """
    labels = {"layers": "layers", "batch_size": "batch", "lora_r": "rank", "image_size": "pixels"}
    names = [key for key in labels if any(key in differing for differing, _ in points)]
    methods = list(dict.fromkeys(method for _, rows in points for method, metric in rows if metric == "step_seconds"))
    figure = Figure(figsize=(1 + 3.4 * max(len(names), 1), 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, max(len(names), 1), squeeze=False, sharey="row")
    quantities = (("step_seconds", 1, "seconds of a step"), ("step_bytes", 1 / 2**20, "MiB of a step"))
    for axes, (metric, scale, title) in zip(grid, quantities, strict=True):
        axes[0].set_ylabel(title)
        for axis, name in zip(axes, names, strict=False):
            line = [(differing, rows) for differing, rows in points if not differing or list(differing) == [name]]

            def where(differing, name=name):
                # A model has its own number of layers where the arguments give none.
                return differing.get(name, own[name]) or MODELS[own["model"]][1]

            for method in methods:
                measured = [(differing, rows[method, metric]) for differing, rows in line if (method, metric) in rows]
                at = sorted((where(differing), scale * row["value"]) for differing, row in measured)
                axis.plot(*zip(*at, strict=True), marker="o", markersize=4, linewidth=1.2, label=_spoken(method))
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            # The numbers that were measured, and decimals that can be read.
            axis.set_xticks(sorted({where(differing) for differing, _ in line}), minor=False)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
            axis.set_xlabel(labels[name])
    if names:
        grid[0][0].legend(fontsize=8)
    figure.suptitle(f"Time and memory of a training step as {own['model']} grows", fontsize=10)
    save(figure, path)


def _spoken(method: str) -> str:
    """A method's name for people: `frozen@0.05 late` is "frozen, 5 % late blocks"."""
    name, at, rest = method.partition("@")
    if not at:
        return {"lora": "LoRA"}.get(name, name)
    fraction, place = rest.split()
    return f"{name}, {100 * float(fraction):g} % {place} blocks"
