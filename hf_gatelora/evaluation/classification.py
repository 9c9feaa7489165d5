"""Accuracy and calibration of classifiers, as plain functions."""

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Fraction of the rows whose label is among the k largest logits.

    Args:
        logits: shape (n, classes); any scores will do, for instance those of `knn_logits`.
        labels: class indices of shape (n,).
        k: 1 by default.

    Raises:
        ValueError: shapes that do not fit, no rows, k outside 1 ... classes.
    """
    _check_shapes("logits", logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-{k} accuracy does not exist for {logits.shape[1]} classes: give 1 <= k <= classes.")
    return (logits.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1).double().mean().item()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    The predictions fall into bins of equal width by the probability of their class; the error is the mean over the
    samples of |accuracy - mean confidence| of their bin. A bin holds its upper edge, not its lower one.

    Args:
        probabilities: shape (n, classes), rows that sum to 1.
        labels: class indices of shape (n,).
        bins: 15 by default.

    Returns:
        A fraction: 0 is calibrated.

    Raises:
        ValueError: shapes that do not fit, no rows, rows that are no probabilities, no bins.
    """
    _check_shapes("probabilities", probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins = {bins}: give 1 or more.")
    sums = probabilities.sum(dim=-1, dtype=torch.float32)
    if not (probabilities.min() >= 0 and ((sums - 1).abs() < 0.02).all()):  # also where there is a NaN
        raise ValueError(
            f"the rows are no probabilities: smallest entry {probabilities.min():.3g}, sums between {sums.min():.3g} "
            f"and {sums.max():.3g}. Apply a softmax to logits first."
        )
    confidence, predicted = (tensor.cpu() for tensor in probabilities.max(dim=-1))
    bin_of = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=confidence.dtype)[1:-1])
    gap = (predicted == labels.cpu()).double() - confidence.double()
    return gap.new_zeros(bins).index_add(0, bin_of, gap).abs().sum().item() / len(labels)


def _check_shapes(name: str, scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(scores):
        raise ValueError(
            f"{name} of shape {tuple(scores.shape)} and labels of shape {tuple(labels.shape)} do not fit: "
            "give (n, classes) and (n,), n at least 1."
        )
