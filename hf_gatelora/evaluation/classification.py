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
        ValueError: if the shapes do not match, there are no rows, a score is NaN, a label lies outside the classes, or
            k outside 1 ... classes.
    """
    _check("logits", logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-{k} accuracy does not exist for {logits.shape[1]} classes: give 1 <= k <= classes.")
    return (logits.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1).double().mean().item()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    The predictions fall into bins of equal width by the probability of their class; the error is the mean over the
    samples of |accuracy - mean confidence| of their bin. A bin includes its upper edge, not its lower one.

    Args:
        probabilities: shape (n, classes), rows that sum to 1.
        labels: class indices of shape (n,).
        bins: 15 by default.

    Returns:
        A fraction: 0 is calibrated.

    Raises:
        ValueError: if the shapes do not match, there are no rows or bins, the rows are not probabilities, or a label
            lies outside the classes.
    """
    _check("probabilities", probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins = {bins}: give 1 or more.")
    sums = probabilities.sum(dim=-1, dtype=torch.float32)
    if probabilities.min() < 0 or not ((sums - 1).abs() < 0.02).all():
        raise ValueError(
            f"The rows are not probabilities: smallest entry {probabilities.min():.3g}, sums between {sums.min():.3g} "
            f"and {sums.max():.3g}. Apply a softmax to logits first."
        )
    confidence, predicted = (tensor.cpu() for tensor in probabilities.max(dim=-1))
    bin_of = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=confidence.dtype)[1:-1])
    gap = (predicted == labels.cpu()).double() - confidence.double()
    return gap.new_zeros(bins).index_add(0, bin_of, gap).abs().sum().item() / len(labels)


def check_labels(labels: Tensor, classes: int, name: str = "labels") -> None:
    """Check that labels are indices of so many classes.

    Raises:
        ValueError: naming the range of the labels.
    """
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{name} lie between {labels.min()} and {labels.max()}, outside the {classes} classes 0 ... {classes - 1}."
        )


def _check(name: str, scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(scores):
        raise ValueError(
            f"{name} of shape {tuple(scores.shape)} and labels of shape {tuple(labels.shape)} do not match: "
            "give (n, classes) and (n,), n at least 1."
        )
    if nan := int(scores.isnan().any(dim=-1).sum()):
        raise ValueError(
            f"{nan} of {len(scores)} rows of {name} hold NaN: the model's outputs are not finite. Check whether its "
            "training diverged, or its precision overflows."
        )
    check_labels(labels, scores.shape[1])
