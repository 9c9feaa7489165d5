"""Where a run stands: its phase, and how much of the search is done. Pure functions of progress in [0, 1]."""

from ..config import GateConfig


def phase(progress: float, frozen: bool, config: GateConfig) -> str:
    """`"warmup"`, `"search"`, or once frozen `"consolidate"`."""
    if frozen:
        return "consolidate"
    return "warmup" if progress < config.warmup_ratio else "search"


def search_progress(progress: float, config: GateConfig) -> float:
    """The fraction of the search that is done, in [0, 1]."""
    done = (progress - config.warmup_ratio) / (config.freeze_ratio - config.warmup_ratio)
    return min(max(done, 0.0), 1.0)
