"""What a gate is and does to a model."""
