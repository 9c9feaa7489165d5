"""Compare methods over seeds: one table of means, one figure of what was gained against what was kept.

    accelerate launch recipes/comparison/compare.py clip CONFIG.yaml --seeds 0 1 2 --methods lora random gated@0.1

The configuration and its fields are those of the recipe that is named first, `clip` or `dinov2`. Every method is a run
of that recipe, in OUTPUT_DIR/seed-N/METHOD. What is finished is not run again, so a comparison that was stopped goes on
where it was; `--report` only draws what is there. Writes results.jsonl, comparison.md and frontier.png.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from controls import linear_probe, lora_equal, random_targets, train_full
from tables import comparison

sys.path.append(str(Path(__file__).parents[1]))
import train_clip
import train_dinov2

from hf_gatelora import GatedLoraTrainingArguments
from hf_gatelora.card.plots import frontier
from hf_gatelora.records import ALWAYS, RESULTS_FILE, read_results, write_results, write_text
from hf_gatelora.training.arguments import explained_errors, parse_arguments
from hf_gatelora.training.report import stated

RECIPES = {
    "clip": (train_clip, train_clip.ClipArguments),
    "dinov2": (train_dinov2, train_dinov2.ClassifierArguments),
}
METHODS = ("linear_probe", "full", "lora", "lora_equal", "random", "gated")
BUDGETED = ("gated", "random", "lora_equal")
# What a run may differ in from one whose results are kept.
NOT_OF_THE_METHOD = {"methods", "output_dir", "logging_dir", "resume_from_checkpoint", "disable_tqdm", "threads"}


@dataclass
class CompareArguments:
    """Over what the methods are compared."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the runs"})
    full_learning_rate: float = field(default=2e-4, metadata={"help": "learning rate of the method full"})
    report: bool = field(default=False, metadata={"help": "run nothing: table and figure of what is finished"})


def parse_method(method: str) -> tuple[str, float | None]:
    """`"gated@0.1"` as its name and budget; the budget is None if none is given.

    Raises:
        ValueError: if there is no such method, or it takes no budget.
    """
    name, at, budget = method.partition("@")
    try:
        if name in METHODS and (not at or name in BUDGETED):
            return name, float(budget) if at else None
    except ValueError:
        pass
    raise ValueError(
        f"--methods {method!r} is not known: use some of {', '.join(METHODS)}, with a budget as in gated@0.1 for "
        f"{', '.join(BUDGETED)}."
    )


def run_method(script, method: str, args, training: GatedLoraTrainingArguments, full_learning_rate: float) -> None:
    """Run one method with one seed, unless its folder has the results of a run with the same settings.

    Raises:
        ValueError: if the folder has results of other settings, or a control needs a budget and there is none.
    """
    name, budget = parse_method(method)
    if budget is not None:
        training.gate_target_active = budget
    if name == "full":
        training.learning_rate = full_learning_rate
    # What a run of plain LoRA needs changed to be one of the controls.
    if name == "lora_equal":
        args = lora_equal(script, args, training)
    elif name == "random":
        args = random_targets(script, args, training)
    args = replace(args, methods=[name if name in ("full", "linear_probe", "gated") else "lora"])
    file = Path(training.output_dir) / RESULTS_FILE
    if file.is_file():
        check_same(file, stated(args, training))
    elif name == "linear_probe":
        linear_probe(script, args, training)
    elif name == "full":
        train_full(script, args, training)
    else:
        script.main(args, training)


def check_same(file: Path, now: dict) -> None:
    """Check that finished results were measured with the arguments of this run."""
    now, before = json.loads(json.dumps(now)), read_results(file)[0]["arguments"]
    # What is not listed is as good as empty; earlier versions did not list all of `ALWAYS`.
    changed = [
        key
        for key in before | now
        if (before.get(key) or None) != (now.get(key) or None) and not (key in ALWAYS and key not in before)
    ]
    if changed := sorted(set(changed) - NOT_OF_THE_METHOD):
        raise ValueError(
            f"{file} was written with other settings ({', '.join(changed)}): give another --output_dir, or remove that "
            "folder to train again."
        )


def finished_rows(output: Path) -> list[dict]:
    """Rows of all seeds and methods that are finished, or those of results.jsonl if the runs are gone.

    A method's rows are called as its folder; the rows of the base, which every run has, are taken once per seed.
    """
    rows: list[dict] = []
    for file in sorted(output.glob(f"seed-*/*/{RESULTS_FILE}")):
        found = read_results(file)
        if ("base", found[0]["seed"]) not in {(row["method"], row["seed"]) for row in rows}:
            rows += [row for row in found if row["method"] == "base"]
        rows += [{**row, "method": file.parent.name} for row in found if row["method"] != "base"]
    if not rows and (output / RESULTS_FILE).is_file():
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
    if not argv or argv[0] not in RECIPES:
        found = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"Give the recipe first, one of {', '.join(RECIPES)}; found {found}.")
    script, recipe_arguments = RECIPES[argv[0]]
    classes = [recipe_arguments, GatedLoraTrainingArguments, CompareArguments]
    args, training, compared = parse_arguments(classes, argv[1:])
    if training.push_to_hub:
        raise ValueError("A comparison is not pushed: publish one of its runs with `gatelora push FOLDER REPO`.")
    for method in args.methods:
        parse_method(method)
    output = Path(training.output_dir)
    for seed in [] if compared.report else compared.seeds:
        noise = seed if training.gate_kind == "hard_concrete" else training.gate_seed
        for method in args.methods:
            run = replace(training, output_dir=str(output / f"seed-{seed}" / method), seed=seed, gate_seed=noise)
            run_method(script, method, args, run, compared.full_learning_rate)
    if PartialState().is_main_process:
        print(f"\n{write_report(output)}\n")
        print(f"Accuracies in %, mean ± sd over seeds. results.jsonl, comparison.md and frontier.png: {output}")


if __name__ == "__main__":
    with explained_errors():
        main(sys.argv[1:])
