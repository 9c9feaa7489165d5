"""The tables of an adapter's card, from the rows of its `results.jsonl`, and how text gets into a card."""

import json
import re
from collections.abc import Callable
from statistics import fmean

from tabulate import tabulate

from ..records import ECE, ROLES, TITLES, TRAINED, metric_of, primary, primary_rows, without_paths

LIMIT = 100  # lines of a table or list of a card; what is more is counted


def measured(rows: list[dict], method: str | None = None, wise: float | None = None) -> list[dict]:
    """Rows of ID, OOD and retention sets: of the base (`"base"`) or of the adapter, at one scale."""
    return [
        row
        for row in rows
        if row["role"] in ROLES and (row["method"] == "base") == (method == "base") and row.get("wise") == wise
    ]


def missing(rows: list[dict]) -> list[str]:
    """Titles of the roles that were not measured."""
    roles = {row["role"] for row in measured(rows)}
    return [title for role, title in TITLES.items() if role not in roles]


def results_table(rows: list[dict]) -> str:
    """ID, OOD and retention beside the base, one line per set and metric, without the calibration error."""
    return _compare(rows, lambda metric: metric != ECE.name)


def calibration_table(rows: list[dict]) -> str | None:
    """The same for the expected calibration error; None if it was not measured."""
    known = any(row["metric"] == ECE.name for row in measured(rows))
    return _compare(rows, lambda metric: metric == ECE.name) if known else None


def _compare(rows: list[dict], wanted: Callable[[str], bool]) -> str:
    base = {(row["role"], row["data"], row["metric"]): row["value"] for row in measured(rows, "base")}
    found: dict[str, dict[str, list[dict]]] = {role: {} for role in ROLES}
    for row in measured(rows):
        if wanted(row["metric"]):
            found[row["role"]].setdefault(row["metric"], []).append(row)
    lines = [["", "set", "metric", "base", "this adapter", "change", "n"]]
    for role, metrics in found.items():
        sets = {row["data"] for own in metrics.values() for row in own}
        left = LIMIT
        for own in list(metrics.values())[:LIMIT]:
            befores = [base.get((role, row["data"], row["metric"])) for row in own]
            for row, before in zip(own[:left], befores, strict=False):
                lines.append([TITLES[role], text(row["data"]), *_compared(row, before), f"{row['n']:,}"])
            left -= len(own[:left])
            if 1 < len(own) == len(sets):
                mean = {**own[0], "value": fmean(row["value"] for row in own)}
                known = [value for value in befores if value is not None]
                before = fmean(known) if len(known) == len(befores) else None
                lines.append([TITLES[role], "**mean**", *_compared(mean, before), ""])
        if more := sum(map(len, metrics.values())) - (LIMIT - left):
            lines.append([TITLES[role], f"*{more:,} more*", *[""] * 5])
        if not metrics:
            lines.append([TITLES[role], "", "", "not measured", "not measured", "", ""])
    return markdown(lines, numbers_from=3)


def scales_table(rows: list[dict]) -> str | None:
    """WiSE-FT: ID, OOD and retention over the scales of the adapter; None if no scale was measured."""
    scales: dict[float, list[dict]] = {}
    for row in rows:
        if row["role"] in ROLES and row["method"] != "base" and 0 < row.get("wise", 0) < 1:
            scales.setdefault(row["wise"], []).append(row)
    if not scales:
        return None
    points = [("0 (base)", measured(rows, "base")), *((f"{s:g}", scales[s]) for s in sorted(scales)[:LIMIT])]
    points.append(("1 (this adapter)", measured(rows)))
    roles = [role for role in ROLES if TITLES[role] not in missing(rows)]
    lines = [["scale", *(TITLES[role] for role in roles)]]
    for name, found in points:
        lines.append([name])
        for role in roles:
            chosen = primary_rows(found, role)
            lines[-1].append(_value(chosen[0], primary(found, role)) if chosen else "not measured")
    return markdown(lines, numbers_from=1)


def data_table(rows: list[dict]) -> str:
    """Where the images came from."""
    lines, seen = [["used for", "set", "source", "revision"]], set()
    for row in sorted(rows, key=lambda row: row["role"] in ROLES):
        key = row["role"], row["data"]
        if key in seen or not (row["role"] in ROLES or key == TRAINED):
            continue
        seen.add(key)
        source, revision = text(without_paths(row["split"])) or "not stated", ""
        if "dataset" in row:
            source = f"[{source}](https://huggingface.co/datasets/{text(row['dataset'])})"
            revision = text(row.get("revision", "not recorded"))
        lines.append([TITLES.get(row["role"], "training"), text(row["data"]), source, revision])
        if len(seen) == LIMIT:
            break
    if not any(line[3] for line in lines[1:]):
        lines = [line[:3] for line in lines]
    return markdown(lines) if len(lines) > 1 else ""


def markdown(lines: list[list[str]], numbers_from: int | None = None) -> str:
    """Lines of cells in Markdown as a table that is also readable as text; the first line is the head.

    Args:
        numbers_from: the first of the columns that are aligned to the right; None: no column is.
    """
    left = len(lines[0]) if numbers_from is None else numbers_from
    align = ["left"] * left + ["right"] * (len(lines[0]) - left)
    lines = [[re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in line] for line in lines]
    # The head is given as a row: tabulate would widen its columns.
    rule, head, *rows = tabulate(lines, tablefmt="pipe", disable_numparse=True, colalign=align).split("\n")
    return "\n".join([head, rule.replace(":-", "--"), *rows])


def text(value) -> str:
    """Text of a file as text of a card: one line of bounded length, without Markdown or HTML."""
    plain = _line(value).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", plain)  # an underscore inside a word is one


def code(value) -> str:
    """A value of a file as code of a card."""
    found = _line(value if isinstance(value, str) else json.dumps(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", found)), default=0))
    pad = " " if "`" in found else ""
    return f"{fence}{pad}{found}{pad}{fence}"


def _line(value) -> str:
    line = "".join(c if c.isprintable() else " " for c in str(value)).strip()
    return line if len(line) <= 200 else f"{line[:200]}..."


def _value(row: dict, value: float | None, sign: str = "") -> str:
    if value is None:
        return "not measured"
    metric = metric_of(row)
    return metric.number(value, sign) + (f" {text(metric.unit)}" if metric.unit and not sign else "")


def _compared(row: dict, before: float | None) -> list[str]:
    change = "" if before is None else _value(row, row["value"] - before, "+")
    return [text(metric_of(row).title), _value(row, before), _value(row, row["value"]), change]
