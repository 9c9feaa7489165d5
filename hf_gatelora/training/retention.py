"""`RetentionCallback`: ID, OOD and retention during training, as changes against the base model."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..evaluation.suite import Suite, rows_of_base
from ..records import (
    RESULTS_FILE,
    ROLES,
    Results,
    metric_of,
    not_default,
    primary,
    primary_rows,
    read_results,
    write_results,
)
from .controller import CONTROLLER
from .engines import trainer_of


def _of_set(row: dict) -> tuple:
    return row["role"], row["data"], row["split"], row["metric"]


class RetentionCallback(TrainerCallback):
    """Measures a suite at every evaluation of a Trainer, beside the base model (the adapter disabled, measured once).

    The evaluation's metrics get, for each role that the suite has sets of (`id`, `ood`, `retention`):

    * `eval_<role>`: mean over its sets of their primary metric, for instance accuracy as a fraction;
    * `eval_<role>_delta`: the same minus that of the base;
    * `eval_id_kept`, if there are ID and retention sets, and more is better on ID: ID accuracy if at most `max_loss` of
      retention is lost, else the (negative) change in retention for the worse. As `metric_for_best_model` it picks the
      best ID accuracy among the checkpoints that kept enough, and if none did the one that lost least.

    So they can be named in `metric_for_best_model`, and an `EarlyStoppingCallback` after this callback sees them. They
    are logged with one entry for each set. Evaluation takes no random numbers from the training.

    Args:
        suite: what is measured, for instance a `ClipSuite`.
        max_samples: images per set, 500; None takes all.
        max_loss: retention that may be lost for `eval_id_kept`, a fraction, 0.01.
        file: name of the results file that the rows of the base and of the last evaluation (at the end, those of the
            best model if that is loaded) are written to, in the output folder; model cards take their numbers from it.
            None writes none.
        log: called with the entries; by default the `log` of the Trainer that evaluates.
        trained_head: whether the classification head that the adapter starts from is trained, as a published or a
            fitted one is. A random head is not a base: ID and OOD sets have no base by it, and no delta. By default a
            head counts if the adapter does not bring one in `modules_to_save`.

    The base is taken to stay as it is while this object lives; in a resumed run its rows come with the checkpoint.

    Raises:
        ValueError: if a number is out of range; as the Trainer is made, if `metric_for_best_model` names what the suite
            does not measure.
    """

    def __init__(
        self,
        suite: Suite,
        max_samples: int | None = 500,
        max_loss: float = 0.01,
        file: str | None = RESULTS_FILE,
        log: Callable[[dict[str, float]], None] | None = None,
        trained_head: bool | None = None,
    ):
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples={max_samples}: give the number of images per set, at least 1, or None.")
        if not 0 <= max_loss <= 1:
            raise ValueError(f"max_loss={max_loss} is a fraction of all retention images: give a number in [0, 1].")
        self.suite = suite if max_samples is None else suite.sample(max_samples)
        self.max_loss, self.file, self.log, self.trained_head = max_loss, file, log, trained_head
        self.base: list[dict] | None = None
        self._found: dict[str, float] | None = None  # of this step's weights
        self._training = False

    def on_init_end(self, args, state, control, **kwargs):
        name = (args.metric_for_best_model or "").removeprefix("eval_").removesuffix("_delta")
        needed = {"id_kept": ("id", "retention")}.get(name, (name,) if name in ROLES else ())
        missing = [role for role in needed if role not in {data.role for data in self.suite.sets}]
        if missing:
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model!r} needs {' and '.join(missing)} sets, and the "
                "suite of RetentionCallback has none. Add one, or choose by another metric."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self._found = True, None

    def on_step_begin(self, args, state, control, **kwargs):
        self._found = None  # the weights change

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._training = False
        best = Path(state.best_model_checkpoint or ".", RESULTS_FILE)
        if self.file and args.load_best_model_at_end and state.best_model_checkpoint and best.is_file():
            self._publish(read_results(best), args, state, model)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if metrics is None or not any(key.startswith("eval_") for key in metrics):
            return  # a prediction, or an evaluation under another prefix
        if self._found is None or not self._training:  # Trainer evaluates each of several sets
            rows, entries, self._found = self._measure(model)
            if self.file:
                self._publish(self._with_base(rows, args, state, model), args, state, model)
            (self.log or trainer_of(state).log)({**entries, **self._found})
        metrics.update(self._found)

    def _with_base(self, rows: list[dict], args, state, model: PeftModel) -> list[dict]:
        """Rows of the base and of the model now, with what the results file says of each."""
        stated = {"model": model.active_peft_config.base_model_name_or_path, "seed": args.seed}
        results = Results(None, **stated, arguments={**not_default(args), **self.suite.way})
        method = "gated" if hasattr(model, CONTROLLER) else "adapter"
        results.extend([{"method": "base", **row} for row in self.base])
        gates = getattr(model, CONTROLLER, None)
        step = state.global_step if gates is None else gates.weights_step
        known = {"step": step} if gates is None else {"step": step, "frozen": gates.frozen}
        results.extend([{"method": method, **row, **known} for row in rows])
        return results.rows

    def _head_counts(self, model: PeftModel) -> bool:
        """Whether the head that the adapter started from is one that somebody trained."""
        if self.trained_head is not None:
            return self.trained_head
        return not getattr(model.active_peft_config, "modules_to_save", None)

    def _resumed_base(self, model: PeftModel, rows: list[dict]) -> list[dict] | None:
        """The base's rows that came with a checkpoint, if they are of these sets; None if there are none."""
        gates = getattr(model, CONTROLLER, None)
        base = [row for row in gates.results if row["method"] == "base"] if gates is not None else []
        wanted = {(*_of_set(row), row["n"]) for row in rows_of_base(rows, self._head_counts(model))}
        return base if wanted and wanted == {(*_of_set(row), row["n"]) for row in base} else None

    def _publish(self, rows: list[dict], args, state, model: PeftModel) -> None:
        """Write rows to the results file, and hand them to the gates, whose saves carry them along."""
        if state.is_world_process_zero and self.file:
            write_results(rows, Path(args.output_dir) / self.file)
        if hasattr(model, CONTROLLER):
            getattr(model, CONTROLLER).record(rows)

    def _measure(self, model: nn.Module) -> tuple[list[dict], dict[str, float], dict[str, float]]:
        if not isinstance(model, PeftModel):
            raise TypeError(
                f"RetentionCallback compares with the base by disabling the adapter: it needs a PeftModel, found "
                f"{type(model).__name__}."
            )
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        with torch.random.fork_rng(devices=[]):
            rows = self.suite.measure(model, "now")
            if self.base is None:
                self.base = self._resumed_base(model, rows)
            if self.base is None:
                with model.disable_adapter():
                    self.base = rows_of_base(self.suite.measure(model, "base"), self._head_counts(model))
        for parameter, value in trainable.items():  # PEFT makes every adapter trainable that it enables
            parameter.requires_grad_(value)
        before = {_of_set(row): row["value"] for row in self.base}
        entries: dict[str, float] = {}
        for row in rows:
            key = f"eval_{row['role']}/{row['data']}/{row['metric']}"
            entries[key] = row["value"]
            if _of_set(row) in before:
                entries[f"{key}_delta"] = row["value"] - before[_of_set(row)]
        means: dict[str, float] = {}
        for role in ROLES:
            now, then = primary(rows, role), primary(self.base, role)
            if now is not None:
                means[f"eval_{role}"] = now
            if now is not None and then is not None:
                means[f"eval_{role}_delta"] = now - then
        if "eval_id" in means and "eval_retention_delta" in means:
            gained, kept = (metric_of(primary_rows(rows, role)[0]) for role in ("id", "retention"))
            sign = {True: 1, False: -1, None: 0}[kept.higher_is_better]
            if sign and gained.higher_is_better and gained.unit == "%":
                change = sign * means["eval_retention_delta"]
                means["eval_id_kept"] = means["eval_id"] if change >= -self.max_loss else change
        return rows, entries, means
