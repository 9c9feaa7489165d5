"""The table of a comparison; every number comes from the rows of a results file."""

import statistics

from hf_gatelora.card.tables import markdown
from hf_gatelora.records import TITLES, label, primary


def comparison(rows: list[dict]) -> str:
    """Mean over seeds of each method as a Markdown table, with the sample standard deviation if there are several.

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
