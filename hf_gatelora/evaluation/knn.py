"""k-NN classification: what features are worth without training anything on them."""

import torch
from torch import Tensor

from .classification import check_labels

# Similarities held at a time: 128 MiB in fp32, whatever the number of queries.
SIMILARITIES = 2**25


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest dot product with each query, best first.

    Args:
        queries, bank: features of shape (n, d) and (m, d) on one device; if normalised, the dot product is the cosine.
        k: at most m.

    Returns:
        Dot products in fp32 and rows of the bank, both of shape (n, k).
    """
    chunks = queries.split(max(1, SIMILARITIES // len(bank)))
    found = [(chunk @ bank.T).topk(k, dim=-1) for chunk in chunks]
    return torch.cat([f.values for f in found]).float(), torch.cat([f.indices for f in found])


@torch.no_grad()
def knn_logits(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class scores of the weighted k-NN classifier of DINO (arXiv 2104.14294; `eval_knn.py` of its code).

    Each of the k nearest rows by cosine votes for its label with weight exp(cosine / temperature). The class with the
    largest score is the prediction; scores divided by their sum are probabilities.

    Args:
        queries, bank: L2-normalised features of shape (n, d) and (m, d) on one device, where the work is done.
        bank_labels: class indices of shape (m,).
        num_classes: number of classes.
        k: number of votes, 20 by default.
        temperature: 0.07 by default.

    Returns:
        Scores of shape (n, num_classes), fp32.

    Raises:
        ValueError: if the shapes do not match, features are not normalised, k lies outside 1 ... m, a label outside the
            classes, or fp32 overflows at the temperature.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries of shape {tuple(queries.shape)} and bank of shape {tuple(bank.shape)} do not match: "
            "give (n, d) and (m, d)."
        )
    if bank_labels.shape != bank.shape[:1]:
        raise ValueError(
            f"bank_labels of shape {tuple(bank_labels.shape)} do not match: give one label for each of the "
            f"{len(bank)} rows of the bank."
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} neighbours cannot be taken from a bank of {len(bank)} rows: give 1 <= k <= rows.")
    if temperature < 0.012:
        raise ValueError(f"temperature = {temperature} makes exp(1 / temperature) overflow: give at least 0.012.")
    check_labels(bank_labels, num_classes, "bank_labels")
    for name, features in (("queries", queries), ("bank", bank)):
        norms = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
        if not ((norms - 1).abs() < 0.02).all():  # also where a norm is NaN
            raise ValueError(
                f"{name} have norms between {norms.min():.3g} and {norms.max():.3g}: "
                "L2-normalise them, for instance with torch.nn.functional.normalize."
            )
    cosines, rows = nearest(queries, bank, k)
    scores = cosines.new_zeros(len(queries), num_classes)
    return scores.scatter_add_(1, bank_labels[rows].long(), (cosines / temperature).exp())
