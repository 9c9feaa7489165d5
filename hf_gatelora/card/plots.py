"""Figures of a run. Imports matplotlib only when one is drawn."""

import os
from statistics import fmean, stdev

from ..adapters.inspection import grids
from ..records import TITLES, metric_of, primary, primary_rows, replacing

# Of each method its name for people, and its colour in every figure.
METHODS = {
    "base": ("base model", "black"),
    "linear_probe": ("linear probe", "tab:brown"),
    "full": ("full fine-tuning", "tab:gray"),
    "lora": ("LoRA", "tab:blue"),
    "lora_equal": ("LoRA of equal size", "tab:cyan"),
    "random": ("random blocks", "tab:orange"),
    "gated": ("gated LoRA", "tab:red"),
}
OTHER_COLOURS = ("tab:green", "tab:purple", "tab:pink", "tab:olive")
MARKERS = "osD^vP*X"  # of the budgets and variants of one method
TOWERS, SIDE = 8, 40  # the most towers, and the most layers or modules with a label, of a gate map


def gate_map(summary: dict, path: str | os.PathLike) -> None:
    """Draw the gate map: for each tower its layers by its modules, open blocks framed.

    Open blocks are red and closed ones blue, darker the further their score ranks from the cut between them.

    Args:
        summary: as `GateController.summary` or `gates.json` gives it.
        path: PNG file, written under a temporary name and then renamed.
    """
    import numpy as np
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    blocks, tau = summary["blocks"], summary["config"]["tau"]
    block_of = {module: block for block in blocks for module in block["modules"]}
    all_towers = grids(list(block_of))
    towers = all_towers[:TOWERS]
    sides = {is_open: sorted({b["score"] for b in blocks if b["open"] == is_open}) for is_open in (False, True)}
    # From 0.2 next to the cut to 1, negative for closed blocks.
    shade = {(False, s): -1 + 0.8 * i / max(len(sides[False]) - 1, 1) for i, s in enumerate(sides[False])}
    shade |= {(True, s): 1 - 0.8 * i / max(len(sides[True]) - 1, 1) for i, s in enumerate(reversed(sides[True]))}

    width = sum(min(0.75 * len(tower.columns), 9) + 1 for tower in towers)
    height = 2.2 + min(0.38 * max(len(tower.layers) for tower in towers), 11)
    figure = _figure(min(1.6 + width, 18), height)
    axes = figure.subplots(1, len(towers), squeeze=False, width_ratios=[len(t.columns) + 0.5 for t in towers])[0]
    for axis, (tower, layers, columns, modules) in zip(axes, towers, strict=True):
        x, y = ({name: i for i, name in enumerate(names)} for names in (columns, layers))
        colours, frames = np.full((len(layers), len(columns)), np.nan), []
        for (layer, name), module in modules.items():
            block = block_of[module]
            colours[y[layer], x[name]] = shade[block["open"], block["score"]]
            if block["open"]:
                frames.append(Rectangle((x[name] - 0.46, y[layer] - 0.44), 0.92, 0.88))
        image = axis.imshow(colours, cmap="RdBu_r", vmin=-1.2, vmax=1.2, aspect="auto", origin="lower")
        axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor="black", linewidth=2), autolim=False)
        for side, names, turn in ((axis.xaxis, columns, {"rotation": 40, "ha": "right"}), (axis.yaxis, layers, {})):
            places = range(0, len(names), -(-len(names) // SIDE))
            side.set_ticks(places, [_short(names[i]) for i in places], fontsize=8, **turn)
        axis.set_ylabel("layer")
        axis.set_title(_short(tower), fontsize=9)
    budget = summary["config"].get("target_active") is not None and summary["phase"] == "consolidate"
    cut = "the budget's cut" if budget else f"τ = {tau:g}"
    labels = {-1: (False, 0), -0.2: (False, -1), 0.2: (True, 0), 1: (True, -1)}
    ticks = {place: f"{sides[side][i]:.3f}" for place, (side, i) in labels.items() if sides[side]} | {0: cut}
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("closed   ←   score, by rank   →   open", labelpad=10)
    bar.ax.set_ylim(-1, 1)
    bar.set_ticks(sorted(ticks), labels=[ticks[place] for place in sorted(ticks)], fontsize=8)
    bar.ax.axhline(0, color="black", linewidth=2)
    more = f", the first {TOWERS} of {len(all_towers)} towers" if len(all_towers) > TOWERS else ""
    of_tau = f", τ = {tau:g}" if budget else ""
    figure.suptitle(f"Gates: {summary['open']} of {summary['gates']} open (framed){of_tau}{more}", fontsize=10)
    save(figure, path)


def frontier(rows: list[dict], path: str | os.PathLike) -> None:
    """Draw ID and OOD against retention: one line per method, through the scales of its adapter (WiSE-FT).

    Args:
        rows: of a results file; of several seeds the means are drawn, with their standard deviations as bars.
        path: PNG file, written under a temporary name and then renamed.
    """
    found: dict[str, dict[float, dict[int | None, list[dict]]]] = {}
    for row in rows:
        if row["role"] in TITLES:
            scales = found.setdefault(row["method"], {})
            scales.setdefault(row.get("wise", 1.0), {}).setdefault(row.get("seed"), []).append(row)

    def point(seeds: dict[int | None, list[dict]], role: str) -> tuple[float, float]:
        """Mean and standard deviation, in percent if the values are fractions."""
        values = [value for value in (primary(rows, role) for rows in seeds.values()) if value is not None]
        unit = factor[role]
        deviation = unit * stdev(values) if len(values) > 1 else 0.0
        return (unit * fmean(values), deviation) if values else (float("nan"), 0.0)

    metrics = {role: metric_of(first[0]) for role in TITLES if (first := primary_rows(rows, role))}
    factor = {role: 100 if role in metrics and metrics[role].unit == "%" else 1 for role in TITLES}
    others = [name for name in sorted({_kind(method) for method in found}) if name not in METHODS]
    colours = {name: colour for name, (_, colour) in METHODS.items()}
    colours |= {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}
    figure = _figure(11, 4.4)
    axes = figure.subplots(1, 2)
    for axis, role in zip(axes, ("id", "ood"), strict=True):
        of_kind: dict[str, int] = {}
        for method, scales in found.items():
            kind = _kind(method)
            number = of_kind[kind] = of_kind.get(kind, -1) + 1
            colour, marker = colours[kind], "*" if kind == "base" else MARKERS[number % len(MARKERS)]
            order = sorted(scales)
            (x, x_sd), (y, y_sd) = (
                zip(*(point(scales[scale], r) for scale in order), strict=True) for r in ("retention", role)
            )
            line = "-" if len(order) > 1 else "none"
            style = {"color": colour, "marker": marker, "linestyle": line}
            axis.errorbar(x, y, y_sd, x_sd, **style, markersize=4, linewidth=1.2, elinewidth=0.7, capsize=2)
            size = 13 if kind == "base" else 9
            axis.plot(x[-1], y[-1], **style, markersize=size, zorder=3, label=name_of(method))
            for *place, scale in list(zip(x, y, order, strict=True))[-12:] if len(order) > 1 else ():
                axis.annotate(f"{scale:g}", place, (3, 3), textcoords="offset points", fontsize=6, color=colour)
        for role_of, label in (("retention", axis.set_xlabel), (role, axis.set_ylabel)):
            label(f"{TITLES[role_of]} {metrics[role_of].heading if role_of in metrics else 'was not measured'}")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    bars = "; bars: sd over seeds" if any(len(s) > 1 for scales in found.values() for s in scales.values()) else ""
    title = f"What was gained against what was kept (numbers: scale of the adapter; large dot: 1{bars})"
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def name_of(method: str) -> str:
    """A method's name for people: `gated@0.0625 sigmoid` is `gated LoRA, 6.25 % open, sigmoid`."""
    name, _, variant = method.partition(" ")
    kind, _, budget = name.partition("@")
    try:
        opened = [f"{100 * float(budget):g} % open"] if budget else []
    except ValueError:
        opened = [budget]
    return ", ".join(
        [METHODS[kind][0] if kind in METHODS else kind, *opened, *filter(None, [variant.replace("_", " ")])]
    )


def save(figure, path: str | os.PathLike) -> None:
    """Write a figure under a temporary name, then rename it."""
    with replacing(path) as temporary:
        figure.savefig(temporary)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _kind(method: str) -> str:
    return method.partition(" ")[0].partition("@")[0]


def _short(name: str) -> str:
    """A name as a label: bounded, and without the mathematics that matplotlib would read in it."""
    return (name if len(name) <= 30 else f"...{name[-27:]}").replace("$", r"\$")
