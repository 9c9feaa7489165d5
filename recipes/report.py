"""Tables of a run's and of a comparison's results; every number comes from the rows of a results file."""

import statistics
from dataclasses import dataclass

from hf_gatelora.card.tables import markdown
from hf_gatelora.records import TITLES, label, primary

# In the results file, and left out of a run's table to keep it readable; ECE has columns of its own.
NOT_SHOWN = ("ece", *(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (5, 10)))


@dataclass
class Column:
    """A column of a run's table: its title, and the rows that it shows, by role, data and metric."""

    title: str
    role: str
    data: str | None = None
    metric: str | None = None


def table(rows: list[dict]) -> str:
    """One line per method as a Markdown table.

    Accuracies are in percent, with their change against the method `base` in points; the calibration error (ECE) is in
    percent, one number for each role.
    """
    methods = list(dict.fromkeys(label(row) for row in rows))
    columns = []
    for role, title in TITLES.items():
        measured = dict.fromkeys(
            (row["data"], row["metric"]) for row in rows if row["role"] == role and row["metric"] not in NOT_SHOWN
        )
        several = len({metric for _, metric in measured}) > 1
        columns += [
            Column(f"{title} {data}{f' {metric}' if several else ''}", role, data, metric) for data, metric in measured
        ]
    columns += [Column(f"{title} ECE", role, metric="ece") for role, title in TITLES.items()]
    costs = ["open_blocks", "trainable_parameters", "adapter_bytes", "seconds_per_step"]
    columns += [Column(metric.replace("_", " "), "cost", metric=metric) for metric in costs]

    def find(method: str, column: Column) -> list[dict]:
        return [
            row
            for row in rows
            if label(row) == method
            and row["role"] == column.role
            and column.data in (None, row["data"])
            and column.metric in (None, row["metric"])
        ]

    def cell(method: str, column: Column) -> str:
        found = find(method, column)
        if not found:
            return "-"
        if column.role == "cost":
            return " / ".join(_cost(row) for row in found)
        if column.metric == "ece":
            return f"{100 * statistics.fmean(row['value'] for row in found):.1f}"
        value = found[0]["value"]
        base = find("base", column)
        change = f" ({100 * (value - base[0]['value']):+.1f})" if base and method != "base" else ""
        return f"{100 * value:.1f}{change}"

    columns = [column for column in columns if any(find(method, column) for method in methods)]
    return markdown(
        [["method", *[column.title for column in columns]]]
        + [[method, *[cell(method, column) for column in columns]] for method in methods]
    )


def comparison(rows: list[dict]) -> str:
    """Mean over seeds of each method as a Markdown table, with the sample standard deviation where there are several.

    Accuracies are in percent. *Gain* is the part of LoRA's gain in ID accuracy over the base that a method has, *loss*
    the part of LoRA's loss in retention; both from the means, and left out where LoRA has less than a point.
    """
    found: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        found.setdefault(label(row), {}).setdefault(row["seed"], []).append(row)
    means = {method: {role: _mean(seeds, role) for role in TITLES} for method, seeds in found.items()}
    lines = [["method", "ID", "OOD", "retention", "of LoRA's gain", "of LoRA's loss", "parameters", "seeds"]]
    for method, seeds in found.items():
        line = [method, *[_spread(seeds, role) for role in TITLES]]
        for role in ("id", "retention"):
            base, lora, own = (means.get(key, {}).get(role) for key in ("base", "lora", method))
            known = None not in (base, lora, own) and method != "base"
            known = known and (lora - base if role == "id" else base - lora) >= 0.01
            line.append(f"{round(100 * (own - base) / (lora - base))} %" if known else "-")
        sizes = [r["value"] for s in seeds.values() for r in s if r["metric"] == "trainable_parameters"]
        line.append(f"{statistics.fmean(sizes):,.0f}" if sizes else "-")
        lines.append([*line, str(len(seeds))])
    return markdown(lines)


def _mean(seeds: dict[int, list[dict]], role: str) -> float | None:
    values = [value for value in (primary(rows, role) for rows in seeds.values()) if value is not None]
    return statistics.fmean(values) if values else None


def _spread(seeds: dict[int, list[dict]], role: str) -> str:
    values = [100 * value for value in (primary(rows, role) for rows in seeds.values()) if value is not None]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _cost(row: dict) -> str:
    if row["metric"] == "seconds_per_step":
        return f"{row['value']:.3f}"
    if row["metric"] == "open_blocks":
        return f"{row['value']:.0f} of {row['of']}"
    return f"{row['value']:,.0f}"
