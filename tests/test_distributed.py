"""The same gates under every launcher config: one process, DDP, DeepSpeed ZeRO and FSDP2, and after a failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_trainer
from models import FAMILIES
from safetensors.torch import load_file

CONFIGS = sorted((Path(__file__).parents[1] / "accelerate_configs").glob("*.yaml"))
PROCESSES = {"cpu": 1, "single_gpu": 1}  # the others: 2
ENGINES = {"cpu": "NO", "single_gpu": "NO", "multi_cpu": "MULTI_CPU", "multi_gpu": "MULTI_CPU", "fsdp2": "FSDP"}
ENGINES |= {f"deepspeed_zero{stage}": "DEEPSPEED" for stage in (1, 2, 3)}
SHARDED = ("deepspeed_zero3", "fsdp2")
FREEZE = 15  # of 30 steps


def launch(config: Path, task: str, output: Path, folder: Path) -> subprocess.CompletedProcess:
    """`accelerate launch` of one task of distributed_run.py on the CPU."""
    settings = yaml.safe_load(config.read_text())
    on_cpu = folder / f"{config.stem}-{task}.yaml"
    on_cpu.write_text(yaml.safe_dump({**settings, "use_cpu": True}))
    script = Path(__file__).with_name("distributed_run.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", on_cpu, script, task, output]
    # DeepSpeed compiles an operation on first use, with the ninja that lies beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """`ran(config)`: output folder of one launch that trained, saved and resumed every family."""
    folders = {}

    def once(config: Path) -> Path:
        if config not in folders:
            folders[config] = output = tmp_path_factory.mktemp(config.stem)
            done = launch(config, "train_and_resume", output, tmp_path_factory.mktemp("config"))
            assert done.returncode == 0, done.stderr[-4000:]
        return folders[config]

    return once


def ranks(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]


def test_penalty_on_a_stock_trainer(ran):
    """Trainer multiplies a loss that was normalised over all processes by their number, and the penalty with it."""
    one, two = (ranks(ran(Path(CONFIGS[0].parent, f"{name}.yaml")) / "stock") for name in ("cpu", "multi_cpu"))
    assert len(two) == 2
    for process in two:
        assert process["gradients"] == pytest.approx(one[0]["gradients"], abs=1e-4)
    assert max(one[0]["gradients"]) > 0.3


def test_every_config_has_a_case():
    assert {config.stem for config in CONFIGS} == set(ENGINES)
    for config in CONFIGS:
        text = config.read_text()
        assert text.startswith("# ")
        assert f"accelerate launch --config_file accelerate_configs/{config.name}" in text
        assert yaml.safe_load(text)["mixed_precision"] == "no"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_same_gates(config, family, ran, stock_peft):
    folder = ran(config) / family["name"]
    found = ranks(folder)
    assert [rank["world"] for rank in found] == [PROCESSES.get(config.stem, 2)] * PROCESSES.get(config.stem, 2)
    assert found[0]["engine"] == ENGINES[config.stem]
    assert found[0]["zero_stage"] == int(config.stem[-1]) if "zero" in config.stem else not found[0]["zero_stage"]
    assert found[0]["sharded"] == (config.stem in SHARDED)
    assert found[0]["folds"] == (found[0]["engine"] not in ("DEEPSPEED", "FSDP"))
    assert all(rank == found[0] for rank in found)

    reference = ranks(ran(CONFIGS[0]) / family["name"])[0]
    assert CONFIGS[0].stem == "cpu"
    scores, is_open = torch.tensor(reference["scores"]), torch.tensor(reference["open"])
    margin = scores[is_open].min() - scores[~is_open].max()
    assert margin > 1e-4, "too close for rounding not to decide"
    assert found[0]["open"] == reference["open"]
    torch.testing.assert_close(torch.tensor(found[0]["scores"]), scores, atol=1e-4, rtol=0)
    for directory in ("saved", "checkpoint-10", "checkpoint-30"):
        expected = load_file(ran(CONFIGS[0]) / family["name"] / directory / "adapter_model.safetensors")
        actual = load_file(folder / directory / "adapter_model.safetensors")
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)

    # The callback's measurements, of an odd number of images.
    assert len(found[0]["watched"]) == (3 if family["name"] == "dinov2" else 0)
    for own, other in zip(found[0]["watched"], reference["watched"], strict=True):
        assert own == pytest.approx(other, abs=1e-6)  # fractions, and their changes

    # What is written gives the gated model's outputs in a process with stock PEFT.
    for step, outputs in found[0]["outputs"].items():
        actual = stock_peft(FAMILIES[family["name"]], folder / f"checkpoint-{step}")
        torch.testing.assert_close(actual, torch.tensor(outputs), atol=1e-5, rtol=1e-5)
    assert found[0]["best_step"] > FREEZE
    best = torch.tensor(found[0]["outputs"][str(found[0]["best_step"])])
    torch.testing.assert_close(torch.tensor(found[0]["best_outputs"]), best, atol=1e-6, rtol=1e-6)
    for directory in ("saved", "folded"):
        actual = stock_peft(FAMILIES[family["name"]], folder / directory)
        torch.testing.assert_close(actual, best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_resume_is_exact(config, ran):
    runs = {(name, step, 30) for name in FAMILIES for step in (10, 20)} | {("bf16", step, 12) for step in (4, 8)}
    for name, step, last in sorted(runs):
        for file in ("adapter_model.safetensors", "gatelora_state.safetensors"):
            folder = ran(config) / name
            whole = load_file(folder / f"checkpoint-{last}" / file)
            resumed = load_file(folder / f"resumed-{step}" / f"checkpoint-{last}" / file)
            assert whole.keys() == resumed.keys()
            for key in whole:
                assert torch.equal(whole[key], resumed[key]), (name, step, key)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_resume_on_one_process(config, family, ran, tmp_path):
    """A DDP run goes on where it was on another number of processes; an engine's run only under that engine."""
    folder = ran(config) / family["name"]
    rewind = family["name"] == "dinov2"  # as the launched run has it
    trainer = make_trainer(family, tmp_path, max_steps=30, weight_decay=0.1, gate_rewind=rewind)
    if "zero" in config.stem or "fsdp" in config.stem:
        with pytest.raises(ValueError, match=r"was written by a (DeepSpeed|FSDP) run, this is a plain or DDP run"):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
        return
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    trainer.save_model(tmp_path / "saved")
    actual, expected = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path / "saved", folder / "checkpoint-30")
    )
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_contrastive_and_features(config, ran):
    """Two processes contrast with the pairs of both, and together embed each image once."""
    folder, reference = ran(config) / "contrastive", ran(CONFIGS[0]) / "contrastive"
    actual, expected = (load_file(run / "adapter_model.safetensors") for run in (folder, reference))
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    expected = torch.tensor(ranks(reference)[0]["features"])
    assert expected.shape == (13, 8)
    for rank in ranks(folder):
        torch.testing.assert_close(torch.tensor(rank["features"]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_own_loop(config, ran, stock_peft):
    """A loop on Accelerate alone ends with the same open blocks, and writes an adapter that loads."""
    folder = ran(config) / "loop"
    expected = ranks(ran(CONFIGS[0]) / "loop")[0]["open"]
    assert sum(expected) == 2
    assert all(rank["open"] == expected for rank in ranks(folder))
    reference = stock_peft(FAMILIES["dinov2"], ran(CONFIGS[0]) / "loop" / "folded")
    torch.testing.assert_close(stock_peft(FAMILIES["dinov2"], folder / "folded"), reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["multi_cpu", "deepspeed_zero2"])
def test_killed(name, tmp_path):
    """When one process is killed, the others end with an error, and the last complete checkpoint resumes."""
    config = next(config for config in CONFIGS if config.stem == name)
    done = launch(config, "killed_in_step", tmp_path, tmp_path)
    assert done.returncode != 0
    assert sorted(f.name for f in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]
    done = launch(config, "killed_in_save", tmp_path, tmp_path)
    assert done.returncode != 0
    assert (tmp_path / "killed" / "checkpoint-15" / "trainer_state.json").is_file()
    assert (tmp_path / "killed" / "checkpoint-20" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "killed" / "checkpoint-20" / "trainer_state.json").exists()
    done = launch(config, "resumed", tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    whole, resumed = (tmp_path / run / "checkpoint-30" / "adapter_model.safetensors" for run in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()
