"""Models of open_clip in a run: as a transformers checkpoint that adapters can name, and the tuned ones given back."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import save_file
from transformers import CLIPModel

from ..adapters.openclip import export_open_clip, load_open_clip
from ..records import replacing

PREFIX, FILE = "open_clip:", "open_clip_model.safetensors"


def open_clip_checkpoint(source: str) -> Path:
    """Folder with the transformers checkpoint of a model of open_clip, `NAME`, `NAME/PRETRAINED` or `hf-hub:REPO`.

    Adapters need a base that `from_pretrained` finds, so it is written once, to a folder that is named by its contents.
    """
    located = source.startswith(("hf-hub:", "local-dir:"))
    name, _, pretrained = (source, "", "") if located else source.partition("/")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # random weights are the same in every process, and at every start
        model, processor = load_open_clip(name, pretrained or None)
    digest = hashlib.sha256(f"{model.config}{processor.image_processor}".encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy())
    slug = re.sub(r"[^\w.]+", "-", source)[:60]
    cache = Path(constants.HF_HOME).expanduser().absolute() / "hf_gatelora"
    folder = cache / f"open_clip-{slug}-{digest.hexdigest()[:10]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            model.save_pretrained(Path(scratch) / "base")
            processor.save_pretrained(Path(scratch) / "base")
            try:
                os.rename(Path(scratch) / "base", folder)
            except OSError:  # another process was faster, and its folder holds the same
                if not folder.is_dir():
                    raise
    if PartialState().is_main_process:
        print(
            f"{PREFIX}{source} as a transformers checkpoint: {folder}. Adapters name it as their base. To publish one, "
            "push that folder too, and train with --model USER/REPO."
        )
    return folder


def save_open_clip(tuned: PeftModel | CLIPModel, folder: str | os.PathLike) -> None:
    """Write a tuned model, merged, as a state dict of open_clip into a folder."""
    merged = tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
    with replacing(Path(folder) / FILE) as temporary:
        save_file(export_open_clip(merged.cpu()), temporary)
    print(f"For open_clip: {Path(folder) / FILE}")
