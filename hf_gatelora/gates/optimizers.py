"""The optimizers that update a model's blocks, known from their first step on, so that the freeze reaches them."""

import logging
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .engines import engine_of

logger = logging.getLogger(__name__)

_EVERY: "weakref.WeakSet[Optimizers]" = weakref.WeakSet()


def _notice(optimizer, args, kwargs) -> None:
    for optimizers in list(_EVERY):
        optimizers.watch(optimizer)


# An optimizer that updates the blocks of a model makes itself known at its first step, so that the freeze can drop the
# state of closed blocks from it, whoever created it.
register_optimizer_step_post_hook(_notice)


class Optimizers:
    """The optimizers that update the scores or the LoRA weights of a model's blocks.

    Args:
        parameters: returns the current scores and LoRA weights; no scores once the gates are frozen.
    """

    def __init__(self, parameters: Callable[[], tuple[list[nn.Parameter], list[nn.Parameter]]]):
        self._parameters = parameters
        self._known: list[weakref.ref] = []
        _EVERY.add(self)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return filter(None, [known() for known in self._known])

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Register an optimizer if it updates the blocks; its first step does so as well."""
        if any(known is optimizer for known in self):
            return
        scores, weights = self._parameters()
        if scores and engine_of(scores[0]).updates(optimizer, [*scores, *weights]):
            self._known.append(weakref.ref(optimizer))
            for group in optimizer.param_groups:
                if group.get("weight_decay") and any(p is scores[0] for p in group["params"]):
                    logger.warning(
                        "The optimizer decays the gates' scores, and trains them like weights. Build it from "
                        "gates.param_groups(lr=...)."
                    )

    def forget(self, parameters: list[nn.Parameter]) -> None:
        """Stop training these parameters, and drop their gradients and optimizer state."""
        gone = {id(p) for p in parameters}
        for parameter in parameters:
            parameter.grad = None
            # ZeRO-3 would go on applying the last gradient that it saw, and count it in the gradient norm.
            parameter.requires_grad_(False)
        for optimizer in self:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in gone]
            for parameter in parameters:
                optimizer.state.pop(parameter, None)

    def restart(self) -> None:
        """Reset the optimizers to before their first step."""
        for optimizer in self:
            _restart(optimizer)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_known": []}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _EVERY.add(self)


# State that is zero before an optimizer's first step.
ZERO_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"}


@torch.no_grad()
def _restart(optimizer: torch.optim.Optimizer) -> None:
    """Reset an optimizer to before its first step: Adam's and SGD's state in place, because ZeRO keeps references."""
    for state in optimizer.state.values():
        if not set(state) <= ZERO_STATE:
            state.clear()  # the next step makes it again
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0
