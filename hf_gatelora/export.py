"""Folding: writing a gated adapter as a stock PEFT adapter, and reading back what lies beside it."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import layer as seam

STATE_FILE = "gatelora_state.safetensors"
SUMMARY_FILE = "gates.json"
TEMPORARY = ".tmp-adapter-"
RAW = "raw."  # prefix in the state file of weights as trained, where folding changed them


def write_adapter(
    model: PeftModel,
    adapter_name: str,
    factors: dict[str, float],
    state: dict[str, Tensor],
    summary: dict,
    directory: str | os.PathLike,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs,
) -> None:
    """Write a stock PEFT adapter with each gate's value folded into its blocks' B.

    Each file is written under a temporary name and then renamed. The adapter's files lie in `directory` itself,
    whatever the adapter is called, so that `PeftModel.from_pretrained(base, directory)` finds them.

    Args:
        factors: gate value by LoRA module name.
        state, summary: contents of `gatelora_state.safetensors` and of `gates.json`.
        state_dict: the model's gathered state dict, where the model itself is sharded.
        kwargs: for `PeftModel.save_pretrained`.
    """
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    state = dict(state)
    for name, factor in factors.items():
        key = seam.b_key(name, adapter_name)
        if factor != 1.0 and key in weights:
            state[RAW + key] = weights[key].detach().cpu().contiguous()
            weights[key] = weights[key] * factor

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(f"{TEMPORARY}*"):  # of a process that was killed
        shutil.rmtree(stale)
    # PEFT's card builder reads an existing card and keeps it, so it has to see it.
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=directory) as temporary:
        if (directory / "README.md").exists():
            shutil.copy(directory / "README.md", temporary)
        PeftModel.save_pretrained(model, temporary, selected_adapters=[adapter_name], state_dict=weights, **kwargs)
        folder = Path(temporary) / ("" if adapter_name == "default" else adapter_name)
        save_file(state, folder / STATE_FILE)
        (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n")
        written = {file.name: file for file in (*Path(temporary).iterdir(), *folder.iterdir()) if file.is_file()}
        for name, file in written.items():
            os.replace(file, directory / name)
    for name in {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME} - set(written):  # of an earlier save in the other format
        (directory / name).unlink(missing_ok=True)


def read_state(directory: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Read what lies beside an adapter: the controller's state, weights as trained by state-dict key, the summary.

    Raises:
        ValueError: where the files are missing or unreadable.
    """
    directory = Path(directory)
    try:
        summary = json.loads((directory / SUMMARY_FILE).read_text())
        with safe_open(directory / STATE_FILE, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory} is not a checkpoint of gated LoRA: {SUMMARY_FILE} and {STATE_FILE} cannot be read ({error})."
        ) from error
    raw = {key.removeprefix(RAW): tensors.pop(key) for key in list(tensors) if key.startswith(RAW)}
    return tensors, raw, summary


@torch.no_grad()
def load_raw(model: PeftModel, raw: dict[str, Tensor]) -> None:
    """Put weights as trained back over the folded ones."""
    parameters = dict(model.named_parameters())
    for key, value in raw.items():
        parameters[key].copy_(value)


def scale_adapter(directory: str | os.PathLike, scale: float, output: str | os.PathLike) -> None:
    """Write a copy of a LoRA adapter with its update scaled: WiSE-FT (arXiv 2109.01903) between base and adapter.

    Heads in `modules_to_save` stay as they were trained. What resuming needs is left out.

    Args:
        directory: a stock LoRA adapter, for instance one that this package wrote.
        scale: 0 gives the base, 1 the adapter.
        output: another folder.

    Raises:
        ValueError: where the scale is out of range, the folders are the same, or no LoRA adapter is found whose output
            is linear in B.
    """
    directory, output = Path(directory), Path(output)
    if not 0 <= scale <= 1:
        raise ValueError(f"scale={scale} is out of range: it must be a number in [0, 1].")
    if directory.resolve() == output.resolve():
        raise ValueError(f"{output} is the adapter's own folder: give another one, the adapter stays as it is.")
    try:
        config = json.loads((directory / CONFIG_NAME).read_text())
        weights = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} holds no readable adapter ({error}).") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ValueError(f"{directory} is a {kind} adapter: only plain LoRA can be scaled through its B.")
    weights = {
        key: value * scale if "lora_B" in key or "lora_embedding_B" in key else value for key, value in weights.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=output) as temporary:
        save_file(weights, Path(temporary) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        shutil.copy(directory / CONFIG_NAME, temporary)
        if (directory / SUMMARY_FILE).is_file():
            summary = json.loads((directory / SUMMARY_FILE).read_text())
            (Path(temporary) / SUMMARY_FILE).write_text(json.dumps({**summary, "scale": scale}, indent=1) + "\n")
        for file in Path(temporary).iterdir():
            os.replace(file, output / file.name)
