"""Moved to `hf_gatelora.card.tables`; this name stays until 1.0."""

from ..card.tables import results_table  # noqa: F401
