"""Figures of a run. Imports matplotlib only when one is drawn."""

import os

from ..adapters.inspection import grids
from ..records import primary, replacing


def gate_map(summary: dict, path: str | os.PathLike) -> None:
    """Draw the gate map: for each tower its layers by its modules, coloured by score, open blocks marked.

    Args:
        summary: as `GateController.summary` or `gates.json` gives it.
        path: PNG file, written under a temporary name and then renamed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    block_of = {module: block for block in summary["blocks"] for module in block["modules"]}
    towers = grids(list(block_of))
    tau = summary["config"]["tau"]
    scores = [block["score"] for block in summary["blocks"]]
    spread = max(max(scores) - tau, tau - min(scores), 0.05)
    norm = TwoSlopeNorm(tau, tau - spread, tau + spread)
    figure = Figure(
        figsize=(
            1.6 + sum(0.75 * len(tower.columns) + 1.0 for tower in towers),
            2.2 + 0.38 * max(len(tower.layers) for tower in towers),
        ),
        dpi=150,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(towers), squeeze=False, width_ratios=[len(t.columns) + 0.5 for t in towers])[0]
    for axis, (tower, layers, columns, modules) in zip(axes, towers, strict=True):
        cells = {place: block_of[module] for place, module in modules.items()}
        image = axis.imshow(
            [[cells.get((layer, name), {"score": float("nan")})["score"] for name in columns] for layer in layers],
            cmap="RdBu_r",
            norm=norm,
            aspect="auto",
            origin="lower",
        )
        for (layer, name), block in cells.items():
            if block["open"]:
                corner = (columns.index(name) - 0.46, layers.index(layer) - 0.44)
                axis.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor="black", linewidth=2))
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(layers)), layers, fontsize=8)
        axis.set_ylabel("layer")
        axis.set_title(tower, fontsize=9)
    figure.colorbar(image, ax=axes, label=f"score (tau = {tau:g})", shrink=0.9)
    figure.suptitle(f"Gates: {summary['open']} of {summary['gates']} open (framed)", fontsize=10)
    save(figure, path)


def frontier(rows: list[dict], path: str | os.PathLike) -> None:
    """Draw ID and OOD accuracy against retention: one line per method, through the scales of its adapter (WiSE-FT).

    Args:
        rows: of a results file, of one or several seeds, whose mean is drawn.
        path: PNG file, written under a temporary name and then renamed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found: dict[str, dict[float, dict[int, list[dict]]]] = {}
    for row in rows:
        if row["role"] != "cost":
            scales = found.setdefault(row["method"], {})
            scales.setdefault(row.get("wise", 1.0), {}).setdefault(row["seed"], []).append(row)

    def mean(seeds: dict[int, list[dict]], role: str) -> float:
        values = [value for value in (primary(rows, role) for rows in seeds.values()) if value is not None]
        return 100 * sum(values) / len(values) if values else float("nan")

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (role, name) in zip(figure.subplots(1, 2), (("id", "ID"), ("ood", "OOD")), strict=True):
        for method, scales in found.items():
            if method == "base":
                continue
            points = [(mean(scales[s], "retention"), mean(scales[s], role)) for s in sorted(scales)]
            (line,) = axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=method)
            axis.plot(*points[-1], marker="o", markersize=9, color=line.get_color())
        if "base" in found:
            (seeds,) = found["base"].values()
            base = mean(seeds, "retention"), mean(seeds, role)
            axis.plot(*base, marker="*", markersize=13, color="black", linestyle="none", label="base")
        axis.set_xlabel("retention accuracy (%)")
        axis.set_ylabel(f"{name} accuracy (%)")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle("What was gained against what was kept (large dot: the adapter at scale 1)", fontsize=10)
    save(figure, path)


def save(figure, path: str | os.PathLike) -> None:
    """Write a figure under a temporary name, then rename it."""
    with replacing(path) as temporary:
        figure.savefig(temporary)
