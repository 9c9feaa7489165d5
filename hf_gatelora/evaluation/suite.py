"""Suites of ID, OOD and retention sets, and how each family of models is measured on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..gates import engines
from ..records import KNN_TOP1, ROLES, Metric, metric_of
from .backbone import backbone_features, head_names
from .classification import accuracy, check_labels
from .knn import knn_logits
from .retrieval import recall_at
from .zero_shot import ensemble_text_features, image_features, text_features

if TYPE_CHECKING:
    from .metrics import LogitMetric


@dataclass
class EvalSet:
    """A set of images to measure on.

    Args:
        role: `"id"`, `"ood"` or `"retention"`.
        name, split: how results name it.
        images: n rows with `pixel_values` of shape (3, H, W).
        labels: n class indices, as a tensor or a list; None by default.
        class_names: what the labels index.
        captions: n texts, for retrieval.
        bank: labelled images whose neighbours vote on these ones (k-NN); its labels index the same classes.
        dataset: id of the data set on the Hub, if it is from there: the model card names it in its metadata.
        revision: commit of that data set, if it is known.

    Raises:
        ValueError: if lengths, labels and classes do not match, or there is nothing to measure.
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
        what = f"{self.role} set {self.name!r}" + (f" ({self.split})" if self.split else "")
        if self.labels is None and self.captions is None:
            raise ValueError(
                f"{what} has neither labels nor captions: nothing can be measured. Are its columns named like those of "
                "the training images?"
            )
        if self.labels is not None:
            self.labels = torch.as_tensor(self.labels)
            if self.labels.ndim != 1 or self.labels.is_floating_point():
                found = f"{str(self.labels.dtype).removeprefix('torch.')} of shape {tuple(self.labels.shape)}"
                raise ValueError(f"{what}: labels are {found}, expected one class index per image.")
        for name in ("labels", "captions"):
            found = getattr(self, name)
            if found is not None and len(found) != len(self.images):
                raise ValueError(f"{what} has {len(self.images)} images, but {len(found)} {name}: give one per image.")
        if self.class_names is not None:
            self.class_names = list(self.class_names)
            if self.labels is not None and len(self.labels):
                check_labels(self.labels, len(self.class_names), f"{what}: labels")
        bank = self.bank
        if bank is not None and None not in (bank.class_names, self.class_names):
            _check_order(f"{what}: the classes of its bank and its own", bank.class_names, self.class_names)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def sample(self, count: int) -> "EvalSet":
        """At most `count` of the images, always the same ones, and as many images of the bank."""
        rows = list(range(len(self)))
        if len(rows) > count:
            rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].sort().values.tolist()
        return replace(
            self,
            images=Subset(self.images, rows),
            labels=None if self.labels is None else self.labels[rows],
            captions=None if self.captions is None else [self.captions[row] for row in rows],
            bank=None if self.bank is None else self.bank.sample(count),
        )


@dataclass(kw_only=True)
class Suite(ABC):
    """Sets, and how a model is measured on one of them: `metrics`, of the subclasses below or of your own.

    Args:
        sets: what to measure on.
        batch_size: images per forward pass, 64 by default.
        num_workers: processes that load images; 0, the default, loads them in this process.
        logit_metrics: what is measured from logits and labels; default: accuracy and calibration error.
    """

    sets: list[EvalSet]
    batch_size: int = 64
    num_workers: int = 0
    logit_metrics: "Sequence[LogitMetric] | None" = None

    @abstractmethod
    def metrics(self, model: nn.Module, data: EvalSet, title: str) -> dict[Metric | str, float]:
        """Measure a model on one set. Collective.

        Returns:
            Values by their metric, for instance `{Metric("nll", "NLL", "nats", higher_is_better=False): 1.9}`; those of
            unit `"%"` are fractions. A name stands for one of `records.METRICS`, or for a plain number of which
            nothing is known.
        """

    @property
    def way(self) -> dict:
        """How it measures, for the arguments in results: see `way_of`. Empty by default."""
        return {}

    def of_logits(self, logits: Tensor, labels: Tensor) -> dict[Metric, float]:
        """Measure logits of shape (n, classes) and class indices of shape (n,) by `logit_metrics`."""
        from .metrics import LOGIT_METRICS  # late: it loads evaluate and datasets, which training alone does not need

        metrics = LOGIT_METRICS if self.logit_metrics is None else self.logit_metrics
        return {m: value for metric in metrics for m, value in metric.measure(logits, labels).items()}

    def measure(self, model: nn.Module, title: str = "") -> list[dict]:
        """Measure a model on every set. Collective; shows progress, under `title`.

        Returns:
            One row per metric, with role, data, split, metric, value and n; also dataset and revision for data sets
            of the Hub, and the fields of a metric that its name alone does not tell.
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
            for metric, value in found.items():
                said = metric.fields() if isinstance(metric, Metric) else {"metric": metric}
                rows.append({**row, **said, "value": value})
        return rows

    def sample(self, count: int) -> "Suite":
        """The same suite on at most `count` images of each set."""
        return replace(self, sets=[data.sample(count) for data in self.sets])


@dataclass(kw_only=True)
class ClipSuite(Suite):
    """Zero-shot accuracy and calibration of a `CLIPModel` if a set has labels, else image-text retrieval.

    Args:
        tokenize: makes `input_ids` and `attention_mask` from a list of strings.
        templates: prompts with {} for the class name; the text features of a class are their mean.
        probe: weight (classes, d) and bias (classes,) of a linear classifier on the image features, which replaces the
            class texts on ID and OOD sets.
    """

    tokenize: Callable[[list[str]], dict[str, Tensor]]
    templates: tuple[str, ...] = ("a photo of a {}",)
    probe: tuple[Tensor, Tensor] | None = None

    @property
    def way(self):
        return {"templates": list(self.templates)}

    def metrics(self, model, data, title):
        images = image_features(model, data.images, self.batch_size, title, self.num_workers)
        if data.labels is None:
            return recall_at(images, text_features(model, self.tokenize(data.captions)), data.captions)
        if self.probe is not None and data.role != "retention":
            weight, bias = self.probe
            return self.of_logits(images @ weight.T + bias, data.labels)
        names = [name.replace("_", " ") for name in data.class_names]
        classes = ensemble_text_features(model, self.tokenize, names, list(self.templates))
        return self.of_logits(_logit_scale(model) * images @ classes.T, data.labels)


@dataclass(kw_only=True)
class ClassifierSuite(Suite):
    """Accuracy and calibration of a vision backbone by a classification head, and k-NN accuracy.

    ID and OOD sets are measured by the model's own head, retention sets by the head that the base model came with.

    Args:
        original_head: the module that the base model was published with; None if it had none.
        head_classes: by name of a retention set, the output of that head for each of the set's classes; sets that are
            not named are not measured by it.
        k, temperature: of k-NN, 20 and 0.07 by default as in DINO (arXiv 2104.14294).
    """

    original_head: nn.Module | None = None
    head_classes: dict[str, Tensor] = field(default_factory=dict)
    k: int = 20
    temperature: float = 0.07

    def __post_init__(self):
        for data in self.sets:
            if data.bank is not None and (data.bank.labels is None or len(data.bank) < self.k):
                found = "no labels" if data.bank.labels is None else f"{len(data.bank)} images"
                raise ValueError(
                    f"The bank of the {data.role} set {data.name!r} has {found}, and {self.k} labelled neighbours "
                    "vote: give a larger bank with labels, or a smaller k."
                )

    @property
    def way(self):
        return {"k": self.k, "temperature": self.temperature}

    @torch.no_grad()
    def metrics(self, model, data, title):
        found = {}
        features = backbone_features(model, data.images, self.batch_size, title, self.num_workers)
        if data.role != "retention":
            if features.logits.shape[1]:  # a bare backbone has no head
                names = head_names(model.config.id2label)
                if names and data.class_names and set(names) == set(data.class_names):
                    _check_order(f"The classes of {data.name!r} and of the model's id2label", data.class_names, names)
                found |= self.of_logits(features.logits, data.labels)
        elif data.name in self.head_classes:
            logits = self.original_head(features.head_input)  # both are on the CPU
            found |= self.of_logits(logits[:, self.head_classes[data.name]], data.labels)
        if data.bank is not None:
            bank = backbone_features(
                model, data.bank.images, self.batch_size, f"{title}, bank", self.num_workers
            ).pooled
            device = next(model.parameters()).device
            queries, bank = (nn.functional.normalize(f.to(device), dim=-1) for f in (features.pooled, bank))
            labels = data.bank.labels.to(device)
            votes = knn_logits(queries, bank, labels, len(data.class_names), self.k, self.temperature).cpu()
            found[KNN_TOP1] = accuracy(votes, data.labels)
        return found


def rows_of_base(rows: list[dict], trained_head: bool) -> list[dict]:
    """The rows of a base model that count: a head that nobody trained is not a base.

    Retention sets always count: they are measured by the published head or without one.

    Args:
        rows: of the untouched base.
        trained_head: whether the head that it was measured with on ID and OOD sets is trained, as a published or a
            fitted one is. A new head that training started from is not.
    """
    return [row for row in rows if trained_head or row["role"] == "retention" or not metric_of(row).needs_head]


def _check_order(what: str, found: list[str], expected: list[str]) -> None:
    pairs = enumerate(zip_longest(found, expected))
    if different := next((pair for pair in pairs if pair[1][0] != pair[1][1]), None):
        place, (here, there) = different
        raise ValueError(f"{what} are not in the same order: class {place} is {here!r} and {there!r}.")


def _logit_scale(model: nn.Module) -> Tensor:
    found = next(value for name, value in model.named_parameters() if name.endswith("logit_scale"))
    return engines.read([found])[0].float().cpu().reshape(()).exp()
