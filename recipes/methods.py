"""Training and measuring the methods that a recipe compares: the run from arguments to results."""

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
from common import RecipeArguments, not_default, parse_method
from data import LabelledImages, parse_named_sources
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from report import table
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from hf_gatelora import GatedLoraTrainer, GatedLoraTrainingArguments, RetentionCallback
from hf_gatelora.engines import EngineTrainer
from hf_gatelora.evaluation.results import Results, read_results, write_results
from hf_gatelora.evaluation.suite import EvalSet, Suite
from hf_gatelora.hub.plots import frontier, gate_map

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


def adapted(task: Task, name: str, budget: float, seed: int) -> nn.Module:
    """A new model as the method trains it; for `gated` before the gates are attached."""
    arguments, model = task.arguments, task.base()
    r, alpha = arguments.lora_r, arguments.lora_alpha or arguments.lora_r
    if name == "full":
        return model
    if name == "lora_equal":
        equal = max(1, round(r * budget))
        return get_peft_model(model, task.lora_config(model, equal, max(1, round(alpha * equal / r))))
    config = task.lora_config(model, r, alpha)
    if name == "random":
        everywhere = get_peft_model(task.base(), config)
        blocks = [
            module.removeprefix("base_model.model.")
            for module, layer in everywhere.named_modules()
            if isinstance(layer, LoraLayer)
        ]
        config.target_modules = set(random.Random(seed).sample(blocks, max(1, round(budget * len(blocks)))))
    return get_peft_model(model, config)


def train(
    method: str, task: Task, training: GatedLoraTrainingArguments, data: LabelledImages, validation: dict[str, object]
) -> tuple[Trainer, StepTimer]:
    """Train one method; returns its trainer and step timer.

    Args:
        validation: `eval_dataset` and `callbacks` for the Trainer, or nothing.
    """
    set_seed(training.seed)
    name, budget = parse_method(method)
    model = adapted(task, name, training.gate_target_active if budget is None else budget, training.seed)
    common = {"args": training, "train_dataset": data, "processing_class": task.processor, **validation}
    common |= task.trainer_parts(data)
    if name == "gated":
        trainer = GatedLoraTrainer(model, **common)
        timer = StepTimer(lambda: trainer.gates.frozen)
    else:
        trainer = EngineTrainer(model, **common)
        timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    return trainer, timer


def costs(trainer: Trainer, timer: StepTimer, folder: Path, source: str) -> list[dict]:
    """Rows of open blocks, parameters, bytes, and seconds per step before and after the freeze."""
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
    return [{"role": "cost", "data": "train", "split": source, **row} for row in rows]


class Run:
    """One call of a recipe: what it trains and measures, and the files it writes.

    Args:
        task: of the recipe.
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
        names = self.data.class_names
        self.suite = self.task.suite(
            [
                self.eval_set("id", "test", arguments.test, names),
                *(self.eval_set("ood", *named, names) for named in parse_named_sources("ood", arguments.ood).items()),
                *(
                    self.eval_set("retention", *n)
                    for n in parse_named_sources("retention", arguments.retention).items()
                ),
            ],
            training.per_device_eval_batch_size,
        )
        stated = {**asdict(arguments), **not_default(training)}
        self.common = {"model": arguments.model, "seed": training.seed, "arguments": stated}

    def images(self, source: str, class_names: list[str] | None = None) -> LabelledImages:
        """The images of a source as the model takes them."""
        captions = getattr(self.arguments, "caption_column", "caption")
        return LabelledImages(source, self.task.pixels, self.arguments.label_column, captions, class_names)

    def eval_set(self, role: str, name: str, source: str, class_names: list[str] | None = None) -> EvalSet:
        """A source as a set of the suite."""
        images = self.images(source, class_names)
        banks = parse_named_sources("bank", getattr(self.arguments, "bank", None))
        bank = None
        if role == "retention" and name in banks:
            neighbours = self.images(banks[name], images.class_names)
            bank = EvalSet(role, name, neighbours, banks[name], neighbours.labels, neighbours.class_names)
        labels = images.labels
        if role != "retention" and getattr(self.arguments, "mode", None) == "contrastive" and images.captions:
            labels = None  # it is what it was trained for that is measured
        return EvalSet(role, name, images, source, labels, images.class_names, images.captions, bank)

    def validation(self) -> dict[str, object]:
        """What evaluation during training needs; empty where none was asked for."""
        if self.training.eval_strategy == "no":
            return {}
        if self.arguments.validation is None:
            raise ValueError("--eval_strategy needs --validation: the ID test images are not for choosing a model.")
        held_out = self.eval_set("id", "validation", self.arguments.validation, self.data.class_names)
        others = [data for data in self.suite.sets if data.role != "id"]
        watched = replace(self.suite, sets=[held_out, *others])
        return {"eval_dataset": held_out.images, "callbacks": [RetentionCallback(watched)]}

    def run(self) -> list[dict]:
        """Train and measure every method; returns all rows."""
        if self.arguments.keep_finished:
            for method in ("base", *self.arguments.methods):
                file = self.output / method / "results.jsonl"
                if file.is_file():
                    self.finished[method] = read_results(file)
        for method in self.arguments.methods:
            if method not in self.finished:
                self.train_and_measure(method)
        return self.finish([row for method in ("base", *self.arguments.methods) for row in self.finished[method]])

    def train_and_measure(self, method: str) -> None:
        """Train and measure one method, and the base with it where that was not measured yet."""
        training = replace(self.training, output_dir=str(self.output / method))  # sets the engine up anew
        name, budget = parse_method(method)
        if budget is not None:
            training.gate_target_active = budget
        if name == "linear_probe":
            model, suite = self.task.linear_probe(self.data, self.suite)
            self.measured(method, model.to(training.device), suite)
            return
        if name == "full":
            training.learning_rate = self.arguments.full_learning_rate
        trainer, timer = train(method, self.task, training, self.data, self.validation())
        trainer.save_model()
        # What was written is evaluated, as users will load it. Each process takes a part of the data.
        trainer.accelerator.wait_for_everyone()
        folder, model = self.output / method, self.task.base()
        model = type(model).from_pretrained(folder) if name == "full" else PeftModel.from_pretrained(model, folder)
        if self.writes and hasattr(trainer, "gates"):
            gate_map(trainer.gates.summary(), folder / "gate_map.png")
        spent = costs(trainer, timer, folder, self.arguments.train) if self.writes else []
        self.measured(method, model.to(training.device), self.suite, spent)

    def measured(self, method: str, model: nn.Module, suite: Suite | None = None, more: list[dict] = ()) -> list[dict]:
        """Measure a model, and the base beside it where that was not done yet; returns the rows of both.

        A method's rows are written to its folder at once: the file's presence says that the method is finished.
        """
        if "base" not in self.finished:
            if isinstance(model, PeftModel):
                with model.disable_adapter():
                    rows = self.suite.measure(model, "base")
            else:
                rows = self.suite.measure(self.task.base().to(self.training.device), "base")
            self.record("base", rows)
        suite = self.suite if suite is None else suite
        rows = suite.measure(model, method)
        for scale in self.arguments.wise if isinstance(model, PeftModel) else []:
            with rescale_adapter_scale(model, scale):
                rows += [{**row, "wise": scale} for row in suite.measure(model, f"{method} x {scale:g}")]
        self.record(method, [*rows, *more])
        return [*self.finished["base"], *self.finished[method]]

    def record(self, method: str, rows: list[dict]) -> None:
        results = Results(self.output / method / "results.jsonl" if self.writes else None, **self.common)
        results.extend([{"method": method, **row} for row in rows])
        self.finished[method] = results.rows

    def finish(self, rows: list[dict]) -> list[dict]:
        """Write and show rows: results.jsonl, the frontier where there is one, the table; returns them."""
        if self.writes:
            write_results(rows, self.output / "results.jsonl")
            if any("wise" in row for row in rows):
                frontier(rows, self.output / "frontier.png")
            print(f"\n{table(rows)}\n")
            print(f"Accuracies in %, with the change against the base. All files of the run: {self.output}")
        return rows


def main(task_class: type[Task], arguments: RecipeArguments, training: GatedLoraTrainingArguments) -> None:
    """Run a recipe."""
    Run(task_class, arguments, training).run()
    PartialState().destroy_process_group()  # without it a process now and then aborts as it exits
