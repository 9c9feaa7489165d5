"""The tables of an adapter's card, from the rows of its `results.jsonl`."""

from collections.abc import Callable
from statistics import fmean

from tabulate import tabulate

from ..records import ECE, ROLES, TITLES, TRAINED, metric_of, primary, without_paths


def measured(rows: list[dict], method: str | None = None, wise: float | None = None) -> list[dict]:
    """Rows of ID, OOD and retention sets: of the base (`"base"`) or of the adapter, at one scale."""
    return [
        row
        for row in rows
        if row["role"] in ROLES and (row["method"] == "base") == (method == "base") and row.get("wise") == wise
    ]


def missing(rows: list[dict]) -> list[str]:
    """Titles of the roles that were not measured."""
    return [title for role, title in TITLES.items() if all(row["role"] != role for row in measured(rows))]


def results_table(rows: list[dict]) -> str:
    """ID, OOD and retention with the base beside them, one line per set and metric, without the calibration."""
    return _compare(rows, lambda metric: metric != ECE.name)


def calibration_table(rows: list[dict]) -> str | None:
    """The same for the expected calibration error; None where it was not measured."""
    known = any(row["metric"] == ECE.name for row in measured(rows))
    return _compare(rows, lambda metric: metric == ECE.name) if known else None


def _compare(rows: list[dict], wanted: Callable[[str], bool]) -> str:
    base = {(row["role"], row["data"], row["metric"]): row["value"] for row in measured(rows, "base")}
    lines = [["", "set", "metric", "base", "this adapter", "change", "n"]]
    for role, title in TITLES.items():
        found = [row for row in measured(rows) if row["role"] == role and wanted(row["metric"])]
        sets, metrics = dict.fromkeys(row["data"] for row in found), dict.fromkeys(row["metric"] for row in found)
        for metric in metrics:
            own = [row for row in found if row["metric"] == metric]
            for row in own:
                before = base.get((role, row["data"], metric))
                lines.append([title, row["data"], metric_of(row).title, *_compared(row, before), f"{row['n']:,}"])
            if 1 < len(own) == len(sets):
                befores = [base.get((role, row["data"], metric)) for row in own]
                mean = {**own[0], "value": fmean(row["value"] for row in own)}
                before = None if None in befores else fmean(befores)
                lines.append([title, "**mean**", metric_of(mean).title, *_compared(mean, before), ""])
        if not found:
            lines.append([title, "", "", "not measured", "not measured", "", ""])
    return markdown(lines, numbers_from=3)


def scales_table(rows: list[dict]) -> str | None:
    """WiSE-FT: ID, OOD and retention over the scales of the adapter; None where no scale was measured."""
    scales = sorted({row["wise"] for row in rows if 0 < row.get("wise", 0) < 1})
    if not scales:
        return None
    points = [("0 (base)", measured(rows, "base")), *((f"{s:g}", measured(rows, wise=s)) for s in scales)]
    points.append(("1 (this adapter)", measured(rows)))
    roles = [role for role in ROLES if TITLES[role] not in missing(rows)]
    lines = [["scale", *(TITLES[role] for role in roles)]]
    for name, found in points:
        values = [primary(found, role) for role in roles]
        lines.append([name, *("not measured" if value is None else f"{100 * value:.1f} %" for value in values)])
    return markdown(lines, numbers_from=1)


def data_table(rows: list[dict]) -> str:
    """Where the images came from."""
    lines, seen = [["used for", "set", "source", "revision"]], set()
    for row in sorted(rows, key=lambda row: row["role"] in ROLES):
        key = row["role"], row["data"]
        if key in seen or not (row["role"] in ROLES or key == TRAINED):
            continue
        seen.add(key)
        source, revision = without_paths(str(row["split"])) or "not stated", ""
        if "dataset" in row:
            source = f"[{source}](https://huggingface.co/datasets/{row['dataset']})"
            revision = row.get("revision", "not recorded")
        lines.append([TITLES.get(row["role"], "training"), row["data"], source, revision])
    if not any(line[3] for line in lines[1:]):
        lines = [line[:3] for line in lines]
    return markdown(lines) if len(lines) > 1 else ""


def markdown(lines: list[list[str]], numbers_from: int | None = None) -> str:
    """Lines of cells as a Markdown table that is also readable as text; the first line is the head.

    Args:
        numbers_from: the first of the columns that are aligned to the right; None: no column is.
    """
    left = len(lines[0]) if numbers_from is None else numbers_from
    align = ["left"] * left + ["right"] * (len(lines[0]) - left)
    # The head is given as a row: tabulate would widen its columns.
    rule, head, *rows = tabulate(lines, tablefmt="pipe", disable_numparse=True, colalign=align).split("\n")
    return "\n".join([head, rule.replace(":-", "--"), *rows])


def _value(row: dict, value: float | None, sign: str = "") -> str:
    if value is None:
        return "not measured"
    metric = metric_of(row)
    return metric.number(value, sign) + (f" {metric.unit}" if metric.unit and not sign else "")


def _compared(row: dict, before: float | None) -> list[str]:
    change = "" if before is None else _value(row, row["value"] - before, "+")
    return [_value(row, before), _value(row, row["value"]), change]
