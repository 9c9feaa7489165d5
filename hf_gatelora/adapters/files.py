"""The files of an adapter's folder: their names, reading them, and replacing them all at once."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..records import RESULTS_FILE, SUMMARY_FILE, read_results

TEMPORARY = ".tmp-adapter-"


def read_adapter(directory: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """The config of an adapter and its weights, on the CPU.

    Raises:
        ValueError: where one of its files is missing or cannot be read.
    """
    directory = Path(directory)
    try:
        weight_file(directory)
        return json.loads((directory / CONFIG_NAME).read_text()), load_peft_weights(str(directory), device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{directory} holds no readable adapter ({error}).") from error


def read_shapes(directory: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of an adapter's weights by their key, and the size of their file in bytes.

    Raises:
        ValueError: where the file is missing or cannot be read.
    """
    try:
        file = weight_file(directory)
        if file.name == WEIGHTS_NAME:
            weights = torch.load(file, map_location="meta", weights_only=True)
            return {key: tuple(value.shape) for key, value in weights.items()}, file.stat().st_size
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        return shapes, file.stat().st_size
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"{directory} holds no readable adapter ({error}).") from error


def weight_file(directory: Path) -> Path:
    """The file of an adapter's weights, in either format.

    Raises:
        FileNotFoundError: where there is none.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory / SAFETENSORS_WEIGHTS_NAME} is missing")


def read_summary(directory: Path) -> dict | None:
    """What `gates.json` says; None where there is none.

    Raises:
        ValueError: where it cannot be read.
    """
    try:
        return json.loads((directory / SUMMARY_FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory / SUMMARY_FILE} cannot be read ({error}).") from error


def read_rows(directory: Path) -> list[dict]:
    """The measurements beside an adapter; none where there is no `results.jsonl`."""
    return read_results(directory / RESULTS_FILE) if (directory / RESULTS_FILE).is_file() else []


def replace_files(directory: Path, write: Callable[[Path], None], stale: set[str]) -> None:
    """Move what `write` puts into a temporary folder to `directory`, and remove those of `stale` that it did not."""
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"{TEMPORARY}*"):  # of a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=directory) as temporary:
        write(Path(temporary))
        written = {
            file.name: file for file in (*Path(temporary).glob("*"), *Path(temporary).glob("*/*")) if file.is_file()
        }
        for name, file in written.items():
            os.replace(file, directory / name)
    for name in stale - set(written):
        (directory / name).unlink(missing_ok=True)
