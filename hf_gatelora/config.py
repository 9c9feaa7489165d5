"""`GateConfig`: every setting of the gates, validated on construction."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Kind = Literal["straight_through", "sigmoid", "hard_concrete"]
KINDS = get_args(Kind)
GRANULARITIES = ("module", "layer")
COSTS = ("uniform", "parameters", "compute")
CRITERIA = ("score", "norm")


@dataclass
class GateConfig:
    """How blocks are gated, and how many of them stay open.

    Args:
        kind: gate function. `"straight_through"` is 1 where score >= `tau`, else 0, with gradient 1
            (TAPS, arXiv 2203.16708); `"sigmoid"` is annealed to hard; `"hard_concrete"` is the stochastic
            gate of Louizos et al. (arXiv 1712.01312), whose score is its log-alpha.
        target_active: fraction of the blocks that stays open, in [0, 1]; or one fraction per tower as
            `{regex: fraction}`, where each regex is searched in the gate names and each gate must match
            exactly one; or None, to let a fixed `lambda_` decide.
        lambda_: penalty weight, >= 0. None steers it towards `target_active`.
        tau: a gate counts as open where its score is >= `tau` (TAPS default 0.1).
        init: initial score, at least `tau`: a block that starts closed would never learn (TAPS default 0.15).
        learning_rate: of the scores (TAPS default 0.01). They have no weight decay.
        warmup_ratio: fraction of the run before the penalty starts.
        freeze_ratio: fraction of the run after which the gates become 0 or 1 for good.
        granularity: one gate per LoRA module (`"module"`), per transformer layer (`"layer"`), or one per
            regex of a list; each LoRA module must match exactly one of them.
        cost: weight of each gate in the penalty: `"uniform"`; `"parameters"`, the LoRA parameters of its
            block; `"compute"`, the multiplications of the block's adapter plus those of the backward pass
            that it forces through the blocks above it; or `{gate name: cost > 0}`.
        criterion: what ranks the gates at the freeze: `"score"`, or `"norm"`, the Frobenius norm of the
            block's weight update (alpha / r) B A.
        seed: of the noise of `"hard_concrete"`.
        rewind: whether the open blocks restart from B = 0 at the freeze, so that nothing remains of what they learned
            beside blocks that are closed now. The whole optimizer restarts too: moments from small gradients would
            make the first steps far too large. It keeps more of the prior knowledge and may cost some ID accuracy.
            Ours, not the paper's; compare arXiv 1903.01611 on rewinding after pruning.

    Raises:
        ValueError: if a value is out of its range, or two of them contradict each other.
    """

    kind: Kind = "straight_through"
    target_active: float | dict[str, float] | None = 0.05
    lambda_: float | None = None
    tau: float = 0.1
    init: float = 0.15
    learning_rate: float = 0.01
    warmup_ratio: float = 0.1
    freeze_ratio: float = 0.5
    granularity: str | list[str] = "module"
    cost: str | dict[str, float] = "uniform"
    criterion: str = "score"
    seed: int = 0
    rewind: bool = False

    def __post_init__(self):
        _one_of("kind", self.kind, KINDS)
        _one_of("criterion", self.criterion, CRITERIA)
        if isinstance(self.granularity, str):
            _one_of("granularity", self.granularity, GRANULARITIES, "or a list of regexes")
        elif not isinstance(self.granularity, (list, tuple)) or not self.granularity:
            raise ValueError(f"granularity={self.granularity!r} must be 'module', 'layer' or a list of regexes.")
        else:
            self.granularity = list(self.granularity)
            _check_regexes("granularity", self.granularity)
        if isinstance(self.cost, str):
            _one_of("cost", self.cost, COSTS, "or a dict {gate name: cost}")
        elif not isinstance(self.cost, dict):
            raise ValueError(f"cost={self.cost!r} must be one of {COSTS} or a dict {{gate name: cost}}.")
        else:
            for name, cost in self.cost.items():
                _check_number(f"cost[{name!r}]", cost, above=0.0)

        for name in ("tau", "init"):
            _check_number(name, getattr(self, name))
        _check_number("learning_rate", self.learning_rate, above=0.0)
        if self.init < self.tau:
            raise ValueError(
                f"init={self.init} is below tau={self.tau}: every gate would start closed, and a closed block "
                "learns nothing that could open it. Set init >= tau (defaults: init=0.15, tau=0.1)."
            )
        _check_number("warmup_ratio", self.warmup_ratio, 0.0, 1.0)
        _check_number("freeze_ratio", self.freeze_ratio, 0.0, 1.0)
        if self.warmup_ratio >= self.freeze_ratio:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} is not before freeze_ratio={self.freeze_ratio}: no steps "
                "would be left to search. Both are fractions of the whole run; set warmup_ratio < freeze_ratio."
            )
        if self.rewind and self.freeze_ratio == 1:
            raise ValueError("rewind=True needs steps after the freeze: set freeze_ratio < 1.")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer.")
        if self.lambda_ is not None:
            _check_number("lambda_", self.lambda_, 0.0)
        if isinstance(self.target_active, dict):
            if not self.target_active:
                raise ValueError("target_active={} names no tower. Give {regex: fraction}, or one fraction.")
            _check_regexes("target_active", self.target_active)
            for name, fraction in self.target_active.items():
                _check_number(f"target_active[{name!r}]", fraction, 0.0, 1.0)
        elif self.target_active is not None:
            _check_number("target_active", self.target_active, 0.0, 1.0)
        elif self.lambda_ is None:
            raise ValueError(
                "target_active=None and lambda_=None: nothing would close a gate. Give target_active (the "
                "fraction of blocks to keep open), lambda_ (a fixed penalty weight), or both."
            )

    def to_dict(self) -> dict:
        """The fields as plain JSON types."""
        return asdict(self)


def _one_of(name, value, allowed, also=""):
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, allowed))} {also}".rstrip())


def _check_number(name, value, low=-math.inf, high=math.inf, above=-math.inf):
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high or value <= above:
        bounds = f"in [{low:g}, {high:g}]" if math.isfinite(low) and math.isfinite(high) else None
        bounds = bounds or (f">= {low:g}" if math.isfinite(low) else None)
        bounds = bounds or (f"> {above:g}" if math.isfinite(above) else "finite")
        raise ValueError(f"{name}={value!r} is out of range: it must be a number {bounds}.")


def _check_regexes(name, patterns):
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{name}: {pattern!r} is not a valid regular expression ({error}).") from error
