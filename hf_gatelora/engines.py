"""Moved to `hf_gatelora.training.engines` and `hf_gatelora.gates.engines`; these names stay until 1.0."""

from .gates.engines import scalars_as_vectors, without_embedding_units  # noqa: F401
from .training.engines import EngineTrainer  # noqa: F401
