"""Compare methods over seeds: one table of means, one figure of what was gained against what was kept.

    accelerate launch recipes/compare.py clip CONFIG.yaml --seeds 0 1 2 --methods lora random gated --wise 0.5 0.75

The configuration and its fields are those of the recipe that is named first, `clip` or `dinov2`. Every method is an
ordinary run of that recipe, in OUTPUT_DIR/seed-N/METHOD. What is finished is not run again, so a comparison that was
stopped goes on where it was; `--report` only draws what is there. Writes results.jsonl, comparison.md and frontier.png.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from common import parse_arguments
from methods import Run
from report import comparison
from tasks import named_task

from hf_gatelora import GatedLoraTrainingArguments
from hf_gatelora.evaluation.results import read_results, write_results
from hf_gatelora.hub.plots import frontier


@dataclass
class CompareArguments:
    """Over what the methods are compared."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the runs"})
    report: bool = field(default=False, metadata={"help": "run nothing: table and figure of what is finished"})


def finished_rows(output: Path) -> list[dict]:
    """Rows of all seeds and methods that are finished, in the order in which the first seed has them."""
    files = sorted(output.glob("seed-*/*/results.jsonl"), key=lambda file: file.stat().st_mtime)
    rows = [row for file in files for row in read_results(file)]
    order = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    return sorted(rows, key=lambda row: (order[row["method"]], -row.get("wise", 2.0), row["seed"]))


def write_report(output: Path) -> str:
    """Write results.jsonl, comparison.md and frontier.png from the finished runs; returns the table."""
    rows = finished_rows(output)
    if not rows:
        raise ValueError(f"{output} has no finished runs (seed-N/METHOD/results.jsonl).")
    write_results(rows, output / "results.jsonl")
    text = comparison(rows)
    temporary = output / ".comparison.md.tmp"
    temporary.write_text(text + "\n")
    os.replace(temporary, output / "comparison.md")
    frontier(rows, output / "frontier.png")
    return text


def main(argv: list[str]) -> None:
    task_class, recipe_arguments = named_task(argv)
    classes = [recipe_arguments, GatedLoraTrainingArguments, CompareArguments]
    arguments, training, compared = parse_arguments(classes, argv[1:])
    arguments.keep_finished = True
    output = Path(training.output_dir)
    for seed in [] if compared.report else compared.seeds:
        Run(task_class, arguments, replace(training, output_dir=str(output / f"seed-{seed}"), seed=seed)).run()
    if PartialState().is_main_process:
        print(f"\n{write_report(output)}\n")
        print(f"Accuracies in %, mean ± sd over seeds. results.jsonl, comparison.md and frontier.png: {output}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
