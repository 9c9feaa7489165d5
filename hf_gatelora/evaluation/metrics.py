"""Metrics of classifiers as `evaluate.Metric`s, which load without a network.

k-NN accuracy and retrieval recall are no `evaluate.Metric`s: their features must come from one state of the model for
a bank, or for images and texts, that an evaluation loop over one data set does not see. Use `knn_logits` with
`accuracy`, and `recall_at`.
"""

import os
from collections.abc import Callable, Iterable

import evaluate
from datasets import Features, Sequence, Value
from torch import Tensor
from transformers import EvalPrediction

from .classification import accuracy, expected_calibration_error

# Rows that `evaluate` turns into Python numbers at a time, of some 30 bytes each.
ROWS = 1024


class LogitMetric(evaluate.Metric):
    """Base of the metrics whose predictions are logits (n, classes) and whose references are class indices (n,).

    `_compute` gets both as tensors. Everything stays in memory: processes do not share files, nothing is written.
    """

    citation = ""

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True} | kwargs)

    def _build_data_dir(self) -> str:
        # evaluate makes this folder, in its cache, even where nothing is kept there.
        return os.devnull if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Sequence(Value("float32")), "references": Value("int64")})
        info = evaluate.MetricInfo(
            description=self.__doc__,
            citation=self.citation,
            inputs_description="predictions: logits (n, classes); references: class indices (n,).",
            features=features,
        )
        # Its constructor refuses a format for rows of several values. Without one they come as lists of numbers.
        info.format = "torch"
        return info


class Accuracy(LogitMetric):
    """Top-1 accuracy from logits, as `accuracy`, and top-k accuracy as `top{k}_accuracy`.

    Args:
        top_k: further values of k, none by default.
    """

    citation = "Russakovsky et al. ImageNet Large Scale Visual Recognition Challenge. IJCV 2015. arXiv 1409.0575"

    def __init__(self, top_k: Iterable[int] = (), **kwargs):
        super().__init__(**kwargs)
        self.top_k = tuple(top_k)

    def _compute(self, predictions: Tensor, references: Tensor) -> dict[str, float]:
        more = {f"top{k}_accuracy": accuracy(predictions, references, k) for k in self.top_k}
        return {"accuracy": accuracy(predictions, references), **more}


class CalibrationError(LogitMetric):
    """Expected calibration error from logits (a softmax makes the probabilities), as `calibration_error`.

    Args:
        bins: number of bins of equal width, 15 by default.
    """

    citation = "Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017. arXiv 1706.04599"

    def __init__(self, bins: int = 15, **kwargs):
        super().__init__(**kwargs)
        self.bins = bins

    def _compute(self, predictions: Tensor, references: Tensor) -> dict[str, float]:
        return {"calibration_error": expected_calibration_error(predictions.softmax(dim=-1), references, self.bins)}


def as_compute_metrics(*metrics: evaluate.Metric) -> Callable[[EvalPrediction], dict[str, float]]:
    """Join metrics to a `compute_metrics` of a Trainer.

    The predictions are the model's logits. Where it returns several outputs, they are the first one: of a `CLIPModel`
    `logits_per_image`.

    Args:
        metrics: of this file, or any whose predictions and references are the logits and the labels.

    Returns:
        A function from an `EvalPrediction` to all results as floats.

    Raises:
        ValueError: no metric. The function raises it where there are no labels, or two metrics give the same name.
    """
    if not metrics:
        raise ValueError("as_compute_metrics needs at least one metric, for instance Accuracy().")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        if labels is None or isinstance(labels, tuple | list):
            raise ValueError("metrics need one array of labels: check label_names of the training arguments.")
        if len(logits) != len(labels) or not len(labels):
            raise ValueError(f"{len(logits)} rows of logits and {len(labels)} labels: give one or more of both alike.")
        results = {}
        for metric in metrics:
            for start in range(0, len(labels), ROWS):
                rows = slice(start, start + ROWS)
                metric.add_batch(predictions=logits[rows], references=labels[rows])
            for name, value in metric.compute().items():
                if name in results:
                    raise ValueError(f"two metrics give {name!r}: leave one of them out.")
                results[name] = float(value)
        return results

    return compute_metrics
