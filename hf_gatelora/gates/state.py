"""The state of a run's gates: what resuming needs besides the model's weights. Written by the controller alone."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class GateState:
    """Where a run's gates stand.

    Args:
        progress: finished steps / all steps, as of the last step.
        steps: finished optimizer steps.
        total_steps: of the run; None if not known.
        run: identifies the run, through resuming; None before it starts.
        open: boolean mask of the open blocks, shape (N,), on the CPU; None before the freeze.
        weights_step: the step that the weights are of, if they were loaded from an earlier one.
        arguments: of the run, for the model card.
        results: rows of the last measurement, for the model card.
    """

    progress: float = 0.0
    steps: int = 0
    total_steps: int | None = None
    run: str | None = None
    open: Tensor | None = None
    weights_step: int | None = None
    arguments: dict = field(default_factory=dict)
    results: list[dict] = field(default_factory=list)

    def tensors(self, scores: Tensor) -> dict[str, Tensor]:
        """The contents of the state file, with the scores."""
        return {
            "scores": scores,
            "open": torch.zeros(0, dtype=torch.bool) if self.open is None else self.open.clone(),
            "progress": torch.tensor(self.progress, dtype=torch.float64),
            "steps": torch.tensor(self.steps),
            "total_steps": torch.tensor(self.total_steps or 0),
        }

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Take over progress and steps from the contents of a state file."""
        self.progress, self.steps = float(tensors["progress"]), int(tensors["steps"])
        self.total_steps = int(tensors["total_steps"]) or None


def open_mask_of(tensors: dict[str, Tensor]) -> Tensor | None:
    """The open blocks in the contents of a state file; None before the freeze."""
    return tensors["open"].bool() if len(tensors["open"]) else None
