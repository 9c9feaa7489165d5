"""The mathematics of the gates: gate functions, penalty terms and the schedule. Pure torch, no PEFT, no Trainer."""

import math

import torch
from torch import Tensor, nn

from ..config import GateConfig

# Hard concrete gate: the constants of Louizos et al. (arXiv 1712.01312), section 4.
HC_BETA, HC_GAMMA, HC_ZETA = 2 / 3, -0.1, 1.1

# The sigmoid gate's temperature falls geometrically between these over the search. At the first one a gate at the
# default init (0.05 above tau) is 0.73 open; at the last one, 0.001 from tau already decides.
TEMPERATURE_START, TEMPERATURE_END = 0.05, 0.0005


def binarize(scores: Tensor, tau: float) -> Tensor:
    """1 where score >= tau, else 0; the gradient passes straight through (TAPS, arXiv 2203.16708)."""
    return (scores >= tau) + (scores - scores.detach())


def hard_concrete(log_alpha: Tensor, noise: Tensor | None) -> Tensor:
    """Gate value in [0, 1]: a sample for uniform `noise` in (0, 1), or without noise the gate used at test time."""
    if noise is None:
        stretched = torch.sigmoid(log_alpha)
    else:
        stretched = torch.sigmoid((torch.log(noise) - torch.log1p(-noise) + log_alpha) / HC_BETA)
    return (stretched * (HC_ZETA - HC_GAMMA) + HC_GAMMA).clamp(0, 1)


def gate_values(scores: Tensor, config: GateConfig, temperature: float | Tensor, noise: Tensor | None) -> Tensor:
    """Gate value of each score; same shape as `scores`. `noise` None means evaluation."""
    if config.kind == "straight_through":
        return binarize(scores, config.tau)
    if config.kind == "sigmoid":
        return torch.sigmoid((scores - config.tau) / temperature)
    return hard_concrete(scores, noise)


def penalty_terms(scores: Tensor, config: GateConfig) -> Tensor:
    """Penalty of each score before weight and cost: |s|, or for hard concrete the probability of a non-zero gate."""
    if config.kind == "hard_concrete":
        return torch.sigmoid(scores - HC_BETA * math.log(-HC_GAMMA / HC_ZETA))
    return scores.abs()


class Gate(nn.Module):
    """One gate: its score, an fp32 parameter of shape (1,), and in training the noise of the current step.

    The score is read inside `forward`, because engines that shard parameters gather them around a module's call.
    """

    def __init__(self, config: GateConfig, device: torch.device):
        super().__init__()
        self.config = config
        self.rounding = torch.float32  # the dtype in which a mixed-precision engine shows the score to the forward
        self.score = nn.Parameter(torch.full((1,), config.init, dtype=torch.float32, device=device))
        if config.kind == "sigmoid":
            start = torch.full((1,), TEMPERATURE_START, dtype=torch.float32, device=device)
            self.register_buffer("temperature", start, persistent=False)
        if config.kind == "hard_concrete":
            half = torch.full((1,), 0.5, dtype=torch.float32, device=device)
            self.register_buffer("noise", half, persistent=False)

    def forward(self, noisy: bool = False, raw: bool = False) -> Tensor:
        """Gate value, shape (1,), with gradient to the score; `noisy` is for the training forward.

        With `raw`, the score itself.
        """
        if raw:
            return self.score * 1.0
        if self.score.dtype != torch.float32:
            self.rounding = self.score.dtype
        noise = self.noise if self.config.kind == "hard_concrete" and noisy else None
        return gate_values(self.score.float(), self.config, getattr(self, "temperature", 1.0), noise)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and the like move the gate, but its numbers stay fp32.
        return super()._apply(lambda tensor: tensor.to(device=fn(tensor).device), recurse)


def step_noise(config: GateConfig, step: int, count: int) -> Tensor:
    """Uniform noise of shape (count,) for one optimizer step, the same on every rank and in every micro-batch."""
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**63)
    return torch.rand(count, generator=generator).clamp(1e-6, 1 - 1e-6)


def phase(progress: float, frozen: bool, config: GateConfig) -> str:
    """`"warmup"`, `"search"`, or once frozen `"consolidate"`."""
    if frozen:
        return "consolidate"
    return "warmup" if progress < config.warmup_ratio else "search"


def search_progress(progress: float, config: GateConfig) -> float:
    """How much of the search lies behind, in [0, 1]."""
    done = (progress - config.warmup_ratio) / (config.freeze_ratio - config.warmup_ratio)
    return min(max(done, 0.0), 1.0)


def temperature(progress: float, config: GateConfig) -> float:
    """Temperature of the sigmoid gate."""
    return TEMPERATURE_START * (TEMPERATURE_END / TEMPERATURE_START) ** search_progress(progress, config)


def open_count(fraction: float, blocks: int, what: str = "target_active") -> int:
    """Gates that stay open: round(fraction * blocks).

    Raises:
        ValueError: where a positive fraction rounds to no gate at all.
    """
    count = round(fraction * blocks)
    if fraction > 0 and count == 0:
        raise ValueError(
            f"{what}={fraction:g} of {blocks} gates rounds to 0 open gates. The smallest fraction that keeps one "
            f"open is {smallest_fraction(blocks):g}; 0.0 closes all of them on purpose."
        )
    return count


def smallest_fraction(blocks: int) -> float:
    """The smallest fraction, to six digits, of which one gate stays open."""
    return math.floor(0.5 / blocks * 1e6 + 1) / 1e6


def select_open(values: Tensor, towers: list[list[int]], counts: list[int]) -> Tensor:
    """Boolean mask of the `counts[t]` best of each tower's `values`, ties broken by block order. Shape of `values`."""
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for members, count in zip(towers, counts, strict=True):
        best = sorted(members, key=lambda i: (-values[i].item(), i))[:count]
        mask[best] = True
    return mask
