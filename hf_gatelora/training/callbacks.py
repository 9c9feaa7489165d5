"""`GateAnnealingCallback` drives the gates' schedule in any Hugging Face Trainer."""

import logging
from pathlib import Path

import torch
from accelerate.state import GradientState
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..gates.engines import engine_of
from ..gates.freeze import explain_short_search
from ..records import RUN_FILE, not_default, write_text
from .controller import GateController
from .engines import trainer_of
from .pictures import report_gate_map

logger = logging.getLogger(__name__)


class GateAnnealingCallback(TrainerCallback):
    """Moves the gates' schedule after every optimizer step, freezes them in time, and reports a degenerate end.

    `GatedLoraTrainer` brings its own. On a stock `Trainer` it also adds the penalty to the loss that the model
    returns, and gives the scores their own optimizer group (own learning rate, no weight decay). What it cannot do
    there is to resume: that needs `GatedLoraTrainer`. TRL's `SFTTrainer` is such a stock trainer.

    Args:
        gates: the controller, from `attach_gates`.
        add_penalty: whether the penalty is added here, to `output.loss` of the model's training forward; False if the
            training code adds `gates.penalty()` itself.

    Raises:
        TypeError: if `gates` is not a `GateController`.
    """

    def __init__(self, gates: GateController, add_penalty: bool = True):
        self.add_penalty = add_penalty
        self._hook = None
        self._fp16 = self._training = False
        self._loss_factor = 1
        self.watch(gates)

    def watch(self, gates: GateController) -> None:
        """Drive these gates from now on."""
        if not isinstance(gates, GateController):
            raise TypeError(f"GateAnnealingCallback needs what attach_gates returns, found {type(gates).__name__}.")
        self.gates = gates
        self._penalties = gates.penalty_count

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        gates = self.gates
        if self._training and args.auto_find_batch_size and not state.global_step:
            gates.start_over()  # the last attempt ran out of memory
        if gates.steps != state.global_step:
            raise ValueError(
                f"The gates are at step {gates.steps}, the run at step {state.global_step}. To resume a run use "
                "GatedLoraTrainer and resume_from_checkpoint; to start a new run make a new model with new gates."
            )
        gates.start(state.max_steps, not_default(args))
        if state.is_world_process_zero and args.save_strategy != "no":
            write_text(gates.run + "\n", Path(args.output_dir) / RUN_FILE)
        self._training, self._fp16 = True, args.fp16
        # Trainer multiplies a loss that was normalised over the tokens of all processes by their number.
        self._loss_factor = args.world_size if args.average_tokens_across_devices else 1
        check_reach(gates, state.max_steps)
        if not gates.frozen:
            separate_scores(gates, optimizer, lr_scheduler)
        if self.add_penalty:
            self._remove_hook()
            self._hook = gates.model.register_forward_hook(self._with_penalty, with_kwargs=True)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _with_penalty(self, module, inputs, kwargs, output):
        if not module.training or self.gates.frozen:
            return None
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            raise RuntimeError(
                f"GateAnnealingCallback adds the gates' penalty to the loss that the model returns, but "
                f"{type(module.get_base_model()).__name__} returned none. Use GatedLoraTrainer, which "
                "adds it itself, or add gates.penalty() to your loss and pass add_penalty=False."
            )
        penalty = self.gates.penalty()
        if kwargs.get("fused_lm_head"):  # TRL's trainers make their loss of these, and scale it themselves
            if self._fp16:
                raise RuntimeError(
                    "Under fp16 the gates' penalty cannot be scaled like the loss that this trainer makes of "
                    "log_probs. Train in bf16 or fp32."
                )
            if GradientState().sync_gradients:
                output["log_probs"] = _WithPenalty.apply(output["log_probs"], penalty)
            return output
        # A loss that was normalised by num_items_in_batch is summed over the micro-batches of a step: the penalty goes
        # into the last one. Any other loss Trainer divides by their number: the penalty goes into each.
        if kwargs.get("num_items_in_batch") is None:
            output["loss"] = loss + penalty
        elif GradientState().sync_gradients:
            output["loss"] = loss + penalty / self._loss_factor
        return output

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.gates.frozen and self.gates.penalty_count == self._penalties:
            raise RuntimeError(
                "The gates' penalty was not part of this step's loss, so this would train plain LoRA. In your own "
                "compute_loss call super().compute_loss(...), or add self.penalty(num_items_in_batch) to your loss."
            )
        self._penalties = self.gates.penalty_count

    def on_step_end(self, args, state, control, **kwargs):
        was_frozen = self.gates.frozen
        # With max_steps=0 Trainer takes one step nevertheless.
        self.gates.step(min(state.global_step / max(state.max_steps, 1), 1.0))
        if self.gates.frozen and not was_frozen:
            # What an evaluation before the freeze measured is not what the run ends with.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            if state.is_world_process_zero:
                tqdm.write(f"step {state.global_step}: {describe_freeze(self.gates)}")
                report_gate_map(trainer_of(state), self.gates)

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        self._remove_hook()
        if not self.gates.frozen:
            logger.warning(
                f"Training ended at step {state.global_step} of {state.max_steps}, before the gates froze: they are "
                "frozen now, and no step has trained the open blocks alone."
            )
            self.gates.freeze()


class _WithPenalty(torch.autograd.Function):
    """Passes a tensor on; its backward also gives the penalty the gradient 1, whatever the loss made of the tensor."""

    @staticmethod
    def forward(ctx, tensor, penalty):
        ctx.save_for_backward(penalty)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        (penalty,) = ctx.saved_tensors
        return gradient, torch.ones_like(penalty)


def describe_freeze(gates: GateController) -> str:
    """What the freeze left, in one line."""
    names = [name for name, is_open in zip(gates.names, gates.open_mask.tolist(), strict=True) if is_open]
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "none"
    again = "; they start again from B = 0" if gates.config.rewind and names else ""
    return f"froze, {len(names)} of {len(gates.names)} blocks open: {listed}{again}"


def check_reach(gates: GateController, max_steps: int) -> None:
    """Check that the search is long enough for a score to come down from `init` to `tau`; warn if a budget decides.

    Raises:
        ValueError: if a fixed lambda could never close a gate.
    """
    problem = explain_short_search(gates.config, max_steps)
    if problem and gates.config.target_active is None:
        raise ValueError(f"{problem} Every gate would end open.")
    if problem and not gates.frozen:
        logger.warning(problem)


def separate_scores(gates: GateController, optimizer, lr_scheduler) -> None:
    """Give the scores their own group in an optimizer that Trainer made: own learning rate, no weight decay.

    Raises:
        ValueError: if the learning-rate scheduler, or DeepSpeed's optimizer, cannot take another group.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    scores = {id(p) for p in gates.score_parameters()}
    fixed = next((engine for engine in map(engine_of, gates.score_parameters()) if not engine.takes_groups), None)
    if fixed is not None:
        if not any(group and all(id(p) in scores for p in group) for group in fixed.groups(inner)):
            raise ValueError(
                "DeepSpeed's optimizer cannot take the scores' group in afterwards. Use GatedLoraTrainer, or make the "
                "optimizer with the scores in a group of their own, gates.score_group()."
            )
        return
    holding = [g for g in inner.param_groups if any(id(p) in scores for p in g["params"])]
    if len(holding) == 1 and not holding[0].get("weight_decay") and {id(p) for p in holding[0]["params"]} == scores:
        return
    for group in holding:
        group["params"] = [p for p in group["params"] if id(p) not in scores]
    if lr_scheduler is None:
        # Trainer makes a group for biases even if none train. FSDP2 can restore only one empty group, and after the
        # freeze that of the scores is empty.
        inner.param_groups[:] = [group for group in inner.param_groups if group["params"]]
    group = gates.score_group()
    if isinstance(inner.defaults.get("eps"), tuple):  # Adafactor's: added to squared gradients; scale of a parameter
        group["eps"] = (group["eps"] ** 2, inner.defaults["eps"][1])
    inner.add_param_group(group)
    if lr_scheduler is None:
        return
    if not isinstance(lr_scheduler, LambdaLR):
        raise ValueError(
            f"{type(lr_scheduler).__name__} cannot take the scores' group in afterwards. Make the optimizer with the "
            "scores in a group of their own, gates.score_group(), before its scheduler."
        )
    factor = lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch)
    inner.param_groups[-1]["initial_lr"] = gates.config.learning_rate
    inner.param_groups[-1]["lr"] = gates.config.learning_rate * factor
    lr_scheduler.base_lrs.append(gates.config.learning_rate)
    lr_scheduler.lr_lambdas.append(lr_scheduler.lr_lambdas[0])
