"""Pushing to a Hub on this machine, through the real client: what arrives, what strangers get, what a failure says."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_trainer
from hub_server import TOKEN, USER, Failure, Hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http
from models import FAMILIES, lora_config, outputs_of
from peft import get_peft_model
from transformers import CLIPImageProcessor, TrainerCallback
from transformers.utils import hub as hub_utils
from world import run, words

from hf_gatelora import training
from hf_gatelora.card.push import PushError, push_adapter
from hf_gatelora.cli import main as gatelora

CLIP, DINO = FAMILIES["clip"], FAMILIES["dinov2"]
REPO = f"{USER}/sketches"

# The client's own way to upload a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    hub.server.start()
    yield hub
    hub.server.stop()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The Hub, empty, for the client in this process: what it reads from the environment as it is imported."""
    server.reset()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(hub_utils, "_hf_api", None, raising=False)  # the client that Trainer keeps, with its endpoint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The client does not wait between its tries; whoever else sleeps does.
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    return server


@pytest.fixture(scope="module", params=["clip", "dinov2"])
def trained(request, tmp_path_factory):
    """(family, folder of a trained adapter, the gated model's outputs)."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    trainer = make_trainer(family, folder)
    trainer.train()
    trainer.save_model()
    return family, folder, outputs_of(family, trainer.model)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of one trained adapter."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    trainer = make_trainer(DINO, folder, max_steps=4)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def stranger(server, tmp_path_factory):
    """`stranger(family, revision)`: outputs of REPO's adapter, in a process that cannot import hf_gatelora."""
    folder = tmp_path_factory.mktemp("stranger")
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder), "HF_TOKEN": TOKEN}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, Path(__file__).with_name("stranger.py")], env=environment, **pipes)

    def outputs(family: dict, revision: str = "main") -> torch.Tensor:
        process.stdin.write("\t".join([family["name"], REPO, revision, f"{folder}/outputs.pt"]) + "\n")
        process.stdin.flush()
        assert (answer := process.stdout.readline()) == "ok\n", answer
        return torch.load(folder / "outputs.pt")

    with process:
        yield outputs
        process.stdin.close()


def assert_no_token(*folders: Path) -> None:
    for folder in folders:
        for file in folder.rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_a_stranger_gets_the_gated_model(hub, stranger, trained):
    family, folder, expected = trained
    url = push_adapter(folder, REPO)
    assert url == f"{hub.url}/{REPO}"
    assert hub.commits(REPO) == ["Upload adapter"]
    torch.testing.assert_close(stranger(family), expected, rtol=0, atol=1e-5)
    files = hub.files(REPO)
    described = {"README.md", "gate_map.png", "gates.json", "gatelora_state.safetensors"}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", *described}
    assert f'"{REPO}"' in files["README.md"].decode()
    assert not any(TOKEN.encode() in content for content in files.values())


def test_command_line(hub, adapter, tmp_path, capsys):
    """`card`, `push` and, by its name on the Hub, `inspect`."""
    folder = shutil.copytree(adapter, tmp_path / "sketches")
    (folder / "README.md").unlink()
    assert gatelora(["card", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'README.md'}\n"
    card = (folder / "README.md").read_text()
    assert gatelora(["push", str(folder), REPO, "--message", "First"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/{REPO}\n"
    assert hub.commits(REPO) == ["First"]
    assert hub.files(REPO)["README.md"].decode() != card  # it knows where it is now
    reports = []
    for source in (str(folder), REPO):
        assert gatelora(["inspect", source, "--json"]) == 0
        reports.append({**json.loads(capsys.readouterr().out), "adapter": None})
    assert reports[0] == reports[1]
    hub.failure = Failure("preupload", 403)
    assert gatelora(["push", str(folder), REPO]) == 1
    assert f"push it later: gatelora push {folder} {REPO}" in capsys.readouterr().err


def test_pushing_again_changes_nothing(hub, adapter):
    push_adapter(adapter, REPO)
    before = hub.files(REPO)
    push_adapter(adapter, REPO)
    assert len(hub.commits(REPO)) == 1
    assert hub.files(REPO) == before
    assert sum(route == "upload" for route, _ in hub.requests) == 3  # weights, state and gate map, once each


def test_private_repository_branch_and_pull_request(hub, adapter):
    push_adapter(adapter, "sketches", private=True, revision="v1")
    assert hub.repos[REPO]["private"]
    assert hub.commits(REPO) == []
    card = hub.files(REPO, "v1")["README.md"].decode()
    assert f'"{REPO}"' in card
    assert 'revision="v1"' in card
    url = push_adapter(adapter, REPO, create_pr=True)
    assert url.endswith(f"{REPO}/discussions/1")
    assert hub.commits(REPO) == []


def test_a_card_that_was_edited_on_the_hub_stays(hub, adapter, caplog):
    push_adapter(adapter, REPO)
    edited = hub.files(REPO)["README.md"] + b"\nMy own words.\n"
    hub.repos[REPO]["branches"]["main"][-1]["files"]["README.md"] = edited
    (adapter / "vocab.txt").write_text("red")
    push_adapter(adapter, REPO)
    assert hub.files(REPO)["README.md"] == edited
    hub.failure = Failure("resolve", 503)  # whether it was edited is not to be known
    with pytest.raises(PushError, match="503"):
        push_adapter(adapter, REPO)
    (adapter / "vocab.txt").unlink()
    assert hub.files(REPO)["README.md"] == edited
    assert "vocab.txt" in hub.files(REPO)
    assert "was edited on the Hub" in caplog.text


def test_a_push_uploads_only_what_belongs_to_the_adapter(hub, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    own = {file.name for file in folder.iterdir()} - {"training_args.bin"}
    for name in ("vocab.txt", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "runs" / "Nov26_myhost").mkdir(parents=True)
    for name in ("credentials.json", "token.txt", "notes.md", "log.jsonl", "face.png", "other.safetensors"):
        (folder / name).write_text("private")
    (folder / "runs" / "Nov26_myhost" / "events.out.tfevents.1764150000.myhost.1.0").write_text("private")
    push_adapter(folder, REPO)
    assert set(hub.files(REPO)) == {*own, "vocab.txt", "preprocessor_config.json"}


@pytest.mark.parametrize("name", ["README.md", "gates.json", "vocab.txt", ".eval_results"])
def test_links_are_not_followed(hub, adapter, tmp_path, name, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("private")
    (outside / "hf_gatelora.yaml").write_text("private")
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / "secret.txt" if "." in name[1:] else outside)
    assert gatelora(["push", str(folder), REPO]) == 2
    assert "is a link and is not uploaded" in capsys.readouterr().err
    assert REPO not in hub.repos
    assert {file.read_text() for file in outside.iterdir()} == {"private"}


def test_folders_of_this_machine_stay_here(hub, adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "my-dino")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    row = {"method": "gated", "role": "id", "data": "test", "split": f"{tmp_path}/photos:test", "metric": "top1"}
    row |= {"value": 0.5, "n": 8, "model": str(tmp_path / "my-dino"), "arguments": {"ood": [f"a={tmp_path}/a"]}}
    (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".json", ".jsonl")}
    assert gatelora(["push", str(folder), REPO]) == 0
    files = hub.files(REPO)
    assert not [name for name, content in files.items() if str(tmp_path.parent).encode() in content]
    pushed = json.loads(files["adapter_config.json"])
    assert pushed == {**config, "base_model_name_or_path": "my-dino (local)"}
    assert json.loads(files["results.jsonl"])["arguments"] == {"ood": ["a=a (local)"]}
    assert {name: (folder / name).read_bytes() for name in before} == before
    line = ["push", str(folder), REPO, "--base", "facebook/dinov2-small", "--license", "mit"]
    assert gatelora(line) == 0
    files = hub.files(REPO)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "facebook/dinov2-small"
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.license) == ("facebook/dinov2-small", "mit")


# What fails, and what the message says.
FAILURES = {
    "no token": (Failure("create", 401), r"401: it wants a valid token"),
    "no right": (Failure("create", 403), r"403: the token may not write there"),
    "no right to commit": (Failure("commit", 403), r"403: the token may not write there"),
    "conflict": (Failure("commit", 409), r"409: somebody else is changing the repository"),
    "too many": (Failure("commit", 429, {"Retry-After": "7"}), r"429: too many requests\. Try again in 7 s\."),
    "too many at the upload": (
        Failure("upload", 429, {"Retry-After": "7"}),
        r"429: too many requests\. Try again in 7 s\.",
    ),
    "server": (Failure("preupload", 500), r"500: it has a problem of its own"),
    "server at the upload": (Failure("upload", 500), r"500: it has a problem of its own"),
    "cut at the upload": (Failure("upload", None), "connection failed"),
    "cut at the commit": (Failure("commit", None), "connection failed"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_gives_one_message_and_can_be_repeated(hub, adapter, case, caplog):
    failure, message = FAILURES[case]
    hub.failure = Failure(failure.route, failure.status, failure.headers)
    with pytest.raises(PushError, match=message) as found:
        push_adapter(adapter, REPO)
    assert f"gatelora push {adapter} {REPO}" in str(found.value)
    assert TOKEN not in str(found.value) + caplog.text
    assert REPO not in hub.repos or hub.commits(REPO) == []
    hub.failure = None
    push_adapter(adapter, REPO)
    assert {"README.md", "adapter_model.safetensors", "gates.json"} <= set(hub.files(REPO))
    assert len(hub.commits(REPO)) == 1


def test_a_moment_of_trouble_is_bridged_by_the_client(hub, adapter):
    hub.failure = Failure("upload", None, times=1)
    push_adapter(adapter, REPO)
    assert len(hub.commits(REPO)) == 1


def test_offline_everything_is_written_locally(adapter, tmp_path):
    (adapter / "README.md").unlink()
    with pytest.raises(PushError, match=r"offline mode is on \(HF_HUB_OFFLINE\)"):
        push_adapter(adapter, REPO)
    assert REPO in (adapter / "README.md").read_text()
    with pytest.raises(ValueError, match="no readable adapter"):
        push_adapter(tmp_path, REPO)


# ---- Trainer ----------------------------------------------------------------------------------------------------

PUSHED = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN}


class Slow(TrainerCallback):
    """Waits for each push before the next step, so that none is left out."""

    def on_save(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


def pushing_trainer(folder, model=None, **arguments):
    slow = Slow()
    slow.trainer = make_trainer(CLIP, folder, model, max_steps=8, callbacks=[slow], **{**PUSHED, **arguments})
    return slow.trainer


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_hub_strategies(hub, tmp_path, strategy, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")  # the arguments' own is enough
    saving = {"hub_strategy": strategy, "save_strategy": "steps", "save_steps": 4, "gate_freeze_ratio": 0.75}
    trainer = pushing_trainer(tmp_path / "out", **saving)
    trainer.train()
    progress = [f"Training in progress, step {step}" for step in (4, 8)]
    assert hub.commits(REPO) == ([] if strategy == "end" else progress)
    trainer.push_to_hub()
    # What the last save pushed is the end: nothing of it changed, and the client makes no empty commit.
    assert hub.commits(REPO) == (["End of training"] if strategy == "end" else progress)
    files = hub.files(REPO)
    own = {"adapter_config.json", "adapter_model.safetensors", "gates.json", "gatelora_state.safetensors"}
    assert {file for file in files if "/" not in file} == {*own, "README.md", "gate_map.png"}
    folders = {file.split("/")[0] for file in files if "/" in file}
    kept = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-4", "checkpoint-8"}}
    assert folders == kept.get(strategy, set())
    assert not [file for file in files if file.endswith("training_args.bin")]
    if folders:
        assert f"{max(folders)}/optimizer.pt" in files
    if strategy == "every_save":  # what was pushed on the way was complete as well, and said what it is
        first = hub.repos[REPO]["branches"]["main"][0]["files"]
        assert {*own, "README.md", "gate_map.png"} <= set(first)
        assert "step 4 of 8" in re.sub(r"\s+", " ", first["README.md"].decode())
    assert_no_token(tmp_path)
    assert not [content for content in files.values() if TOKEN.encode() in content or str(tmp_path).encode() in content]
    assert not list((tmp_path / "out").glob(".tmp*"))


def test_trainer_pushes_to_a_private_branch(hub, stranger, tmp_path):
    trainer = pushing_trainer(tmp_path, hub_private_repo=True, hub_revision="v2")
    trainer.train()
    trainer.push_to_hub(license="mit", tags="sketch", finetuned_from="openai/clip", dataset_tags="ada/sketches")
    assert hub.repos[REPO]["private"]
    torch.testing.assert_close(stranger(CLIP, "v2"), outputs_of(CLIP, trainer.model), rtol=0, atol=1e-5)
    data = ModelCard(hub.files(REPO, "v2")["README.md"].decode()).data
    assert (data.license, data.base_model, data.datasets) == ("mit", "openai/clip", ["ada/sketches"])
    assert "sketch" in data.tags


def test_an_adapter_beside_another_takes_its_processor_along(hub, tmp_path):
    base = CLIP["model"]()
    model = get_peft_model(base, lora_config(base))
    model.add_adapter("mine", lora_config(base))
    model.set_adapter("mine")
    trainer = pushing_trainer(tmp_path, model, hub_strategy="every_save", save_strategy="steps", save_steps=4)
    trainer.processing_class = CLIPImageProcessor()
    trainer.train()
    trainer.push_to_hub()
    for commit in hub.repos[REPO]["branches"]["main"]:
        assert {"adapter_model.safetensors", "gates.json", "preprocessor_config.json"} <= set(commit["files"])


def test_failing_pushes_do_not_end_a_training(hub, tmp_path, caplog):
    trainer = pushing_trainer(tmp_path, hub_strategy="every_save", save_strategy="steps", save_steps=4)
    hub.failure = Failure("commit", 409)
    trainer.train()
    told = [record.message for record in caplog.records if "Could not push" in record.message]
    assert len(told) == 2
    for step, message in zip((4, 8), told, strict=True):
        assert f"gatelora push {tmp_path / f'checkpoint-{step}'} {REPO}" in message
    trainer.save_model()
    assert "gatelora push" in caplog.records[-1].message
    with pytest.raises(PushError, match="409"):
        trainer.push_to_hub()
    hub.failure = None
    push_adapter(tmp_path / "checkpoint-4", REPO)
    trainer.push_to_hub(blocking=False).result()
    assert len(hub.commits(REPO)) == 2
    assert TOKEN not in caplog.text


def test_pushes_in_the_background_have_the_token(hub, tmp_path, monkeypatch):
    """Also where a checkpoint is saved meanwhile, for which the token leaves the arguments."""
    monkeypatch.delenv("HF_TOKEN")
    trainer = pushing_trainer(tmp_path, hub_strategy="every_save", save_strategy="steps", save_steps=4)
    upload = training.hub.upload

    def meanwhile(*args, **more):
        token, trainer.args.hub_token = trainer.args.hub_token, None
        try:
            return upload(*args, **more)
        finally:
            trainer.args.hub_token = token

    monkeypatch.setattr(training.hub, "upload", meanwhile)
    trainer.train()
    assert len(hub.commits(REPO)) == 2


def test_the_start_of_a_training_says_what_is_wrong(hub, tmp_path, caplog):
    hub.failure = Failure("create", 403)
    with pytest.raises(PushError, match=r"403: .*Nothing was trained"):
        pushing_trainer(tmp_path)
    hub.failure = Failure("create", 500)
    trainer = pushing_trainer(tmp_path)  # one that is out of reach now need not be so later
    assert "The training goes on" in caplog.text
    hub.failure = None
    trainer.train()
    trainer.push_to_hub()
    assert hub.commits(REPO) == ["End of training"]


def test_push_of_the_model(hub, stranger, tmp_path):
    trainer = make_trainer(CLIP, tmp_path / "out", max_steps=8)
    trainer.train()
    hub.failure = Failure("commit", 403)
    with pytest.raises(PushError, match="save_pretrained") as found:
        trainer.model.push_to_hub(REPO, token=TOKEN)
    assert "Everything is in" not in str(found.value)
    hub.failure = None
    assert trainer.model.push_to_hub(REPO, commit_message="By hand", private=True) == f"{hub.url}/{REPO}"
    assert hub.commits(REPO) == ["By hand"]
    assert "[More Information Needed]" not in hub.files(REPO)["README.md"].decode()
    torch.testing.assert_close(stranger(CLIP), outputs_of(CLIP, trainer.model), rtol=0, atol=1e-5)


def test_recipes_push_what_they_measured(hub, world, tmp_path):
    """Gated LoRA alone, with the numbers of the run."""
    line = [*words(world, tmp_path / "out"), "--methods", "lora", "gated", "--push_to_hub"]
    run("clip", [*line, "--hub_model_id", REPO, "--hub_token", TOKEN])
    assert sorted(hub.repos) == [REPO]
    assert hub.commits(REPO)[-1] == "End of training"
    files = hub.files(REPO)
    rows = [json.loads(row) for row in files["results.jsonl"].splitlines()]
    card = ModelCard(files["README.md"].decode())
    own = [row["value"] for row in rows if row["method"] == "gated" and row["role"] != "cost"]
    assert [result.metric_value for result in card.data.eval_results] == own
    assert card.data.base_model is None  # it is a folder
    assert str(tmp_path.parent) not in card.content
    assert not [content for content in files.values() if TOKEN.encode() in content]
    assert_no_token(tmp_path)
