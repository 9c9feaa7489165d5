"""Moved to `hf_gatelora.card.push`; this name stays until 1.0."""

from ..card.push import PushError, push_adapter  # noqa: F401
