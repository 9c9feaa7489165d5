"""Measuring what a fine-tuned model gained (ID), carried over (OOD) and kept (retention)."""
