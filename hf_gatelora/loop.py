"""Moved to `hf_gatelora.training.loop`; this name stays until 1.0."""

from .training.loop import checkpoint_gates  # noqa: F401
