"""Pictures where a Trainer reports to: TensorBoard by its own files, W&B and Trackio by what they are called with."""

from types import SimpleNamespace

import pytest
from conftest import make_trainer
from models import FAMILIES
from PIL import Image
from transformers.integrations import TrackioCallback, WandbCallback

from hf_gatelora.card.plots import gate_map
from hf_gatelora.training.pictures import report_picture

DINO = FAMILIES["dinov2"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_gate_map(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(DINO, tmp_path, report_to="tensorboard")
    trainer.train()
    gate_map(trainer.gates.summary(), tmp_path / "frontier.png")
    report_picture(trainer, tmp_path / "frontier.png")  # after the end of the training
    shown = {}
    for file in tmp_path.rglob("*tfevents*"):
        events = accumulator.EventAccumulator(str(file)).Reload()
        shown |= {tag: events.Images(tag)[0] for tag in events.Tags()["images"]}
    assert shown["gate_map"].step == 8
    assert shown["frontier"].step == 16
    with Image.open(tmp_path / "frontier.png") as drawn:
        assert (shown["frontier"].width, shown["frontier"].height) == drawn.size


@pytest.mark.parametrize(("kind", "attribute"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_other_services_get_the_gate_map(kind, attribute, tmp_path):
    calls = []
    service = SimpleNamespace(
        Image=lambda path: ("image", path.rpartition("/")[2]),
        log=calls.append,
        finish=lambda: calls.append("finished"),
    )

    class Fake(kind):
        def __init__(self):
            setattr(self, attribute, service)
            self._initialized = True

        def setup(self, *args, **kwargs):
            calls.append("set up")
            self._initialized = True

        on_train_begin = on_train_end = on_log = on_save = on_push_begin = lambda self, *args, **kwargs: None

    fake = Fake()
    trainer = make_trainer(DINO, tmp_path, callbacks=[fake])
    trainer.train()
    assert calls == [{"gate_map": ("image", "gate_map.png"), "train/global_step": 8}]
    if kind is TrackioCallback:  # it closes its run with the training
        calls.clear()
        fake._initialized = False
        report_picture(trainer, tmp_path / "frontier.png")
        assert calls[0] == "set up"
        assert calls[1] == {"frontier": ("image", "frontier.png"), "train/global_step": 16}
        assert calls[2] == "finished"


def test_nothing_is_drawn_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gatelora.training.pictures.gate_map", None)
    trainer = make_trainer(DINO, tmp_path)
    trainer.train()
    assert trainer.gates.frozen
