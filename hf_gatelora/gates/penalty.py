"""The penalty on open gates, and its weight lambda: scheduled, or steered towards a budget."""

import torch
from torch import Tensor

from ..config import GateConfig
from .kinds import GateKind
from .schedule import search_progress

# The penalty rises linearly over this first part of the search.
RAMP = 0.25

# Steering (see `steered_lambda`): the weight used on target, and how strongly a deviation of the open fraction from
# the target moves it.
STEER_LAMBDA, STEER_GAIN = 0.3, 3.0


def ramp(progress: float, config: GateConfig) -> float:
    """Factor on the penalty weight: 0 during warm-up, rising to 1 over the first quarter of the search."""
    if progress < config.warmup_ratio:
        return 0.0
    return min(search_progress(progress, config) / RAMP, 1.0)


def steered_lambda(open_fraction: Tensor, target: Tensor, progress: float, config: GateConfig) -> Tensor:
    """Penalty weight that leads the open fraction from 1 down to `target` over the search.

    The wanted fraction follows the cubic sparsity schedule of Zhu and Gupta (arXiv 1710.01878); the weight grows
    exponentially with the excess of the open fraction over it. A pure function of progress and scores, so that it
    needs no state: every rank and every resumed run computes the same. Shapes: one entry per tower.
    """
    wanted = target + (1 - target) * (1 - search_progress(progress, config)) ** 3
    weight = STEER_LAMBDA * torch.exp(STEER_GAIN * (open_fraction - wanted))
    return torch.where(target < 1, weight, 0.0)  # no pressure if all gates may stay open


class Penalty:
    """lambda(t) * sum_i c_i |s_i| / sum_i c_i, with one lambda per tower.

    Its constants follow the scores to their device: models move after gates are attached.

    Args:
        costs: c_i, one number per gate.
        towers: gate indices by tower.
        counts: the budget as `blocks.open_counts` gives it.
    """

    def __init__(
        self,
        kind: GateKind,
        costs: list[float],
        towers: dict[str, list[int]],
        counts: list[tuple[list[int], int]] | None,
    ):
        self._kind, self.config = kind, kind.config
        self._costs = torch.tensor(costs, dtype=torch.float32)
        self._lambda = torch.zeros(len(towers), dtype=torch.float32)
        index = {i: t for t, members in enumerate(towers.values()) for i in members}
        self._tower_of = torch.tensor([index[i] for i in range(len(index))])
        targets = [count / len(members) for members, count in counts or []]  # one budget counts for all towers
        self._target = torch.tensor(targets, dtype=torch.float32)

    def __call__(self, scores: Tensor) -> Tensor:
        """The penalty of the scores, of shape (N,): a scalar with gradient to them."""
        self._follow(scores.device)
        terms = self._kind.penalty_term(scores)
        return (self._lambda[self._tower_of] * self._costs * terms).sum() / self._costs.sum()

    def steer(self, scores: Tensor, progress: float) -> None:
        """Set lambda for this progress and, with a budget, for the open blocks; without a host sync."""
        self._follow(scores.device)
        factor = ramp(progress, self.config)
        if self.config.lambda_ is not None:
            self._lambda = torch.full_like(self._lambda, self.config.lambda_ * factor)
        else:
            is_open = (scores >= self.config.tau).float()
            size = torch.zeros_like(self._lambda).index_add_(0, self._tower_of, torch.ones_like(is_open))
            fraction = torch.zeros_like(self._lambda).index_add_(0, self._tower_of, is_open) / size
            if not isinstance(self.config.target_active, dict):
                # One budget for all towers: which tower gives up how much is for the scores to say.
                fraction = is_open.mean().expand_as(size)
            self._lambda = factor * steered_lambda(fraction, self._target, progress, self.config)

    def end(self) -> None:
        """Set lambda to 0 for good."""
        self._lambda = torch.zeros_like(self._lambda)

    @property
    def lambda_(self) -> float:
        """Lambda now, mean over the gates."""
        return self._lambda[self._tower_of].mean().item()

    def _follow(self, device: torch.device) -> None:
        if device != self._costs.device:
            self._costs, self._lambda = self._costs.to(device), self._lambda.to(device)
            self._tower_of, self._target = self._tower_of.to(device), self._target.to(device)
