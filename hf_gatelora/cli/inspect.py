"""`gatelora inspect`, and adapters as text."""

from argparse import Namespace

from ..adapters.inspection import Adapter, grids, inspect_adapter, overlap
from .text import table


def inspect(arguments: Namespace) -> tuple[dict, str, int]:
    """Show an adapter, and what it has in common with a second one."""
    adapter = inspect_adapter(arguments.adapter)
    report, text = adapter.report(), describe(adapter)
    if arguments.map is not None:
        if adapter.summary is None:
            raise ValueError(f"{arguments.adapter} has no gates.json, so there are no scores to draw.")
        from ..card.plots import gate_map

        gate_map(adapter.summary, arguments.map)
    if arguments.other is not None:
        other = inspect_adapter(arguments.other)
        report |= {"other": other.report(), "overlap": overlap(adapter, other)}
        text = (
            f"{arguments.adapter}\n{text}\n\n{arguments.other}\n{describe(other)}\n\n{describe_overlap(adapter, other)}"
        )
    return report, text, 0


def describe(adapter: Adapter) -> str:
    """An adapter as text: counts, sizes, the gate map, and the open blocks with their scores."""
    report, summary = adapter.report(), adapter.summary
    if not adapter.modules:
        count = report["other_parameters"]
        return f"An adapter of {report['base']} with {count:,} parameters and no LoRA ({report['peft_type']})."
    lines, scale = [], ""
    if summary is not None:
        total = summary["total_steps"]
        lines.append(
            f"{summary['open']} of {summary['gates']} blocks open ({summary['active_fraction']:.1%}), phase "
            f"{summary['phase']}, step {summary['steps']}{f' of {total}' if total else ''}"
        )
        scale = f", at {summary['scale']:g} of its scale" if "scale" in summary else ""
    ranks = " and ".join(map(str, sorted({entry["rank"] for entry in adapter.modules.values()})))
    where = f"{len(adapter.modules)} modules of {report['base']}"
    lines.append(f"LoRA of rank {ranks}, alpha {report['lora_alpha']:g}, on {where}{scale}")
    of = f" of {summary['lora_parameters']:,}" if summary else ""
    names = ", ".join(report["others"][:3]) + (", ..." if len(report["others"]) > 3 else "")
    heads = f", and {report['other_parameters']:,} of {names}" if names else ""
    lines.append(f"{report['lora_parameters']:,}{of} LoRA parameters{heads}; {report['bytes']:,} bytes")
    for tower, row in report["towers"].items():
        lines.append(f"  {tower}: {row['open']}" + ("" if row["gates"] is None else f" of {row['gates']}"))
    lines += ["Blocks by layer (# open, . closed):" if summary else "Blocks by layer:", gate_map_text(adapter)]
    if summary is not None:
        frozen = summary["phase"] == "consolidate"
        lines.append(f"Open blocks, with their scores {'at the freeze' if frozen else 'now'}:")
        lines += [f"  {row['score']:+.3f}  {row['name']}" for row in summary["blocks"] if row["open"]]
        if not frozen:
            lines.append(
                f"WARNING: not frozen yet, so blocks can still open and close; {len(adapter.modules)} are in the file."
            )
        if summary["degenerate"]:
            lines.append(f"WARNING: {summary['degenerate']}")
    return "\n".join(lines)


def gate_map_text(adapter: Adapter) -> str:
    """Layers by modules: # has an open block, . a closed one."""
    shown = dict.fromkeys(adapter.modules, "#")
    if adapter.summary is not None:
        shown = {m: "#" if row["open"] else "." for row in adapter.summary["blocks"] for m in row["modules"]}
    lines = []
    for grid in grids(list(shown)):
        rows = [
            [layer, *[shown.get(grid.cells.get((layer, column), ""), "") for column in grid.columns]]
            for layer in grid.layers
        ]
        lines.append(table([[grid.tower, *grid.columns], *rows], "  "))
    return "\n".join(lines)


def describe_overlap(first: Adapter, second: Adapter) -> str:
    """What two adapters have in common, as text."""
    found = overlap(first, second)
    names = {"both": "in both", "only_first": "only in the first", "only_second": "only in the second"}
    lines = [f"Blocks in both: {len(found['both'])} ({found['share']:.1%} of those in either)"]
    rows = [[tower, *[str(row[part]) for part in names]] for tower, row in found["towers"].items()]
    total = ["all", *[str(len(found[part])) for part in names]]
    lines.append(table([["", *names.values()], *rows, *([total] if len(rows) > 1 else [])], "  "))
    lines += [f"  {name}" for name in found["both"]]
    if not found["same_base"]:
        lines.append("WARNING: they name different base models.")
    return "\n".join(lines)
