"""The gate kinds, one class each: gate value, penalty term and what follows the schedule. Pure torch.

To add a kind, write its class here, list it in `KINDS`, and name it in `config.Kind`, beside its documentation.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import GateConfig
from .schedule import search_progress


def binarize(scores: Tensor, tau: float) -> Tensor:
    """1 where score >= tau, else 0; the gradient passes straight through (TAPS, arXiv 2203.16708)."""
    return (scores >= tau) + (scores - scores.detach())


class GateKind(ABC):
    """What a kind of gate computes from its score.

    Attributes:
        stochastic: whether the gate's state is noise, which only the training forward uses.
    """

    stochastic = False

    def __init__(self, config: GateConfig):
        self.config = config

    @abstractmethod
    def value(self, scores: Tensor, state: Tensor | None) -> Tensor:
        """Gate values in [0, 1], of the shape of `scores` and `state`; stochastic kinds get no state in evaluation."""

    def penalty_term(self, scores: Tensor) -> Tensor:
        """The penalty of each gate before weight and cost."""
        return scores.abs()

    def state(self, progress: float, step: int, count: int, device: torch.device) -> Tensor | None:
        """What gate values depend on besides scores, after `step` optimizer steps: shape (count,), or None."""
        return None

    @property
    def threshold(self) -> float | None:
        """The score from which a gate is 1, for kinds whose value is 0 or 1 with gradient 1."""
        return None

    def temperature(self, progress: float) -> float | None:
        """The temperature, for kinds that have one."""
        return None


class StraightThrough(GateKind):
    """1 where the score is at least tau, else 0 (TAPS, arXiv 2203.16708)."""

    def value(self, scores, state):
        return binarize(scores, self.config.tau)

    @property
    def threshold(self):
        return self.config.tau


class Sigmoid(GateKind):
    """sigmoid((score - tau) / T), where T falls geometrically over the search.

    At the first temperature a gate at the default init (0.05 above tau) is 0.73 open; at the last one a score 0.001
    from tau already decides.
    """

    FIRST, LAST = 0.05, 0.0005

    def value(self, scores, state):
        return torch.sigmoid((scores - self.config.tau) / state)

    def state(self, progress, step, count, device):
        return torch.full((count,), self.temperature(progress), device=device)

    def temperature(self, progress):
        return self.FIRST * (self.LAST / self.FIRST) ** search_progress(progress, self.config)


class HardConcrete(GateKind):
    """The stochastic gate of Louizos et al. (arXiv 1712.01312), whose score is its log-alpha; constants of section 4.

    One noise vector per optimizer step, drawn on the CPU from (seed, step): the same on every rank, in every
    micro-batch and in recomputation.
    """

    stochastic = True
    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

    def value(self, scores, state):
        if state is None:
            stretched = torch.sigmoid(scores)
        else:
            stretched = torch.sigmoid((torch.log(state) - torch.log1p(-state) + scores) / self.BETA)
        return (stretched * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

    def penalty_term(self, scores):
        """The probability that the gate is not zero."""
        return torch.sigmoid(scores - self.BETA * math.log(-self.GAMMA / self.ZETA))

    def state(self, progress, step, count, device):
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) % 2**63)
        return torch.rand(count, generator=generator).clamp(1e-6, 1 - 1e-6).to(device)


KINDS: dict[str, type[GateKind]] = {
    "straight_through": StraightThrough,
    "sigmoid": Sigmoid,
    "hard_concrete": HardConcrete,
}


def kind_of(config: GateConfig) -> GateKind:
    """The kind that a configuration names.

    Raises:
        ValueError: if there is no such kind.
    """
    if config.kind not in KINDS:
        raise ValueError(f"Gate kind {config.kind!r} has no class in gates.kinds: there are {', '.join(KINDS)}.")
    return KINDS[config.kind](config)


class Gate(nn.Module):
    """One gate: its score, an fp32 parameter of shape (1,), and what its kind keeps beside it.

    The score is read inside `forward`, because engines that shard parameters gather them around a module's call.
    """

    state: Tensor | None

    def __init__(self, kind: GateKind, device: torch.device):
        super().__init__()
        self.kind = kind
        self.rounding = torch.float32  # the dtype in which a mixed-precision engine shows the score to the forward
        self.score = nn.Parameter(torch.full((1,), kind.config.init, dtype=torch.float32, device=device))
        self.register_buffer("state", kind.state(0.0, 0, 1, device), persistent=False)

    def forward(self, noisy: bool = False, raw: bool = False) -> Tensor:
        """Gate value, shape (1,), with gradient to the score.

        Args:
            noisy: whether this is a training forward, in which stochastic kinds draw.
            raw: whether to return the score itself.
        """
        if raw:
            return self.score * 1.0
        if self.score.dtype != torch.float32:
            self.rounding = self.score.dtype
        state = self.state if noisy or not self.kind.stochastic else None
        return self.kind.value(self.score.float(), state)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and the like move the gate, but its numbers stay fp32.
        return super()._apply(lambda tensor: tensor.to(device=fn(tensor).device), recurse)
