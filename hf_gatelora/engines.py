"""Moved to `hf_gatelora.training.engines`; this name stays until 1.0."""

from .training.engines import EngineTrainer, scalars_as_vectors, without_embedding_units  # noqa: F401
