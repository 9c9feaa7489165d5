"""What a recipe reports: each tuned model measured beside its base, rows in results.jsonl, one table at the end."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from ..adapters.files import module_names
from ..card.plots import frontier
from ..card.push import PushError
from ..card.tables import markdown
from ..card.write import write_card
from ..evaluation.adapter import measure_base, measure_tuned
from ..evaluation.suite import Suite, rows_of_base
from ..records import (
    ECE,
    FRONTIER,
    RECALLS,
    RESULTS_FILE,
    TITLES,
    Results,
    label,
    metric_of,
    not_default,
    write_results,
)
from .arguments import RecipeArguments
from .controller import CONTROLLER
from .pictures import report_picture
from .trainer import GatedLoraTrainingArguments

ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"
# Left out of a run's table to keep it readable; the results file has them. ECE has columns of its own.
NOT_SHOWN = (ECE.name, *(metric.name for metric in RECALLS if not metric.name.endswith("@1")))
COSTS = ("open_blocks", "trainable_parameters", "adapter_bytes", "seconds_per_step")


class StepTimer(TrainerCallback):
    """Times optimizer steps (forward to update), those before and those after the freeze of the gates.

    Attributes:
        seconds: of each step, by whether the gates were frozen before it.
    """

    def __init__(self):
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._frozen, self._start = getattr(getattr(model, CONTROLLER, None), "frozen", False), time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[self._frozen].append(time.perf_counter() - self._start)


def cost_rows(trainer: Trainer, timer: StepTimer, source: str) -> list[dict]:
    """Rows of open blocks, parameters, bytes, and median seconds per step before and after the freeze.

    Args:
        trainer: after training, with its model saved in its output folder.
        source: of the training images, as stated.
    """
    folder, gates = Path(str(trainer.args.output_dir)), getattr(trainer, "gates", None)
    is_adapter = (folder / ADAPTER_FILE).is_file()
    file = folder / (ADAPTER_FILE if is_adapter else MODEL_FILE)
    weights = load_file(file)
    rows = []
    if is_adapter:
        blocks = len(module_names(weights))
        summary = gates.summary() if gates else {"open": blocks, "gates": blocks}
        rows.append({"metric": "open_blocks", "value": summary["open"], "of": summary["gates"], "n": 1})
    parameters = sum(tensor.numel() for tensor in weights.values())
    rows.append({"metric": "trainable_parameters", "value": parameters, "n": 1})
    rows.append({"metric": "adapter_bytes", "value": file.stat().st_size, "n": 1})
    for frozen, phase in ((False, "search" if gates else "all"), (True, "consolidate")):
        if seconds := timer.seconds[frozen]:
            median = statistics.median(seconds)
            rows.append({"metric": "seconds_per_step", "value": median, "n": len(seconds), "phase": phase})
    data = {**trainer.train_dataset.origin, "classes": trainer.train_dataset.class_names}
    origin = {key: value for key, value in data.items() if value is not None}
    return [{"role": "cost", "data": "train", "split": source, **origin, **row} for row in rows]


def stated(args: RecipeArguments, training: GatedLoraTrainingArguments) -> dict:
    """The arguments that rows carry: all of the recipe's, and the training's that are not the default."""
    return {**asdict(args), **not_default(training)}


class Report:
    """Measures what a recipe trained, and the base once beside it.

    Args:
        args, training: of the recipe.
        suite: what is measured.
        base: makes the base model, untouched.
        trained_head: as for `hf_gatelora.evaluation.suite.rows_of_base`.

    Attributes:
        rows: by method, `base` first.
    """

    def __init__(
        self,
        args: RecipeArguments,
        training: GatedLoraTrainingArguments,
        suite: Suite,
        base: Callable[[], nn.Module],
        trained_head: bool = True,
    ):
        self.suite, self.base, self.trained_head, self.wise = suite, base, trained_head, args.wise
        self.output, self.device, self.writes = (
            Path(str(training.output_dir)),
            training.device,
            training.process_index == 0,
        )
        self.common = {"model": args.model, "seed": training.seed, "arguments": stated(args, training)}
        self.rows: dict[str, list[dict]] = {}

    def start(self, method: str) -> Path:
        """The folder of a method, without results of an earlier run. Says which method trains now."""
        if self.writes:
            print(f"\n{method}: training in {self.output / method}")
            (self.output / method / RESULTS_FILE).unlink(missing_ok=True)
        return self.output / method

    def measure(self, method: str, model: nn.Module, costs: Sequence[dict] = (), suite: Suite | None = None) -> None:
        """Measure a tuned model, at the scales of `--wise` too, and write its rows to its folder. Collective.

        Args:
            costs: of `cost_rows`.
            suite: another suite for this model alone.
        """
        model = model.to(self.device)
        if not self.rows:
            rows = measure_base(self.suite, model, lambda: self.base().to(self.device))
            self._add("base", rows_of_base(rows, self.trained_head))
        scales = self.wise if isinstance(model, PeftModel) else []
        self._add(method, [*measure_tuned(suite or self.suite, model, method, scales), *costs])
        if self.writes:  # with the base's rows, so that the folder can be read and published by itself
            write_results([*self.rows["base"], *self.rows[method]], self.output / method / RESULTS_FILE)

    def _add(self, method: str, rows: list[dict]) -> None:
        results = Results(None, **self.common)
        results.extend([{"method": method, **row} for row in rows])
        self.rows[method] = results.rows

    def publish(self, trainer: Trainer) -> None:
        """Write the card of what a trainer saved, and push it if `push_to_hub` is on; a push that fails says so."""
        if self.writes:
            write_card(folder := str(trainer.args.output_dir))
            if self.wise:
                report_picture(trainer, Path(folder) / FRONTIER)
        if trainer.args.push_to_hub:
            try:
                trainer.push_to_hub()
            except PushError as error:  # the other methods are still to come
                print(error)

    def finish(self) -> None:
        """Write results.jsonl, and a frontier where scales were measured; print the table."""
        if not self.writes:
            return
        rows = [row for found in self.rows.values() for row in found]
        write_results(rows, self.output / RESULTS_FILE)
        if self.wise:
            frontier(rows, self.output / FRONTIER)
        print(f"\n{results_table(rows)}\n")
        print(f"Accuracies in %, with the change against the base. All files of the run: {self.output}")


def results_table(rows: list[dict]) -> str:
    """One line per method as a Markdown table.

    Accuracies are in percent, with their change against the method `base` in points. The calibration error (ECE) is the
    mean over the sets of each role, in percent.
    """
    found: dict[tuple, list[dict]] = {}  # by method and title of the column
    titles: dict[str, None] = {}
    for role, name in TITLES.items():
        shown = [row for row in rows if row["role"] == role and row["metric"] not in NOT_SHOWN]
        several = len({row["metric"] for row in shown}) > 1
        for row in shown:
            title = " ".join([name, row["data"], *[metric_of(row).title] * several])
            found.setdefault((label(row), title), []).append(row)
            titles[title] = None
    for wanted in (*((role, ECE.name) for role in TITLES), *(("cost", metric) for metric in COSTS)):
        title = f"{TITLES[wanted[0]]} ECE" if wanted[1] == ECE.name else wanted[1].replace("_", " ")
        for row in rows:
            if (row["role"], row["metric"]) == wanted:
                found.setdefault((label(row), title), []).append(row)
                titles[title] = None

    def cell(method: str, title: str) -> str:
        own, base = found.get((method, title)), found.get(("base", title))
        if not own:
            return "-"
        if own[0]["role"] == "cost":
            return " / ".join(map(_cost, own))
        metric, value = metric_of(own[0]), statistics.fmean(row["value"] for row in own)
        if not base or method == "base" or metric.name == ECE.name:
            return metric.number(value)
        return f"{metric.number(value)} ({metric.number(value - base[0]['value'], '+')})"

    methods = dict.fromkeys(label(row) for row in rows)
    return markdown(
        [["method", *titles], *[[method, *[cell(method, title) for title in titles]] for method in methods]]
    )


def _cost(row: dict) -> str:
    if row["metric"] == "seconds_per_step":
        return f"{row['value']:.3f}"
    if row["metric"] == "open_blocks":
        return f"{row['value']:.0f} of {row['of']}"
    return f"{row['value']:,.0f}"
