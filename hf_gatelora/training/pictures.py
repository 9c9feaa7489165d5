"""Pictures of a run, handed to the services that its Trainer reports to."""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..card.plots import gate_map
from ..records import GATE_MAP
from .controller import GateController

SERVICES = (TensorBoardCallback, WandbCallback, TrackioCallback)


def reports_pictures(trainer: Trainer) -> bool:
    """Whether the Trainer reports, on this process, to a service that shows pictures."""
    found = any(isinstance(callback, SERVICES) for callback in trainer.callback_handler.callbacks)
    return found and trainer.is_world_process_zero()


def report_picture(trainer: Trainer, path: str | os.PathLike) -> None:
    """Show a PNG file, under its name, wherever the Trainer reports to; also after its training has ended."""
    name, step = Path(path).stem, trainer.state.global_step
    for callback in trainer.callback_handler.callbacks if reports_pictures(trainer) else ():
        if isinstance(callback, TensorBoardCallback):
            with Image.open(path) as image, callback._SummaryWriter(log_dir=callback.logging_dir) as writer:
                writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback):
            wandb = callback._wandb
            wandb.log({name: wandb.Image(str(path)), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            trackio, ended = callback._trackio, not callback._initialized
            if ended:
                callback.setup(trainer.args, trainer.state, trainer.model)
            trackio.log({name: trackio.Image(str(path)), "train/global_step": step})
            if ended:
                trackio.finish()


def report_gate_map(trainer: Trainer, gates: GateController) -> None:
    """Show the gate map wherever the Trainer reports to."""
    if reports_pictures(trainer):
        with tempfile.TemporaryDirectory() as folder:
            gate_map(gates.summary(), Path(folder) / GATE_MAP)
            report_picture(trainer, Path(folder) / GATE_MAP)
