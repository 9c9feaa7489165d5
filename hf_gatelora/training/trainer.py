"""`GatedLoraTrainer`: the Trainer that trains gated LoRA, and its arguments."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.checkpoint import adapter_folder, last_complete_checkpoint, missing_states
from ..config import GateConfig
from ..gates.engines import engine_of, writer_of
from ..gates.lora_layers import check_targets, refuse_injected
from ..gates.targets import without_heads
from . import saving
from .attach import attach_gates
from .callbacks import GateAnnealingCallback, separate_scores
from .controller import CONTROLLER
from .hub import HubTrainer

# Optimizers by parts of their names in transformers.
NOT_FOR_SCORES = ("lomo", "layerwise", "schedule_free")


@dataclass
class GatedLoraTrainingArguments(TrainingArguments):
    """`TrainingArguments` and the fields of `GateConfig` as `gate_<field>` (`gate_lambda` for `lambda_`).

    Fields that take more than one type can be given as strings on the command line: a fraction, `none`, or JSON, for
    instance `--gate_target_active '{"vision": 0.05, "text": 0.0}'`.

    Raises:
        ValueError: if a gate field is out of its range.
    """

    gate_kind: str = field(default="straight_through", metadata={"help": "straight_through, sigmoid or hard_concrete"})
    gate_target_active: str = field(default="0.05", metadata={"help": "open fraction, JSON {regex: fraction}, or none"})
    gate_lambda: float | None = field(default=None, metadata={"help": "penalty weight; default: steered"})
    gate_tau: float = field(default=0.1, metadata={"help": "a gate is open if its score is at least this"})
    gate_init: float = field(default=0.15, metadata={"help": "initial score"})
    gate_learning_rate: float = field(default=0.01, metadata={"help": "learning rate of the scores"})
    gate_warmup_ratio: float = field(default=0.1, metadata={"help": "fraction of the run before the penalty starts"})
    gate_freeze_ratio: float = field(default=0.5, metadata={"help": "fraction of the run after which gates freeze"})
    gate_granularity: str = field(default="module", metadata={"help": "module, layer, or a JSON list of regexes"})
    gate_cost: str = field(default="uniform", metadata={"help": "uniform, parameters, compute, or JSON {gate: cost}"})
    gate_criterion: str = field(default="score", metadata={"help": "what ranks gates at the freeze: score or norm"})
    gate_seed: int = field(default=0, metadata={"help": "seed of the hard concrete noise"})
    gate_rewind: bool = field(default=False, metadata={"help": "open blocks start again from B = 0 at the freeze"})

    def __post_init__(self):
        super().__post_init__()
        self.gate_target_active = _parse("gate_target_active", self.gate_target_active)
        self.gate_granularity = _parse("gate_granularity", self.gate_granularity)
        self.gate_cost = _parse("gate_cost", self.gate_cost)
        self.gate_config()

    def gate_config(self) -> GateConfig:
        """The gate fields as a `GateConfig`."""
        return GateConfig(**{f.name: getattr(self, f"gate_{f.name}".rstrip("_")) for f in fields(GateConfig)})


def _parse(name, value):
    if not isinstance(value, str) or (value.isidentifier() and value.lower() not in ("none", "null")):
        return value
    if value.lower() in ("none", "null"):
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} is neither a number, a known word nor JSON.") from error


class GatedLoraTrainer(HubTrainer):
    """`Trainer` with gated LoRA: change the class name of your Trainer, and pass a `PeftModel` or a `peft_config`.

    The scores get their own optimizer group: `gate_learning_rate`, no weight decay. The learning-rate schedule
    multiplies their rate as well, and gradient clipping counts them in. `load_best_model_at_end` considers only
    evaluations after the freeze. Every directory written is a stock PEFT adapter.

    Args:
        model: a `PeftModel` with LoRA layers (its active adapter is gated), one whose gates are attached already, or
            a plain model together with `peft_config`. With `model_init` in its place, each call gives such a model.
        args: `GatedLoraTrainingArguments`; with stock `TrainingArguments` the gates take their defaults.
        peft_config: LoRA settings for a plain model. Here "all-linear" leaves heads and projections out, as
            `lora_targets` does.
        kwargs: for `Trainer`.

    Attributes:
        gates: the `GateController`; with `model_init` that of the newest model.

    Raises:
        ValueError, TypeError: as `attach_gates`, and if model and `peft_config` do not go together.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        *trainer_args,
        peft_config: LoraConfig | None = None,
        callbacks: list | None = None,
        **kwargs,
    ):
        if model is None and kwargs.get("model_init") is None:
            raise ValueError("GatedLoraTrainer needs `model`, or `model_init` that makes one.")
        if args is not None and args.n_gpu > 1:
            raise ValueError(
                f"Found {args.n_gpu} GPUs in one process, which Trainer would use through DataParallel; its replicas "
                "cannot hold gates. Start one process per GPU with `accelerate launch`."
            )
        self._peft_config = peft_config
        if args is not None and any(word in str(args.optim) for word in NOT_FOR_SCORES):
            raise ValueError(
                f"optim={str(args.optim)!r} cannot train gates: it updates parameters in the backward, or keeps the "
                "evaluated weights in its state, so that the freeze cannot take blocks out. Use another optimizer."
            )
        if model is not None:
            model = self._gate(model, args)
        if args is not None and args.activation_checkpointing:
            # Reentrant checkpointing gives no gradient to blocks whose input needs none, as in a frozen vision tower.
            # If it is asked for, `_gate` makes the inputs require a gradient.
            args.activation_checkpointing_kwargs = {
                "use_reentrant": False,
                **cast(dict, args.activation_checkpointing_kwargs or {}),
            }

        self._penalty_sum, self._penalty_count = 0.0, 0
        self._annealing: list[GateAnnealingCallback] = []
        super().__init__(model, args, *trainer_args, callbacks=callbacks, **kwargs)
        self._annealing = [c for c in self.callback_handler.callbacks if isinstance(c, GateAnnealingCallback)]
        if not self._annealing:
            self._annealing = [GateAnnealingCallback(self.gates)]
            self.add_callback(self._annealing[0])
        for callback in self._annealing:
            callback.add_penalty = False  # compute_loss adds it

    def _gate(self, model, args):
        model = _adapted(model, self._peft_config)
        config = args.gate_config() if isinstance(args, GatedLoraTrainingArguments) else GateConfig()
        self.gates = getattr(model, CONTROLLER, None) or attach_gates(model, config, model.active_adapter)
        if isinstance(args, GatedLoraTrainingArguments) and self.gates.config != config:
            raise ValueError(
                f"The model's gates were attached with {self.gates.config}, the training arguments say {config}. Give "
                "the same settings in both, or plain TrainingArguments."
            )
        checkpointing = args is not None and args.activation_checkpointing and args.activation_checkpointing_kwargs
        if checkpointing and checkpointing.get("use_reentrant"):
            model.enable_input_require_grads()
        return model

    def call_model_init(self, trial=None):
        """A new model from `model_init`, with new gates by the current training arguments."""
        if trial is not None:
            # Trainer would give the trial's settings to the arguments only after the model is made.
            self._hp_search_setup(trial)
        model = self._gate(super().call_model_init(trial), self.args)
        for callback in self._annealing:
            callback.watch(self.gates)
        return model

    # ---- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's loss, in training plus the gates' penalty."""
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        penalty = self.penalty(num_items_in_batch)
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty

    def penalty(self, num_items_in_batch=None) -> torch.Tensor:
        """The gates' penalty for a `compute_loss` to add: it counts once per optimizer step, and is 0 in evaluation.

        Args:
            num_items_in_batch: what Trainer passed to `compute_loss`.

        Returns:
            A scalar tensor with gradient; 0 in evaluation.
        """
        if not (self.model.training and torch.is_grad_enabled()):
            return torch.zeros((), device=self.args.device)
        penalty = self.gates.penalty()
        self._penalty_sum, self._penalty_count = self._penalty_sum + penalty.detach(), self._penalty_count + 1
        # Trainer divides the loss by the number of micro-batches unless it was normalised over all of them.
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return penalty / self.current_gradient_accumulation_steps if scaled else penalty

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's step.

        Raises:
            RuntimeError: if the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Trainer reads the loss on the host at every step unless logging_nan_inf_filter is off.
        if self.args.logging_nan_inf_filter and not torch.isfinite(loss):
            raise RuntimeError(
                f"The training loss is {loss.item()} at step {self.state.global_step + 1}. Nothing of this step was "
                "applied. Lower learning_rate, or look for broken images or labels in the batch."
            )
        return loss

    def log(self, logs, start_time=None):
        """Trainer's log; training entries also get the parts of the loss and the state of the gates."""
        if "loss" in logs:
            penalty = float(self._penalty_sum) / max(self._penalty_count, 1)
            self._penalty_sum, self._penalty_count = 0.0, 0
            logs = {**logs, "task_loss": logs["loss"] - penalty, "penalty": penalty, **gate_logs(self.gates)}
        super().log(logs, start_time)

    # ---- optimizer ----------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """Trainer's optimizer, with the scores in a group of their own; also a given one.

        Raises:
            ValueError: if a given optimizer does not update the scores.
        """
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given:
            separate_scores(self.gates, optimizer, None)
        elif self.gates.frozen:
            # Made before a frozen checkpoint was loaded: it still holds what that took out of the model.
            left = {id(p) for p in self.model.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) in left]
        elif not engine_of(self.gates.score_parameters()[0]).updates(optimizer, self.gates.score_parameters()):
            raise ValueError(
                "The given optimizer does not update the gates' scores. Make it after attach_gates(model, ...), from "
                "gates.param_groups(lr=...) or with gates.score_group() among its groups, and pass that model."
            )
        else:
            separate_scores(self.gates, optimizer, self.lr_scheduler)
        return optimizer

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Trainer's `train`; `resume_from_checkpoint=True` takes the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, self.gates.adapter_name)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = self._check_resumable(resume_from_checkpoint)
        if self.engine.manages:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.gates.watch(self.optimizer)
        else:
            self._load_adapters(resume_from_checkpoint)
        saving.restore(self.gates, folder, engine_loaded=self.engine.manages)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None and self.engine.loads_in == "_load_optimizer_and_scheduler":
            saving.restore(self.gates, self._check_resumable(checkpoint), engine_loaded=True)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _check_resumable(self, checkpoint) -> Path:
        if self.gates.frozen:
            raise ValueError(
                f"The gates of this trainer are frozen already and cannot go back to {checkpoint}. Resume with a new "
                "trainer, on a new model."
            )
        written, here = writer_of(Path(checkpoint)).title, self.engine.title
        if written != here:
            raise ValueError(
                f"{checkpoint} was written by a {written} run, this is a {here} run, which cannot read that one's "
                "optimizer state. Resume with the launcher config of that run, or load the adapter with "
                "PeftModel.from_pretrained(base_model, checkpoint, is_trainable=True) and start a new run."
            )
        folder = adapter_folder(checkpoint, self.gates.adapter_name)
        saving.check_resumable(self.gates, folder)
        lacking = missing_states(Path(checkpoint))
        if lacking:
            raise ValueError(
                f"{checkpoint} holds no {' and no '.join(lacking)} state (was it saved with save_only_model?): the run "
                "would go on otherwise than it was. To train on from its weights on purpose, load them with "
                "PeftModel.from_pretrained(base_model, checkpoint, is_trainable=True) and start a new run."
            )
        return folder

    def _save_checkpoint(self, model, trial):
        # What makes a checkpoint complete comes last; one of an earlier run must not make this one complete.
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _load_best_model(self):
        if self.engine.manages:
            super()._load_best_model()
        else:
            self._load_adapters(self.state.best_model_checkpoint)
        self.gates.weights_are_of(self.state.best_global_step)

    def _save(self, output_dir=None, state_dict=None):
        # What Trainer gathers holds the whole model, or leaves adapters out that do not train.
        super()._save(output_dir, saving.whole_adapters(self.model) or state_dict)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # Next, one process writes trainer_state.json, which makes the checkpoint a complete one.
        self.accelerator.wait_for_everyone()

    def _load_adapters(self, checkpoint) -> None:
        # Trainer would take the adapter at the top of the folder for the one that is called "default".
        model = self.gates.model
        active = model.active_adapters
        for name in model.peft_config:
            folder = Path(checkpoint) if name == "default" else Path(checkpoint) / name
            if name == self.gates.adapter_name:
                folder = adapter_folder(checkpoint, name)
            model.load_adapter(str(folder), name, is_trainable=name in active)

    def _determine_best_metric(self, metrics, trial):
        best = super()._determine_best_metric(metrics, trial)
        if not self.gates.frozen:
            # What an evaluation before the freeze measures is not what the run ends with.
            self.state.best_metric = self.state.best_global_step = None
            return False
        return best


def gate_logs(gates) -> dict[str, float]:
    """The gates' state as log entries: lambda, temperature, open fraction overall and per tower."""
    logs = {"gate_lambda": gates.lambda_, "open_fraction": gates.active_fraction}
    if gates.temperature is not None:
        logs["gate_temperature"] = gates.temperature
    towers = gates.tower_counts()
    if len(towers) > 1:
        for tower, row in towers.items():
            logs[f"open_fraction/{tower}"] = row["open"] / row["gates"]
    return logs


def _adapted(model, peft_config: LoraConfig | None) -> PeftModel:
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("The model is a PeftModel already: pass it without peft_config.")
        return model
    refuse_injected(model)
    if peft_config is None:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers: pass peft_config=LoraConfig(...), or a PeftModel."
        )
    check_targets(model, peft_config)
    return get_peft_model(model, without_heads(model, peft_config))
