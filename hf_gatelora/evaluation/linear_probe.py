"""Linear probing: a logistic regression on frozen features."""

import torch
from torch import Tensor

from .classification import check_labels

# Bias of a class without samples: its probability is below 1e-43.
ABSENT = -100.0


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Fit an L2-regularised multinomial logistic regression with L-BFGS, as in CLIP (arXiv 2103.00020, section 3.2).

    It minimises

        mean cross-entropy + penalty / 2 · s² · ‖weight‖²,    s² = mean squared distance of the features to their mean

    so the same penalty suits few or many samples, and features of any scale or offset. The bias is not penalised. The
    penalty keeps the probe from a training loss of zero, which would leave nothing to fine-tune.

    Args:
        features: shape (n, d), of any floating-point type; they are copied in fp64.
        labels: class indices of shape (n,).
        num_classes: number of classes c.
        penalty: weight of the L2 term, 1e-3 by default (a choice of this package). Larger stops earlier.

    Returns:
        weight of shape (c, d) and bias of shape (c,), fp32, on the features' device: those of an `nn.Linear(d, c)`.
        A class without samples has weight 0 and a bias far below all others; it is never predicted.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: if the shapes do not match, a label lies outside the classes, fewer than two classes have samples,
            the penalty is not positive, or features are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)} do not match: "
            "give (n, d) and (n,)."
        )
    if penalty <= 0:
        raise ValueError(f"penalty = {penalty}: give a positive number, or the fit does not converge.")
    present = labels.unique().cpu()
    if len(present) < 2:
        raise ValueError(f"the labels hold {len(present)} classes ({present.tolist()}): a probe needs two or more.")
    check_labels(present, num_classes)
    x = features.detach().cpu().double()
    mean = x.mean(dim=0)
    x = x - mean
    scale = x.square().sum(dim=1).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    # scikit-learn fits two classes with one row w, which in two rows is -w/2 and w/2, of half its squared norm.
    binary = len(present) == 2
    # fp64 and this tol: in fp32, or with the default of 1e-4, L-BFGS ends with probabilities still off by some 1e-3.
    regression = LogisticRegression(C=(2 if binary else 1) / (penalty * len(x)), tol=1e-6, max_iter=1000)
    regression.fit((x / scale).numpy(), labels.cpu().numpy())
    rows = torch.from_numpy(regression.coef_) / scale
    offsets = torch.from_numpy(regression.intercept_) - rows @ mean
    if binary:
        rows, offsets = torch.cat([-rows, rows]) / 2, torch.cat([-offsets, offsets]) / 2
    weight, bias = torch.zeros(num_classes, x.shape[1]), torch.full((num_classes,), ABSENT)
    weight[present], bias[present] = rows.float(), offsets.float()
    return weight.to(features.device), bias.to(features.device)
