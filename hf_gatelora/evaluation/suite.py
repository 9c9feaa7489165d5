"""Suites of ID, OOD and retention sets, and how each family of models is measured on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..gates import engines
from ..records import ROLES
from .backbone import backbone_features
from .classification import accuracy, expected_calibration_error
from .knn import knn_logits
from .retrieval import recall_at
from .zero_shot import ensemble_text_features, image_features, text_features


@dataclass
class EvalSet:
    """A set of images to measure on.

    Args:
        role: `"id"`, `"ood"` or `"retention"`.
        name, split: how results name it.
        images: rows with `pixel_values` of shape (3, H, W).
        labels: class indices of shape (n,), or None.
        class_names: what the labels index.
        captions: one text per image, for retrieval.
        bank: labelled images whose neighbours vote on these ones (k-NN); the labels mean the same classes.
        dataset: id of the data set on the Hub, where it is from there: the model card names it in its metadata.
        revision: commit of that data set, where it is known.
    """

    role: str
    name: str
    images: Dataset
    split: str = ""
    labels: Tensor | None = None
    class_names: list[str] | None = None
    captions: list[str] | None = None
    bank: "EvalSet | None" = None
    dataset: str | None = None
    revision: str | None = None

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r} is not known: use one of {ROLES}.")
        if self.labels is None and self.captions is None:
            raise ValueError(
                f"{self.role} set {self.name!r} ({self.split}) has neither labels nor captions: nothing can be "
                "measured. Are its columns called as those of the training images?"
            )

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, count: int) -> "EvalSet":
        """At most `count` of the images, always the same ones, and as many of the bank."""
        if len(self) <= count:
            rows = range(len(self))
        else:
            rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].sort().values.tolist()
        return replace(
            self,
            images=Subset(self.images, rows),
            labels=None if self.labels is None else self.labels[list(rows)],
            captions=None if self.captions is None else [self.captions[row] for row in rows],
            bank=None if self.bank is None else self.bank.sample(count),
        )


@dataclass(kw_only=True)
class Suite(ABC):
    """Sets, and how a model is measured on one of them: `metrics`, of the subclasses below or of your own.

    Args:
        sets: what to measure on.
        batch_size: images per forward pass.
        num_workers: processes that load images; 0: none.
    """

    sets: list[EvalSet]
    batch_size: int = 64
    num_workers: int = 0

    @abstractmethod
    def metrics(self, model: nn.Module, data: EvalSet, title: str) -> dict[str, float]:
        """Measure a model on one set: metric name to value, accuracies as fractions. Collective."""

    def measure(self, model: nn.Module, title: str = "") -> list[dict]:
        """Measure a model on every set. Collective; shows progress, under `title`.

        Returns:
            One row per metric, with role, data, split, metric, value and n; data sets of the Hub also with dataset and
            revision.
        """
        rows = []
        for data in self.sets:
            row = {"role": data.role, "data": data.name, "split": data.split, "n": len(data)}
            row |= {key: value for key in ("dataset", "revision") if (value := getattr(data, key)) is not None}
            found = self.metrics(model, data, f"{title}: {data.name}" if title else data.name)
            if not found:
                raise ValueError(
                    f"Nothing is measured on the {data.role} set {data.name!r}: it needs classes that the head has, or "
                    "a bank for k-NN."
                )
            rows += [{**row, "metric": metric, "value": value} for metric, value in found.items()]
        return rows

    def sample(self, count: int) -> "Suite":
        """The same suite on at most `count` images of each set."""
        return replace(self, sets=[data.sample(count) for data in self.sets])


@dataclass(kw_only=True)
class ClipSuite(Suite):
    """Zero-shot accuracy and calibration where a set has labels, else image-text retrieval, of a `CLIPModel`.

    Args:
        tokenize: from a list of strings to `input_ids` and `attention_mask`.
        templates: prompts with {} for the class name; a class's text features are their mean.
        probe: weight (classes, d) and bias (classes,) of a linear classifier on the image features, which then stands
            in for the class texts on ID and OOD sets.
    """

    tokenize: Callable[[list[str]], dict[str, Tensor]]
    templates: tuple[str, ...] = ("a photo of a {}",)
    probe: tuple[Tensor, Tensor] | None = None

    def metrics(self, model, data, title):
        images = image_features(model, data.images, self.batch_size, title, self.num_workers)
        if data.labels is None:
            return recall_at(images, text_features(model, self.tokenize(data.captions)), data.captions)
        if self.probe is not None and data.role != "retention":
            weight, bias = self.probe
            return _accuracy(images @ weight.T + bias, data.labels)
        names = [name.replace("_", " ") for name in data.class_names]
        classes = ensemble_text_features(model, self.tokenize, names, list(self.templates))
        return _accuracy(_logit_scale(model) * images @ classes.T, data.labels)


@dataclass(kw_only=True)
class ClassifierSuite(Suite):
    """Accuracy and calibration by a classification head, and k-NN accuracy, of a vision backbone.

    ID and OOD sets are measured by the model's own head, retention sets by the head that the base model came with.

    Args:
        original_head: the module that the base model was published with; None where it had none.
        head_classes: by name of the retention set, for each of its classes the index among that head's outputs; what
            is not named is not measured by it.
        k, temperature: of k-NN (20 and 0.07 in DINO, arXiv 2104.14294).
    """

    original_head: nn.Module | None = None
    head_classes: dict[str, Tensor] = field(default_factory=dict)
    k: int = 20
    temperature: float = 0.07

    @torch.no_grad()
    def metrics(self, model, data, title):
        found = {}
        features = backbone_features(model, data.images, self.batch_size, title, self.num_workers)
        if data.role != "retention":
            if features.logits.shape[1]:  # a bare backbone has no head
                found |= _accuracy(features.logits, data.labels)
        elif data.name in self.head_classes:
            logits = self.original_head(features.head_input)  # on the CPU, where both are
            found |= _accuracy(logits[:, self.head_classes[data.name]], data.labels)
        if data.bank is not None:
            bank = backbone_features(
                model, data.bank.images, self.batch_size, f"{title}, bank", self.num_workers
            ).pooled
            device = next(model.parameters()).device
            queries, bank = (nn.functional.normalize(f.to(device), dim=-1) for f in (features.pooled, bank))
            labels = data.bank.labels.to(device)
            votes = knn_logits(queries, bank, labels, len(data.class_names), self.k, self.temperature).cpu()
            found["knn_top1"] = accuracy(votes, data.labels)
        return found


def _accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "top1": accuracy(logits, labels),
        "ece": expected_calibration_error(logits.softmax(-1), labels),
    }


def _logit_scale(model: nn.Module) -> Tensor:
    found = next(value for name, value in model.named_parameters() if name.endswith("logit_scale"))
    return engines.read([found])[0].float().cpu().reshape(()).exp()
