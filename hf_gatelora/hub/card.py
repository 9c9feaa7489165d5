"""Moved to `hf_gatelora.card.write`; this name stays until 1.0."""

from ..card.write import write_card  # noqa: F401
