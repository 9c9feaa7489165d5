"""`gatelora evaluate`."""

from argparse import Namespace
from pathlib import Path

from ..evaluation.adapter import evaluate_adapter
from ..evaluation.images import parse_named_sources
from ..evaluation.templates import prompt_templates
from ..records import ROLES, TITLES, label, metric_of
from .text import table


def evaluate(arguments: Namespace) -> tuple[list[dict], str, int]:
    """Measure an adapter beside its base."""
    output = arguments.output
    if output is None:
        if not Path(arguments.adapter).is_dir():
            raise ValueError(f"{arguments.adapter} is not a folder that results can be written to: give --output FILE.")
        output = Path(arguments.adapter) / "results.jsonl"
    named = {name: parse_named_sources(name, getattr(arguments, name)) for name in ("ood", "retention", "bank")}
    templates = prompt_templates(arguments.templates) if arguments.templates else None
    rows = evaluate_adapter(
        arguments.adapter,
        model=arguments.model,
        id=arguments.id,
        **named,
        head_label_map=parse_named_sources("head-label-map", arguments.head_label_map),
        templates=[arguments.prompt] if arguments.prompt else templates,
        retrieval=arguments.retrieval,
        scales=arguments.wise,
        label_column=arguments.label_column,
        class_names=arguments.class_names,
        caption_column=arguments.caption_column,
        k=arguments.knn_k,
        batch_size=arguments.batch_size,
        device=arguments.device,
        output=output,
    )
    then = "" if arguments.output else f"; gatelora card {arguments.adapter} puts it on the card"
    return rows, f"{describe_results(rows)}\n\nIn brackets the change against the base. Written to {output}{then}", 0


def describe_results(rows: list[dict]) -> str:
    """One line per set and metric, one column per method and scale."""
    lines: dict[tuple, dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: ROLES.index(row["role"])):
        line = (f"{TITLES[row['role']]} {row['data']}", metric_of(row).heading, f"{row['n']:,}")
        lines.setdefault(line, {})[label(row)] = row
    methods = list(dict.fromkeys(["base", *(method for found in lines.values() for method in found)]))

    def cell(found: dict[str, dict], method: str) -> str:
        if method not in found:
            return "not measured"
        metric, value = metric_of(found[method]), found[method]["value"]
        known = "base" in found and method != "base"
        change = f" ({metric.number(value - found['base']['value'], '+')})" if known else ""
        return f"{metric.number(value)}{change}"

    cells = [[*line, *[cell(found, method) for method in methods]] for line, found in lines.items()]
    return table([["set", "metric", "n", *methods], *cells])
