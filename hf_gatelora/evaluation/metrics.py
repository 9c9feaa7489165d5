"""Metrics of a classifier's logits, for suites and for the `compute_metrics` of a Trainer alike.

They are `evaluate.Metric`s that load without a network. To add one, write a `LogitMetric` here, and add it to
`LOGIT_METRICS` if every suite is to measure it.

k-NN accuracy and retrieval recall are not among them: they compare the features of all images with those of a bank or
of texts, from one state of the model, which an evaluation loop over one data set does not see. Use `knn_logits` with
`accuracy`, and `recall_at`.
"""

import os
from collections.abc import Callable, Iterable

import evaluate
import torch
from datasets import Features, Sequence, Value
from torch import Tensor
from transformers import EvalPrediction

from ..records import ECE, TOP1, Metric
from .classification import accuracy, expected_calibration_error


class LogitMetric(evaluate.Metric):
    """Base of the metrics whose predictions are logits (n, classes) and whose references are class indices (n,).

    A subclass defines `measure`. Everything stays in memory: processes do not share files, nothing is written.
    """

    citation = ""

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True} | kwargs)

    def measure(self, logits: Tensor, labels: Tensor) -> dict[Metric, float]:
        """What is measured: each value by the `Metric` that says what it means."""
        raise NotImplementedError

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float]:
        """Values by name: of these predictions and references, or of those that `add_batch` collected."""
        if predictions is None:
            return super().compute(**kwargs)
        return self._compute(torch.as_tensor(predictions), torch.as_tensor(references))

    def _compute(self, predictions: Tensor, references: Tensor) -> dict[str, float]:
        return {metric.name: value for metric, value in self.measure(predictions, references).items()}

    def _build_data_dir(self) -> str:
        # evaluate makes this folder, in its cache, even if nothing is kept there.
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
    """Accuracy, as `top1`, and top-k accuracy, as `top{k}`.

    Args:
        top_k: further values of k, none by default.
    """

    citation = "Russakovsky et al. ImageNet Large Scale Visual Recognition Challenge. IJCV 2015. arXiv 1409.0575"

    def __init__(self, top_k: Iterable[int] = (), **kwargs):
        super().__init__(**kwargs)
        self.top_k = tuple(top_k)

    def measure(self, logits, labels):
        more = {
            Metric(f"top{k}", f"top-{k} accuracy", "%", True, True): accuracy(logits, labels, k) for k in self.top_k
        }
        return {TOP1: accuracy(logits, labels), **more}


class CalibrationError(LogitMetric):
    """Expected calibration error, as `ece`; a softmax makes the probabilities.

    Args:
        bins: number of bins of equal width, 15 by default.
    """

    citation = "Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017. arXiv 1706.04599"

    def __init__(self, bins: int = 15, **kwargs):
        super().__init__(**kwargs)
        self.bins = bins

    def measure(self, logits, labels):
        return {ECE: expected_calibration_error(logits.softmax(dim=-1), labels, self.bins)}


LOGIT_METRICS = (Accuracy(), CalibrationError())


def as_compute_metrics(*metrics: evaluate.Metric) -> Callable[[EvalPrediction], dict[str, float]]:
    """Join metrics to a `compute_metrics` of a Trainer.

    The predictions are the model's logits. If it returns several outputs, they are the first one: of a `CLIPModel`
    `logits_per_image`.

    Args:
        metrics: of this file, or any whose predictions and references are the logits and the labels.

    Returns:
        A function from an `EvalPrediction` to all results as floats.

    Raises:
        ValueError: if there is no metric. The function raises it if there are no labels, or two metrics give the same
            name.
    """
    if not metrics:
        raise ValueError("as_compute_metrics needs at least one metric, for instance Accuracy().")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        if labels is None or isinstance(labels, tuple | list):
            raise ValueError("Metrics need one array of labels: check label_names of the training arguments.")
        results = {}
        for metric in metrics:
            for name, value in metric.compute(predictions=logits, references=labels).items():
                if name in results:
                    raise ValueError(f"Two metrics give {name!r}: leave one of them out.")
                results[name] = float(value)
        return results

    return compute_metrics
