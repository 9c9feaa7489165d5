"""Adapters as files, and the base models that they belong to."""
