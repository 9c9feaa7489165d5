"""Every measure against an independent reference: scikit-learn, open_clip, loops, or values by hand."""

import json
import logging
import socket
import subprocess
import sys
from types import SimpleNamespace

import evaluate
import numpy as np
import open_clip
import pytest
import torch
from models import CLASSES, FAMILIES, Images, collate, lora_config, prompts, tiny_clip, tiny_dinov2
from peft import get_peft_model
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_gatelora import RetentionCallback
from hf_gatelora.card.tables import results_table
from hf_gatelora.cli.evaluate import describe_results
from hf_gatelora.evaluation import knn
from hf_gatelora.evaluation.classification import accuracy, expected_calibration_error
from hf_gatelora.evaluation.knn import knn_logits
from hf_gatelora.evaluation.linear_probe import fit_linear_probe
from hf_gatelora.evaluation.metrics import LOGIT_METRICS, Accuracy, CalibrationError, LogitMetric, as_compute_metrics
from hf_gatelora.evaluation.results import update_results
from hf_gatelora.evaluation.retrieval import recall_at
from hf_gatelora.evaluation.suite import ClassifierSuite, EvalSet, Suite, rows_of_base
from hf_gatelora.evaluation.templates import imagenet_class_names, prompt_templates
from hf_gatelora.evaluation.zero_shot import ensemble_text_features, text_features
from hf_gatelora.records import METRICS, TOP1, Metric, metric_of, primary, read_results, write_results


def features_of(count, classes, width=6, seed=0, spread=1.0):
    """Random features around one centre per class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels


def normalized(features):
    return torch.nn.functional.normalize(features, dim=-1)


def random_logits(count=200, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes)
    return 2 * torch.randn(count, classes, generator=generator) + signal, labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5), (60, 0.02)])
def test_knn_is_scikit_learns_with_the_weights_of_dino(k, temperature, monkeypatch):
    monkeypatch.setattr(knn, "SIMILARITIES", 7 * 60)  # chunks of 7 of the 25 queries
    bank, labels = features_of(60, 4, seed=1)
    queries, _ = features_of(25, 4, seed=2)
    bank, queries = normalized(bank), normalized(queries)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double().numpy(), labels.numpy())
    scores = knn_logits(queries, bank, labels, 6, k, temperature)  # classes 4 and 5 have no rows
    expected = torch.from_numpy(reference.predict_proba(queries.double().numpy())).float()
    torch.testing.assert_close(scores[:, :4] / scores.sum(1, keepdim=True), expected, atol=1e-4, rtol=1e-4)
    assert not scores[:, 4:].any()
    if k == 1:  # the score itself, not only its share
        cosines = (queries @ bank.T).max(1).values
        torch.testing.assert_close(scores.sum(1), (cosines / temperature).exp(), rtol=1e-4, atol=0)


def test_knn_of_half_precision_does_not_overflow():
    bank, labels = features_of(60, 4)
    scores = knn_logits(normalized(bank).half(), normalized(bank).half(), labels, 4)
    assert scores.isfinite().all()
    assert accuracy(scores, labels) > 0.8


UNIT = torch.eye(4)
BAD_KNN = {
    "k": ((UNIT, UNIT, torch.arange(4), 4, 5), r"k = 5 neighbours cannot be taken from a bank of 4 rows"),
    "no_k": ((UNIT, UNIT, torch.arange(4), 4, 0), "give 1 <= k"),
    "width": ((UNIT[:, :3], UNIT, torch.arange(4), 4, 1), r"shape \(4, 3\) and bank of shape \(4, 4\) do not match"),
    "labels": ((UNIT, UNIT, torch.arange(3), 4, 1), "one label for each of the 4 rows"),
    "label_above": ((UNIT, UNIT, torch.arange(4), 3, 1), "between 0 and 3, outside the 3 classes"),
    "label_below": ((UNIT, UNIT, torch.arange(4) - 1, 4, 1), "between -1 and 2, outside"),
    "norm": ((UNIT, 3 * UNIT, torch.arange(4), 4, 1), "bank have norms between 3 and 3: L2-normalise"),
    "nan": ((UNIT * torch.nan, UNIT, torch.arange(4), 4, 1), "queries have norms"),
    "temperature": ((UNIT, UNIT, torch.arange(4), 4, 1, 0.01), "overflow"),
}


@pytest.mark.parametrize("case", BAD_KNN)
def test_bad_knn(case):
    arguments, message = BAD_KNN[case]
    with pytest.raises(ValueError, match=message):
        knn_logits(*arguments)


def reference_probe(features, labels, classes, penalty):
    """The documented objective, minimised with torch in fp64; returns the probabilities of the features."""
    x = features.double()
    spread = (x - x.mean(0)).square().sum(1).mean()
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels)
        loss = loss + penalty / 2 * spread * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return (x @ weight.T + bias).softmax(1).detach().float()


def probe(features, labels, classes, **arguments):
    layer = torch.nn.Linear(features.shape[1], classes)
    weight, bias = fit_linear_probe(features, labels, classes, **arguments)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer(features).softmax(1)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_linear_probe_minimises_its_objective(classes, penalty):
    features, labels = features_of(121, classes)
    expected = reference_probe(features, labels, classes, penalty)
    torch.testing.assert_close(probe(features, labels, classes, penalty=penalty), expected, atol=1e-3, rtol=0)
    # Neither the number of samples nor scale and offset of the features change what the penalty does.
    twice = probe(10 * torch.cat([features, features]) + 3, labels.repeat(2), classes, penalty=penalty)
    torch.testing.assert_close(twice[: len(features)], expected, atol=1e-3, rtol=0)


def test_linear_probe_leaves_something_to_learn():
    features, labels = features_of(40, 4, width=64)  # separable: without the penalty the loss goes to 0
    probabilities = probe(features, labels, 4)
    assert accuracy(probabilities, labels) == 1
    assert 0.005 < -probabilities[range(40), labels].log().mean() < 0.5


@pytest.mark.parametrize("present", [[1, 4], [0, 2, 5]])
def test_linear_probe_never_predicts_classes_without_samples(present):
    features, own = features_of(60, len(present))
    labels = torch.tensor(present)[own]
    weight, bias = fit_linear_probe(features, labels, 6)
    torch.testing.assert_close(
        (features @ weight.T + bias).softmax(1)[:, present],
        reference_probe(features, own, len(present), 1e-3),
        atol=1e-3,
        rtol=0,
    )
    absent = sorted(set(range(6)) - set(present))
    assert not weight[absent].any()
    far = 1000 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert set((far @ weight.T + bias).argmax(1).tolist()) == set(present)


def test_linear_probe_takes_half_precision_and_constant_features():
    features, labels = features_of(60, 3)
    weight, bias = fit_linear_probe(features.bfloat16().requires_grad_(), labels, 3)
    assert weight.dtype == bias.dtype == torch.float32
    assert not weight.requires_grad
    weight, bias = fit_linear_probe(torch.ones(4, 2), torch.tensor([0, 0, 0, 1]), 2)
    torch.testing.assert_close(bias.softmax(0), torch.tensor([0.75, 0.25]), atol=1e-3, rtol=0)
    assert not weight.any()


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([0, 1, 2], {}, r"shape \(4, 2\) and labels of shape \(3,\) do not match"),
        ([0, 0, 0, 0], {}, r"the labels hold 1 classes \(\[0\]\)"),
        ([0, 1, 2, 3], {}, "between 0 and 3, outside the 3 classes"),
        ([-1, 0, 1, 1], {}, "between -1 and 1, outside"),
        ([0, 0, 1, 1], {"penalty": 0.0}, "give a positive number"),
    ],
)
def test_bad_linear_probe(labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(torch.randn(4, 2), torch.tensor(labels), 3, **arguments)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_accuracy_is_scikit_learns(k):
    logits, labels = random_logits()
    expected = top_k_accuracy_score(labels.numpy(), logits.numpy(), k=k)
    assert accuracy(logits, labels, k) == pytest.approx(expected)
    if k == 1:
        assert accuracy(logits, labels) == pytest.approx(accuracy_score(labels.numpy(), logits.argmax(1).numpy()))


def test_calibration_error_by_hand():
    # Confidences 0.9 (right), 0.9 (wrong), 0.6 (right), 0.55 (right); with 5 bins: {0.9, 0.9}, {0.6, 0.55}.
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.55, 0.45]])
    labels = torch.tensor([0, 0, 0, 0])
    expected = 2 / 4 * abs(1 / 2 - 0.9) + 2 / 4 * abs(1 - 0.575)
    assert expected_calibration_error(probabilities, labels, bins=5) == pytest.approx(expected)
    # The upper edge belongs to a bin: with 4 bins (0.5, 0.75] holds both 0.75 (right) and 0.625 (wrong).
    edge = torch.tensor([[0.75, 0.25], [0.375, 0.625]])
    assert expected_calibration_error(edge, labels[:2], bins=4) == pytest.approx(abs(1 / 2 - 0.6875))
    assert expected_calibration_error(torch.eye(3), torch.arange(3)) == 0
    assert expected_calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 1


@pytest.mark.parametrize("bins", [1, 15, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_calibration_error_is_that_of_a_loop(bins, dtype):
    logits, labels = random_logits()
    probabilities = logits.softmax(1).to(dtype)
    confidences, correct = probabilities.double().max(1).values.numpy(), (logits.argmax(1) == labels).numpy()
    expected = 0.0
    for lower, upper in zip(np.arange(bins) / bins, np.arange(1, bins + 1) / bins):
        inside = (confidences > lower) & (confidences <= upper)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6  # bfloat16 moves confidences over the edges of the bins
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected, abs=tolerance)


LOGITS = torch.zeros(3, 4)
BAD_SCORES = {
    "labels": (lambda: accuracy(LOGITS, torch.zeros(2)), r"logits of shape \(3, 4\) and labels of shape \(2,\)"),
    "empty": (lambda: accuracy(LOGITS[:0], torch.zeros(0)), "n at least 1"),
    "top_k": (lambda: accuracy(LOGITS, torch.zeros(3), 5), "top-5 accuracy does not exist for 4 classes"),
    "logits": (lambda: expected_calibration_error(LOGITS - 1, torch.zeros(3)), "Apply a softmax"),
    "sum": (lambda: expected_calibration_error(LOGITS + 0.5, torch.zeros(3)), "sums between 2 and 2"),
    "nan": (lambda: accuracy(LOGITS * torch.nan, torch.zeros(3)), "3 of 3 rows of logits hold NaN"),
    "nan_ece": (lambda: expected_calibration_error(LOGITS * torch.nan, torch.zeros(3)), "outputs are not finite"),
    "above": (lambda: accuracy(LOGITS, torch.tensor([0, 1, 4])), r"between 0 and 4, outside the 4 classes 0 \.\.\. 3"),
    "below": (lambda: CalibrationError().measure(LOGITS, torch.tensor([0, -1, 1])), "between -1 and 1, outside"),
    "bins": (lambda: expected_calibration_error(LOGITS + 0.25, torch.zeros(3), 0), "bins = 0"),
    "no_metric": (as_compute_metrics, "at least one metric"),
    "no_labels": (lambda: as_compute_metrics(Accuracy())(EvalPrediction(LOGITS, None)), "check label_names"),
    "rows": (lambda: as_compute_metrics(Accuracy())(EvalPrediction(LOGITS, np.zeros(2))), r"shape \(2,\) do not match"),
    "twice": (
        lambda: as_compute_metrics(Accuracy(), Accuracy())(EvalPrediction(LOGITS.numpy(), np.zeros(3, int))),
        "Two metrics give 'top1'",
    ),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores(case):
    call, message = BAD_SCORES[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_recall_by_hand():
    """Cosines of three images (rows) with three texts."""
    texts = torch.eye(3)
    images = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.4, 0.2], [0.3, 0.6, 0.5]])
    # The own text is at rank 1, 2 and 2; the own image of each text is at rank 1, 3 and 1.
    assert recall_at(images, texts, ["a", "b", "c"], ks=(1, 2, 3, 10)) == pytest.approx(
        {
            "image_to_text_recall@1": 1 / 3,
            "image_to_text_recall@2": 1,
            "image_to_text_recall@3": 1,
            "image_to_text_recall@10": 1,
            "text_to_image_recall@1": 2 / 3,
            "text_to_image_recall@2": 2 / 3,
            "text_to_image_recall@3": 1,
            "text_to_image_recall@10": 1,
        }
    )
    assert list(recall_at(images, texts, ["a", "b", "c"])) == [
        f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    ]
    # Captions 0 and 1 are the same: image 1 has a match at rank 1, text 1 (second column: 0.5, 0.4, 0.6) at rank 2.
    found = recall_at(images, texts, ["a", "a", "c"], ks=[1, 2])
    assert list(found.values()) == pytest.approx([2 / 3, 1, 2 / 3, 1])


@pytest.mark.parametrize("groups", [[7, 7, 2], ["x", "x", "y"], torch.tensor([5, 5, 0])])
def test_recall_with_several_captions_an_image(groups):
    """Texts 0 and 1 describe image A, text 2 image B: two images are ranked, not three."""
    texts = torch.eye(3)
    a, b = torch.tensor([[0.1, 0.5, 0.9], [0.6, 0.7, 0.2]])
    images = torch.stack([a, a, b])
    # A finds a text of its own at rank 2 (C, B, A), B at rank 3. Texts find: B first, B first, A first.
    found = recall_at(images, texts, ["a", "b", "c"], ks=(1, 2, 3), groups=groups)
    assert list(found.values()) == pytest.approx([0, 1 / 2, 1, 0, 1, 1])
    # Caption 0 is caption 2 as well: all images match both, text 1 still matches image A only.
    found = recall_at(images, texts, ["a", "b", "a"], ks=(1, 2), groups=groups)
    assert list(found.values()) == pytest.approx([1 / 2, 1, 2 / 3, 1])


def test_recall_is_that_of_a_loop_in_any_chunks(monkeypatch):
    texts, labels = features_of(60, 12, seed=4)
    images, _ = features_of(60, 12, seed=5)
    captions = [f"caption {label}" for label in labels.tolist()]
    groups = (torch.arange(60) // 2).tolist()  # images of two captions
    similarity = (images @ texts.T).numpy()
    hits = {"image_to_text": [], "text_to_image": []}

    def match(i, j):
        return any(groups[p] == groups[i] and captions[p] == captions[j] for p in range(60))

    for i in range(0, 60, 2):
        hits["image_to_text"].append([match(i, j) for j in np.argsort(-similarity[i])[:10]])
    for j in range(60):
        hits["text_to_image"].append([match(2 * i, j) for i in np.argsort(-similarity[::2, j])[:10]])
    expected = {f"{d}_recall@{k}": np.mean([any(h[:k]) for h in rows]) for d, rows in hits.items() for k in (1, 5, 10)}
    assert recall_at(images, texts, captions, groups=groups) == pytest.approx(expected)
    monkeypatch.setattr(knn, "SIMILARITIES", 100)
    assert recall_at(images, texts, captions, groups=groups) == pytest.approx(expected)


def test_bad_recall():
    with pytest.raises(ValueError, match=r"do not match: {'images': 4, 'texts': 4, 'captions': 3"):
        recall_at(UNIT, UNIT, ["a"] * 3)
    with pytest.raises(ValueError, match="'groups': 2"):
        recall_at(UNIT, UNIT, ["a"] * 4, groups=[0, 1])
    with pytest.raises(ValueError, match=r"ks = \(0,\)"):
        recall_at(UNIT, UNIT, ["a"] * 4, ks=(0,))


class OpenClip(torch.nn.Module):
    """An open_clip model with the text side of a `CLIPModel`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_text_features(self, input_ids, attention_mask):
        return SimpleNamespace(pooler_output=self.model.encode_text(input_ids))


def test_ensemble_is_open_clips_zero_shot_classifier():
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8}
    text = {"layers": 1, "width": 16, "heads": 2, "context_length": 12, "vocab_size": 64}
    model = open_clip.CLIP(8, vision, text).train()

    def ids(texts):
        words = [[2 + sum(map(ord, word)) % 60 for word in text.split()] for text in texts]
        return torch.tensor([[1, *row, 63, *[0] * (10 - len(row))] for row in words])

    def tokenize(texts):
        return {"input_ids": ids(texts), "attention_mask": torch.ones(len(texts), 12)}

    names = ["cat", "sea lion", "sports car", "tree", "teapot"]
    templates = prompt_templates("simple")
    expected = open_clip.build_zero_shot_classifier(model, ids, names, templates).T
    for batch_size in (256, 17, 3):  # all classes, two classes, and less than one class in a batch
        actual = ensemble_text_features(OpenClip(model), tokenize, names, templates, batch_size)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert model.training
    (first, *_) = names
    single = text_features(OpenClip(model), tokenize([f"a photo of a {first}"]))
    torch.testing.assert_close(ensemble_text_features(OpenClip(model), tokenize, [first], templates[:1]), single)
    with pytest.raises(ValueError, match=r"'a photo' has no {}"):
        ensemble_text_features(OpenClip(model), tokenize, names, ["a photo"])
    with pytest.raises(ValueError, match="5 class names and 0 templates"):
        ensemble_text_features(OpenClip(model), tokenize, names, [])


def test_ensemble_of_a_clip_model():
    model = tiny_clip()
    ensemble = ensemble_text_features(model, lambda texts: prompts(), ["x", "y"], ["{}", "a {}"])
    each = model.get_text_features(**prompts()).pooler_output.detach()
    each = each / each.norm(dim=1, keepdim=True)
    mean = torch.stack([each[0] + each[1], each[2] + each[3]])
    torch.testing.assert_close(ensemble, mean / mean.norm(dim=1, keepdim=True))


def test_templates_and_class_names(monkeypatch, caplog):
    simple, openai = prompt_templates("simple"), prompt_templates("openai")
    assert len(set(simple)) == 8
    assert len(set(openai)) == 80
    assert openai[0] == "a bad photo of a {}."
    assert all(template.count("{}") == 1 for template in simple + openai)
    assert len(imagenet_class_names()) == 1000
    assert imagenet_class_names()[0] == "tench"
    with pytest.raises(ValueError, match="'clip' are not known: use 'simple' or 'openai'"):
        prompt_templates("clip")
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as where it is not installed
    with caplog.at_level(logging.WARNING):
        assert prompt_templates("openai") == simple
    assert "the 8 'simple' ones are used instead" in caplog.text
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        imagenet_class_names()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where evaluate would write; and no connection can be made."""

    def refuse(*arguments):
        raise AssertionError(f"a connection was tried: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_metrics_of_batches(cache):
    logits, labels = random_logits()
    for metric, expected in (
        (Accuracy(), {"top1": accuracy(logits, labels)}),
        (Accuracy([3]), {"top1": accuracy(logits, labels), "top3": accuracy(logits, labels, 3)}),
        (CalibrationError(), {"ece": expected_calibration_error(logits.softmax(1), labels)}),
        (CalibrationError(3), {"ece": expected_calibration_error(logits.softmax(1), labels, 3)}),
    ):
        assert isinstance(metric, evaluate.Metric)
        assert metric.description
        assert metric.citation
        assert metric.compute(predictions=logits.numpy(), references=labels.numpy()) == pytest.approx(expected)
        for rows in torch.arange(200).split(64):
            metric.add_batch(predictions=logits[rows], references=labels[rows])
        assert metric.compute() == pytest.approx(expected)
        assert metric.compute(predictions=logits.tolist(), references=labels.tolist()) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"logits of shape \(200,\)"):
        Accuracy().compute(predictions=labels, references=labels)
    assert not cache.exists()


def test_metrics_in_a_trainer(cache, tmp_path):
    model = tiny_dinov2()
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_eval_batch_size=5, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        eval_dataset=Images(),
        compute_metrics=as_compute_metrics(Accuracy([2]), CalibrationError()),
    )
    measured = trainer.evaluate()
    with torch.no_grad():
        logits, labels = model(Images().pixels).logits, Images().labels
    right = logits.argmax(1) == labels
    second = logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf).argmax(1) == labels
    assert measured["eval_top1"] == pytest.approx(right.float().mean().item())
    assert measured["eval_top2"] == pytest.approx((right | second).float().mean().item())
    expected = expected_calibration_error(logits.softmax(1), labels)
    assert measured["eval_ece"] == pytest.approx(expected, abs=1e-6)
    assert not cache.exists()


def test_compute_metrics_takes_the_first_of_several_outputs_and_many_rows():
    logits, labels = random_logits(2500, CLASSES)
    prediction = EvalPrediction((logits.numpy(), np.zeros((2500, 2))), labels.numpy())
    compute_metrics = as_compute_metrics(Accuracy())
    for _ in range(2):  # nothing is left of the first call
        assert compute_metrics(prediction) == pytest.approx({"top1": accuracy(logits, labels)})
    assert all(type(value) is float for value in compute_metrics(prediction).values())


# ---- what a value means: suites, rows and tables -----------------------------------------------------------------

NLL = Metric("nll", "NLL", "nats", higher_is_better=False, needs_head=True)


class LogLoss(LogitMetric):
    """Negative log-likelihood."""

    def measure(self, logits, labels):
        return {NLL: torch.nn.functional.cross_entropy(logits, labels).item()}


def test_one_metric_serves_suites_trainers_and_tables(tmp_path):
    """All that a new metric needs is its class."""
    model, images = tiny_dinov2().eval(), Images(8)
    with torch.no_grad():
        logits = model(images.pixels).logits
    expected = torch.nn.functional.cross_entropy(logits, images.labels).item()
    prediction = EvalPrediction(logits.numpy(), images.labels.numpy())
    assert as_compute_metrics(LogLoss())(prediction) == pytest.approx({"nll": expected})
    sets = [EvalSet("id", "x", images, labels=images.labels)]
    suite = ClassifierSuite(sets=sets, logit_metrics=(*LOGIT_METRICS, LogLoss()))
    rows = [{"method": "base", **row} for row in suite.measure(model)]
    assert [row["metric"] for row in rows] == ["top1", "ece", "nll"]
    assert rows[2]["value"] == pytest.approx(expected)
    write_results(rows, tmp_path / "results.jsonl")
    assert [metric_of(row) for row in read_results(tmp_path / "results.jsonl")] == [TOP1, METRICS["ece"], NLL]


def measured(metric, *values, role="id", data="x"):
    """Rows of the base and of an adapter."""
    row = {"role": role, "data": data, "split": "", "n": 4, **metric}
    return [{**row, "method": method, "value": value} for method, value in zip(("base", "gated"), values)]


@pytest.mark.parametrize(
    ("metric", "cells", "line"),
    [
        (NLL.fields(), ["NLL", "1.9 nats", "1.1 nats", "-0.8"], ["NLL", "(nats)", "4", "1.9", "1.1", "(-0.8)"]),
        ({"metric": "my_score"}, ["my score", "1.9", "1.1", "-0.8"], ["my", "score", "4", "1.9", "1.1", "(-0.8)"]),
    ],
)
def test_tables_show_values_in_their_unit(metric, cells, line):
    rows = measured(metric, 1.9, 1.1)
    assert [cell.strip() for cell in results_table(rows).splitlines()[2].split("|")[3:7]] == cells
    assert describe_results(rows).splitlines()[1].split()[2:] == line
    rows = measured(TOP1.fields(), 0.50001, 0.5)  # a change that rounds to zero has no minus
    assert results_table(rows).splitlines()[2].split("|")[6].strip() == "+0.0"
    assert describe_results(rows).splitlines()[1].split()[-2:] == ["50.0", "(+0.0)"]


def test_one_number_of_a_role_does_not_mix_units():
    rows = measured(NLL.fields(), 3.0) + measured(TOP1.fields(), 0.5, data="y") + measured(TOP1.fields(), 0.7, data="z")
    assert primary(rows, "id") == pytest.approx(0.6)
    assert primary(rows[:1], "id") == 3.0
    assert primary(rows, "ood") is None


@pytest.mark.parametrize(
    ("on_id", "on_retention", "base", "now", "kept"),
    [
        (TOP1, TOP1, 0.9, 0.895, 0.6),
        (TOP1, TOP1, 0.9, 0.8, -0.1),
        (TOP1, NLL, 0.9, 0.8, 0.6),  # a loss that falls is kept
        (TOP1, NLL, 0.8, 0.9, -0.1),
        (NLL, TOP1, 0.9, 0.9, None),  # the largest would be the worst
        (Metric("score"), TOP1, 0.9, 0.9, None),
    ],
)
def test_id_kept_knows_what_is_better(on_id, on_retention, base, now, kept):
    class Given(Suite):
        def metrics(self, model, data, title):
            return {on_id: 0.6} if data.role == "id" else {on_retention: base if title.startswith("base") else now}

    sets = [EvalSet(role, role, Images(4), captions=["a"] * 4) for role in ("id", "retention")]
    model = get_peft_model(FAMILIES["dinov2"]["model"](), lora_config(FAMILIES["dinov2"]["model"]()))
    means = RetentionCallback(Given(sets=sets))._measure(model)[2]
    assert means.get("eval_id_kept") == (None if kept is None else pytest.approx(kept))


def test_a_head_that_nobody_trained_is_not_a_base():
    rows = [
        row
        for role in ("id", "retention")
        for m in (TOP1, NLL, METRICS["knn_top1"])
        for row in measured(m.fields(), 1, role=role)
    ]
    assert rows_of_base(rows, trained_head=True) == rows
    counted = [(row["role"], row["metric"]) for row in rows_of_base(rows, trained_head=False)]
    assert counted == [("id", "knn_top1"), *(("retention", name) for name in ("top1", "nll", "knn_top1"))]


def test_what_cannot_be_compared_is_dropped_with_a_word(tmp_path, caplog):
    """A run's arguments and an evaluation's say the same in different words."""

    def rows(arguments, scales=(None,), data="x", **more):
        made = [{**row, "arguments": arguments, **more} for row in measured(TOP1.fields(), 0.5, 0.6, data=data)]
        return [
            {**row, "wise": s} if s is not None else row
            for s in scales
            for row in made
            if s is None or row["method"] != "base"
        ]

    run = {"prompt": "a {}", "templates": None, "learning_rate": 0.1, "knn_k": 5}
    write_results([*rows(run, (None, 0.5)), *rows(run, data="y")], tmp_path / "r.jsonl")
    update_results(rows({"templates": ["a {}"], "batch_size": 3, "k": 5}), tmp_path / "r.jsonl")
    found = [(r["method"], r["data"], r.get("wise")) for r in read_results(tmp_path / "r.jsonl")]
    x, half = [("base", "x", None), ("gated", "x", None)], ("gated", "x", 0.5)
    y = [("base", "y", None), ("gated", "y", None)]
    assert (found, caplog.text) == ([half, *y, *x], "")
    update_results(rows({"templates": ["the {}"]}), tmp_path / "r.jsonl")
    assert [(r["method"], r["data"], r.get("wise")) for r in read_results(tmp_path / "r.jsonl")] == [*y, *x]
    assert "dropped what was measured of gated at scale 0.5 on 'x' with another templates" in caplog.text
    update_results(rows({}, (0.5,), data="y", split="other"), tmp_path / "r.jsonl")
    assert [(r["method"], r["data"], r.get("wise")) for r in read_results(tmp_path / "r.jsonl")] == [
        *x,
        ("gated", "y", 0.5),
    ]
    assert "on 'y' with another source" in caplog.text


def test_bad_results_files_name_the_line(tmp_path):
    (row, *_) = measured(TOP1.fields(), 0.5)
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({**row, "data": "a\u2028b"}, ensure_ascii=False) + "\n\n")  # not the end of a line
    assert read_results(file)[0]["data"] == "a\u2028b"
    for bad, message in {
        "[1]": "list in place of an object",
        json.dumps({**row, "value": "high"}): "'value' is 'high'",
        json.dumps({**row, "metric": None}): "'metric' is missing",
        json.dumps({**row, "arguments": []}): r"'arguments' is \[\]",
        "[" * 100_000: "line 2",
    }.items():
        file.write_text(json.dumps(row) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=message):
            read_results(file)


def test_sets_take_lists_and_check_them_at_once():
    images = Images(4)
    data = EvalSet("id", "x", images, labels=[0, 1, 2, 3], class_names=("a", "b", "c", "d"))
    assert (data.labels.tolist(), data.class_names) == ([0, 1, 2, 3], ["a", "b", "c", "d"])
    bank = EvalSet("id", "x", images, labels=[0, 0, 0, 0], class_names=["b", "a"])
    for more, message in {
        "labels": ({"labels": [0, 1]}, r"id set 'x' \(s\) has 4 images, but 2 labels"),
        "captions": ({"captions": ["a"] * 5}, "has 4 images, but 5 captions"),
        "float": ({"labels": [0.0] * 4}, "labels are float32 of shape"),
        "outside": ({"labels": [0, 1, 2, 2], "class_names": ["a", "b"]}, "labels lie between 0 and 2, outside the 2"),
        "order": ({"labels": [0] * 4, "class_names": ["a", "b"], "bank": bank}, "class 0 is 'b' and 'a'"),
    }.values():
        with pytest.raises(ValueError, match=message):
            EvalSet("id", "x", images, "s", **more)
    model = tiny_dinov2()
    model.config.id2label = {str(i): name for i, name in enumerate("abcd")}
    suite = ClassifierSuite(sets=[data])
    assert suite.measure(model)[0]["metric"] == "top1"
    data.class_names = ["b", "a", "c", "d"]
    with pytest.raises(ValueError, match="class 0 is 'b' and 'a'"):
        suite.measure(model)


def test_what_is_not_used_is_not_imported():
    script = """
import sys
import hf_gatelora
heavy = {"evaluate", "sklearn", "datasets", "open_clip", "jinja2", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import hf_gatelora.evaluation.knn, hf_gatelora.evaluation.linear_probe, hf_gatelora.evaluation.retrieval
import hf_gatelora.evaluation.classification, hf_gatelora.evaluation.templates, hf_gatelora.evaluation.zero_shot
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
