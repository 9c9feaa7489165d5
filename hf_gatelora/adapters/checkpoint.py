"""Checkpoints: what is written beside an adapter to resume from, and whether a run can resume from it."""

import os
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor

from ..records import RUN_FILE, SUMMARY_FILE
from .files import read_json, read_state_tensors, read_summary

RAW = "raw."  # prefix in the state file of weights as trained, where folding changed them


def adapter_folder(directory: str | os.PathLike, adapter_name: str) -> Path:
    """The folder of the gated adapter's files in a saved one: its own if an adapter named "default" is saved too."""
    inner = Path(directory) / adapter_name
    return inner if (inner / SUMMARY_FILE).is_file() else Path(directory)


def read_state(directory: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Read the files beside an adapter: the controller's state, weights as trained by state-dict key, the summary.

    Raises:
        ValueError: if a file is missing or cannot be read.
    """
    directory = Path(directory)
    try:
        summary, tensors = read_summary(directory), read_state_tensors(directory)
    except ValueError as error:
        raise ValueError(f"{directory} is not a checkpoint of gated LoRA: {error}") from error
    if summary is None:
        raise ValueError(f"{directory} is not a checkpoint of gated LoRA: {SUMMARY_FILE} is missing.")
    raw = {key.removeprefix(RAW): tensors.pop(key) for key in list(tensors) if key.startswith(RAW)}
    return tensors, raw, summary


@torch.no_grad()
def load_raw(model: PeftModel, raw: dict[str, Tensor]) -> None:
    """Put weights as trained back over the folded ones."""
    parameters = dict(model.named_parameters())
    for key, value in raw.items():
        parameters[key].copy_(value)


def check_same_run(directory: str | os.PathLike, here: dict) -> None:
    """Check that a checkpoint was written by a run with the same base model, blocks and gate configuration.

    Args:
        here: the summary of this run's gates.

    Raises:
        ValueError: naming what differs.
    """
    _, _, saved = read_state(directory)
    names, own = ([row["name"] for row in summary["blocks"]] for summary in (saved, here))
    if names != own:
        odd = sorted(set(names) ^ set(own))
        raise ValueError(
            f"{directory} is from another model or LoRA config: it has {len(names)} gates, this model has "
            f"{len(own)} (differing: {odd[:3] or 'only the order'}). Resume with the model, target_modules "
            "and granularity of that run."
        )
    if saved.get("lora") != here["lora"]:
        raise ValueError(
            f"{directory} was written with another LoRA config: {saved.get('lora')}, this one is {here['lora']}."
        )
    # With FSDP's cpu_ram_efficient_loading only the main process had the base weights when the gates were attached.
    if PartialState().is_main_process and saved.get("base_fingerprint") != here["base_fingerprint"]:
        raise ValueError(
            f"{directory} is from another base model: the gated layers' base weights differ in shape or value. "
            "Resume on the base model of that run."
        )
    changed = {k: (v, here["config"].get(k)) for k, v in saved["config"].items() if v != here["config"].get(k)}
    if changed:
        listed = "; ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in changed.items())
        raise ValueError(f"{directory} was written with another gate configuration: {listed}. Resume with the same.")


def missing_states(checkpoint: Path) -> list[str]:
    """Which states a Trainer's checkpoint lacks, without which a run cannot go on as it was."""
    if any(checkpoint.glob("global_step*")):  # DeepSpeed's, which holds all of them
        return []
    return [kind for kind in ("optimizer", "scheduler") if not any(checkpoint.glob(f"{kind}*"))]


def last_complete_checkpoint(output_dir: str, adapter_name: str) -> str:
    """The newest checkpoint folder that was written to its end (Trainer writes its state last).

    If it is known which run was last started in the output folder, only checkpoints of that run count.

    Raises:
        ValueError: if there is none.
    """
    root = Path(output_dir)
    run = (root / RUN_FILE).read_text().strip() if (root / RUN_FILE).is_file() else None
    others = []
    folders = [folder for folder in root.glob("checkpoint-*") if folder.name.rsplit("-", 1)[1].isdigit()]
    folders.sort(key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)
    for folder in folders:
        try:
            read_json(folder / "trainer_state.json")
            summary = read_summary(adapter_folder(folder, adapter_name)) or {}
        except ValueError:
            continue
        if run in (None, summary.get("run")):
            return str(folder)
        others.append(folder.name)
    if others:
        raise ValueError(
            f"The checkpoints in {output_dir} ({', '.join(others[:3])}) are of another run than the last one that was "
            "started there, which has none yet. Start it again without resuming, or name the folder to resume that run."
        )
    raise ValueError(f"No complete checkpoint in {output_dir} to resume from (found {[f.name for f in folders]}).")
