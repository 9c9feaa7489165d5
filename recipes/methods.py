"""Training and measuring the methods that a recipe compares: the run from arguments to results."""

import json
import random
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from common import NOT_OF_THE_METHOD, RecipeArguments, located, parse_method
from peft import LoraConfig, PeftModel, get_peft_model
from report import table
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from hf_gatelora import GatedLoraTrainer, GatedLoraTrainingArguments, RetentionCallback, attach_gates
from hf_gatelora.adapters.export import check_scalable
from hf_gatelora.card.plots import frontier
from hf_gatelora.card.push import PushError
from hf_gatelora.card.write import write_card
from hf_gatelora.evaluation.adapter import measure_base, measure_tuned
from hf_gatelora.evaluation.images import LabelledImages, eval_sets, parse_named_sources
from hf_gatelora.evaluation.suite import EvalSet, Suite
from hf_gatelora.records import ALWAYS, RESULTS_FILE, Results, not_default, read_results, write_results
from hf_gatelora.training.engines import EngineTrainer

ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"


class Task(ABC):
    """What differs between the recipes: the base model, its preprocessing, its loss and how it is measured.

    Args:
        arguments: of the recipe.

    Attributes:
        processor: saved beside what is trained.
    """

    arguments: RecipeArguments
    processor: object

    @abstractmethod
    def base(self) -> PreTrainedModel:
        """A new copy of the base model, in fp32."""

    @abstractmethod
    def pixels(self, image) -> torch.Tensor:
        """Pixel values of one RGB image."""

    @abstractmethod
    def lora_config(self, model: PreTrainedModel, r: int, alpha: int) -> LoraConfig:
        """LoRA on all targets of the model."""

    @abstractmethod
    def suite(self, sets: list[EvalSet], batch_size: int) -> Suite:
        """How models are measured."""

    @abstractmethod
    def trainer_parts(self, data: LabelledImages) -> dict:
        """Collator and loss, as arguments of a Trainer."""

    @abstractmethod
    def linear_probe(self, data: LabelledImages, suite: Suite) -> tuple[PreTrainedModel, Suite]:
        """The base model with a linear classifier on its features, and the suite that measures it so."""

    def prepare(self, data: LabelledImages) -> None:  # noqa: B027 - most have nothing to do
        """Do what has to come before the first `base`, with the training images at hand."""


class StepTimer(TrainerCallback):
    """Times optimizer steps (forward to update), by whether `is_frozen()` before them."""

    def __init__(self, is_frozen: Callable[[], bool] = lambda: False):
        self.is_frozen = is_frozen
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def on_step_begin(self, args, state, control, **kwargs):
        self._frozen, self._start = self.is_frozen(), time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[self._frozen].append(time.perf_counter() - self._start)

    def median(self, frozen: bool) -> float:
        """Median seconds of a step before or after the freeze."""
        return statistics.median(self.seconds[frozen])


def adapted(task: Task, name: str, training: GatedLoraTrainingArguments) -> nn.Module:
    """A new model as the method trains it; for `gated` before the gates are attached.

    Raises:
        ValueError: for a method with a budget where there is none.
    """
    arguments, model = task.arguments, task.base()
    r, alpha = arguments.lora_r, arguments.lora_alpha or arguments.lora_r
    if name == "full":
        return model
    config = task.lora_config(model, r, alpha)
    if name in ("lora", "gated"):
        return get_peft_model(model, config)
    if training.gate_target_active is None:
        raise ValueError(f"--methods {name} needs a budget: give --gate_target_active.")
    # The budget as the gates would have it, tower by tower.
    gates = attach_gates(get_peft_model(task.base(), config), training.gate_config())
    if name == "lora_equal":
        # Below rank 1 LoRA does not go: with a very small budget it has more parameters than that.
        equal = max(1, round(r * sum(count for _, count in gates.budget) / len(gates.names)))
        return get_peft_model(model, task.lora_config(model, equal, max(1, round(alpha * equal / r))))
    draw = random.Random(training.seed)
    chosen = {gates.names[i] for members, count in gates.budget for i in draw.sample(members, count)}
    config.target_modules = {module for gate in chosen for module in gates.blocks[gate]}
    return get_peft_model(model, config)


def train(
    method: str, task: Task, training: GatedLoraTrainingArguments, data: LabelledImages, validation: dict[str, object]
) -> tuple[Trainer, StepTimer]:
    """Train one method; returns its trainer and step timer.

    Args:
        validation: `eval_dataset` and `callbacks` for the Trainer, or nothing.
    """
    set_seed(training.seed)
    name, _ = parse_method(method)
    model = adapted(task, name, training)
    if name == "full":  # the callback needs an adapter
        validation = {key: value for key, value in validation.items() if key != "callbacks"}
    common = {"args": training, "train_dataset": data, "processing_class": task.processor, **validation}
    common |= task.trainer_parts(data)
    if name == "gated":
        trainer = GatedLoraTrainer(model, **common)
        timer = StepTimer(lambda: trainer.gates.frozen)
    else:
        trainer = EngineTrainer(model, **common)
        timer = StepTimer()
    trainer.add_callback(timer)
    resume = training.resume_from_checkpoint
    if resume is True and not any(Path(training.output_dir).glob("checkpoint-*")):
        resume = None  # of several methods, one that has not started yet
    trainer.train(resume_from_checkpoint=resume)
    return trainer, timer


def costs(trainer: Trainer, timer: StepTimer, folder: Path, source: str, origin: dict) -> list[dict]:
    """Rows of open blocks, parameters, bytes, and seconds per step before and after the freeze.

    Args:
        source, origin: of the training images, as stated and as `LabelledImages` knows it.
    """
    gates = getattr(trainer, "gates", None)
    is_adapter = (folder / ADAPTER_FILE).is_file()
    file = folder / (ADAPTER_FILE if is_adapter else MODEL_FILE)
    weights = load_file(file)
    found = {"trainable_parameters": sum(t.numel() for t in weights.values()), "adapter_bytes": file.stat().st_size}
    rows = [{"metric": metric, "value": value, "n": 1} for metric, value in found.items()]
    if is_adapter:
        blocks = sum(key.endswith("lora_A.weight") for key in weights)
        summary = gates.summary() if gates else {"open": blocks, "gates": blocks}
        rows.insert(0, {"metric": "open_blocks", "value": summary["open"], "of": summary["gates"], "n": 1})
    for frozen, phase in ((False, "search" if gates else "all"), (True, "consolidate")):
        if n := len(timer.seconds[frozen]):
            rows.append({"metric": "seconds_per_step", "value": timer.median(frozen), "n": n, "phase": phase})
    origin = {key: value for key, value in origin.items() if value is not None}
    return [{"role": "cost", "data": "train", "split": source, **origin, **row} for row in rows]


class Run:
    """One call of a recipe: what it trains and measures, and the files it writes.

    Args:
        task_class: of the recipe.
        arguments, training: as parsed.
    """

    def __init__(self, task_class: type[Task], arguments: RecipeArguments, training: GatedLoraTrainingArguments):
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        # The labels are not always an argument of the model's forward: Trainer would drop them.
        training.remove_unused_columns, training.label_names = False, ["labels"]
        # The first look at the device is what sets the processes up, as the training arguments (use_cpu) say.
        training.dataloader_pin_memory &= training.device.type == "cuda"
        self.arguments, self.training = arguments, training
        self.finished: dict[str, list[dict]] = {}  # rows by method
        self.output, self.writes = Path(training.output_dir), training.process_index == 0
        if training.resume_from_checkpoint and training.resume_from_checkpoint.lower() == "true":
            training.resume_from_checkpoint = True  # the last checkpoint of each method
        elif training.resume_from_checkpoint and len(arguments.methods) > 1:
            raise ValueError(
                "--resume_from_checkpoint FOLDER belongs to one method: give --methods with that one, or true."
            )
        with PartialState().main_process_first():  # the first one makes the toy world
            self.task = task_class(arguments)
        self.data = self.images(arguments.train)
        self.task.prepare(self.data)
        self.suite = self.task.suite(
            [
                *self.eval_sets("id", {"test": arguments.test}),
                *self.eval_sets("ood", parse_named_sources("ood", arguments.ood)),
                *self.eval_sets("retention", parse_named_sources("retention", arguments.retention)),
            ],
            training.per_device_eval_batch_size,
        )
        self.suite.num_workers = training.dataloader_num_workers
        stated = {**asdict(arguments), **not_default(training)}
        self.common = {"model": arguments.model, "seed": training.seed, "arguments": stated}

    def images(self, source: str, class_names: list[str] | None = None) -> LabelledImages:
        """The images of a source as the model takes them."""
        captions = getattr(self.arguments, "caption_column", "caption")
        return LabelledImages(located(source), self.task.pixels, self.arguments.label_column, captions, class_names)

    def eval_sets(self, role: str, named: dict[str, str]) -> list[EvalSet]:
        """Sources as sets of the suite."""
        banks = parse_named_sources("bank", getattr(self.arguments, "bank", None)) if role == "retention" else {}
        for name, source in banks.items():
            if name not in named or named[name] == source:
                raise ValueError(
                    f"--bank {name}={source}: its name must be that of a retention set (there are {sorted(named)}), "
                    "and its images others than that set's own."
                )
        classes = None if role == "retention" else self.data.class_names
        # What it was trained for is measured.
        retrieval = role != "retention" and getattr(self.arguments, "mode", None) == "contrastive"
        return eval_sets(role, named, self.images, classes, banks, retrieval)

    def validation(self) -> dict[str, object]:
        """What evaluation during training needs; empty where none was asked for.

        Raises:
            ValueError: where nothing but test images are there to choose a model by.
        """
        if self.training.eval_strategy == "no":
            return {}
        given = self.arguments
        if given.validation is None:
            raise ValueError("--eval_strategy needs --validation: the test images are not for choosing a model.")
        (held_out,) = self.eval_sets("id", {"validation": given.validation})
        others = [
            *self.eval_sets("ood", parse_named_sources("validation_ood", given.validation_ood)),
            *self.eval_sets("retention", parse_named_sources("validation_retention", given.validation_retention)),
        ]
        watched = self.task.suite([held_out, *others], self.suite.batch_size)
        # The results file in the folder of a method says that the method is finished.
        return {"eval_dataset": held_out.images, "callbacks": [RetentionCallback(watched, file=None)]}

    def run(self) -> list[dict]:
        """Train and measure every method; returns all rows."""
        if self.arguments.keep_finished:
            for method in ("base", *self.arguments.methods):
                file = self.output / method / RESULTS_FILE
                if file.is_file():
                    self.finished[method] = [row for row in read_results(file) if row["method"] == method]
                    self.check_same(file, self.finished[method])
        for method in self.arguments.methods:
            if method not in self.finished:
                self.train_and_measure(method)
        return self.finish([row for method in ("base", *self.arguments.methods) for row in self.finished[method]])

    def check_same(self, file: Path, rows: list[dict]) -> None:
        """Check that rows of an earlier run were measured with the arguments of this one."""
        here = json.loads(json.dumps(self.common["arguments"]))
        before, now = (
            {key: value for key, value in stated.items() if key not in NOT_OF_THE_METHOD}
            for stated in (rows[0]["arguments"], here)
        )
        # What is not listed is as good as empty; earlier versions did not list all of `ALWAYS`.
        changed = sorted(
            key
            for key in before | now
            if (before.get(key) or None) != (now.get(key) or None) and not (key in ALWAYS and key not in before)
        )
        if changed:
            raise ValueError(
                f"{file} was written with other settings ({', '.join(changed)}): give another --output_dir, or leave "
                "--keep_finished out to train anew."
            )

    def train_and_measure(self, method: str) -> None:
        """Train and measure one method, and the base with it where that was not measured yet."""
        name, budget = parse_method(method)
        # This also sets the engine up anew.
        training = replace(self.training, output_dir=str(self.output / method), **self.hub_arguments(method))
        if self.writes:  # of an earlier run, not of what is trained now
            (self.output / method / RESULTS_FILE).unlink(missing_ok=True)
        if budget is not None:
            training.gate_target_active = budget
        if name == "linear_probe":
            model, suite = self.task.linear_probe(self.data, self.suite)
            self.measured(method, model.to(training.device), suite)
            return
        if name == "full":
            training.learning_rate = self.arguments.full_learning_rate
        trainer, timer = train(method, self.task, training, self.data, self.validation())
        trainer.save_model(_internal_call=True)  # without a push: that comes when the results are there
        # What was written is evaluated, as users will load it. Each process takes a part of the data.
        trainer.accelerator.wait_for_everyone()
        folder, model = self.output / method, self.task.base()
        model = type(model).from_pretrained(folder) if name == "full" else PeftModel.from_pretrained(model, folder)
        trained_on = {**self.data.origin, "classes": self.data.class_names}
        spent = costs(trainer, timer, folder, self.arguments.train, trained_on) if self.writes else []
        self.measured(method, model.to(training.device), self.suite, spent)
        if self.writes and (folder / ADAPTER_FILE).is_file():
            write_card(folder)
        if training.push_to_hub:
            try:
                trainer.push_to_hub()
            except PushError as error:  # the other methods are still to come
                print(error)

    def hub_arguments(self, method: str) -> dict:
        """Training arguments that have only gated LoRA pushed, each method's to a repository of its own."""
        gated = [name for name in self.arguments.methods if parse_method(name)[0] == "gated"]
        if not self.training.push_to_hub or method not in gated:
            return {"push_to_hub": False, "hub_token": None}
        repo = self.training.hub_model_id or self.output.absolute().name
        return {"hub_model_id": repo if len(gated) == 1 else f"{repo}-{method.replace('@', '-')}"}

    def measured(self, method: str, model: nn.Module, suite: Suite | None = None, more: list[dict] = ()) -> list[dict]:
        """Measure a model, and the base beside it where that was not done yet; returns the rows of both.

        A method's rows are written to its folder at once: the file's presence says that the method is finished.
        """
        if self.arguments.wise and isinstance(model, PeftModel):
            check_scalable(model.peft_config["default"].to_dict(), method)
        if "base" not in self.finished:
            self.record("base", measure_base(self.suite, model, lambda: self.task.base().to(self.training.device)))
        scales = self.arguments.wise if isinstance(model, PeftModel) else []
        rows = measure_tuned(self.suite if suite is None else suite, model, method, scales)
        self.record(method, [*rows, *more])
        return [*self.finished["base"], *self.finished[method]]

    def record(self, method: str, rows: list[dict]) -> None:
        results = Results(None, **self.common)
        results.extend([{"method": method, **row} for row in rows])
        self.finished[method] = results.rows
        if self.writes:  # with the base's rows, so that a method's folder can be read and published by itself
            base = [] if method == "base" else self.finished["base"]
            write_results([*base, *results.rows], self.output / method / RESULTS_FILE)

    def finish(self, rows: list[dict]) -> list[dict]:
        """Write and show rows: results.jsonl, the frontier where there is one, the table; returns them."""
        if self.writes:
            write_results(rows, self.output / RESULTS_FILE)
            if any("wise" in row for row in rows):
                frontier(rows, self.output / "frontier.png")
            print(f"\n{table(rows)}\n")
            print(f"Accuracies in %, with the change against the base. All files of the run: {self.output}")
        return rows


def main(task_class: type[Task], arguments: RecipeArguments, training: GatedLoraTrainingArguments) -> None:
    """Run a recipe."""
    Run(task_class, arguments, training).run()
    PartialState().destroy_process_group()  # without it a process now and then aborts as it exits
