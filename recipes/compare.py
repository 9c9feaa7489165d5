"""Compare methods over seeds: one table of means, one figure of what was gained against what was kept.

    accelerate launch recipes/compare.py clip CONFIG.yaml --seeds 0 1 2 --methods lora random gated --wise 0.5 0.75

The configuration and its fields are those of the recipe that is named first, `clip` or `dinov2`. Every method is an
ordinary run of that recipe, in OUTPUT_DIR/seed-N/METHOD. What is finished is not run again, so a comparison that was
stopped goes on where it was; `--report` only draws what is there. Writes results.jsonl, comparison.md and frontier.png.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from common import METHODS, parse_arguments
from methods import Run
from report import comparison
from tasks import named_task

from hf_gatelora import GatedLoraTrainingArguments
from hf_gatelora.card.plots import frontier
from hf_gatelora.records import RESULTS_FILE, read_results, write_results, write_text


@dataclass
class CompareArguments:
    """Over what the methods are compared."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the runs"})
    report: bool = field(default=False, metadata={"help": "run nothing: table and figure of what is finished"})


def finished_rows(output: Path) -> list[dict]:
    """Rows of all seeds and methods that are finished; of results.jsonl, where the runs are not there any more."""
    files = sorted(output.glob(f"seed-*/*/{RESULTS_FILE}"))
    # Beside a method's rows lie those of the base, which has a folder of its own.
    rows = [row for file in files for row in read_results(file) if row["method"] == file.parent.name]
    if not files and (output / RESULTS_FILE).is_file():
        rows = read_results(output / RESULTS_FILE)
    if not rows:
        raise ValueError(f"{output} has no finished runs: neither seed-N/METHOD/results.jsonl nor results.jsonl.")
    order = ["base", *METHODS]

    def place(row: dict) -> tuple:
        method, _, variant = row["method"].partition(" ")
        name, _, budget = method.partition("@")
        return order.index(name), float(budget or 0), variant, -row.get("wise", 2.0), row["seed"]

    return sorted(rows, key=place)


def write_report(output: Path) -> str:
    """Write results.jsonl, comparison.md and frontier.png from what is finished; returns the table."""
    rows = finished_rows(output)
    write_results(rows, output / RESULTS_FILE)
    text = comparison(rows)
    write_text(text + "\n", output / "comparison.md")
    frontier(rows, output / "frontier.png")
    return text


def main(argv: list[str]) -> None:
    task_class, recipe_arguments = named_task(argv)
    classes = [recipe_arguments, GatedLoraTrainingArguments, CompareArguments]
    arguments, training, compared = parse_arguments(classes, argv[1:])
    arguments.keep_finished = True
    output = Path(training.output_dir)
    for seed in [] if compared.report else compared.seeds:
        seeded = {"seed": seed, "gate_seed": seed if training.gate_kind == "hard_concrete" else training.gate_seed}
        folder = str(output / f"seed-{seed}")
        Run(task_class, arguments, replace(training, output_dir=folder, **seeded)).run()
    if PartialState().is_main_process:
        print(f"\n{write_report(output)}\n")
        print(f"Accuracies in %, mean ± sd over seeds. results.jsonl, comparison.md and frontier.png: {output}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
