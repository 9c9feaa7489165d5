"""The files of an adapter's folder. All of them are read here, each through a schema with bounds, and replaced at once.

Whatever is wrong with a file, reading it raises one `ValueError` of one bounded line that names the file and the field.
"""

import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import regex
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import safe_open
from torch import Tensor

from ..gates import lora_layers
from ..records import RESULTS_FILE, STATE_FILE, SUMMARY_FILE, read_results
from .schemas import MODULES, AdapterConfig, LoraConfig, Name, Row, Summary, checked, shortened

logger = logging.getLogger(__name__)

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model"),
)
PROCESSOR_FILES = (*IMAGE_FILES, *TOKENIZER_FILES, "video_preprocessor_config.json", "chat_template.jinja")

JSON_BYTES, ROWS_BYTES = 32 * 2**20, 256 * 2**20
MATCHING_SECONDS = 5.0  # for all regular expressions of one file
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
_MATRIX = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")
PLAIN_PATTERN = re.compile(r"[\w.-]*")  # matches in linear time


# ---- reading ------------------------------------------------------------------------------------------------------


def read_json(file: Path) -> object:
    """The contents of a JSON file.

    Raises:
        ValueError: if it is not a file, too large or not JSON.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file.")
    if (size := file.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{file} is too large: {size:,} bytes, at most {JSON_BYTES:,} are read.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {shortened(error)}.") from error


def read_config(directory: Path) -> dict:
    """The contents of `adapter_config.json`; of a LoRA's fields, those that it lacks have PEFT's defaults.

    Raises:
        ValueError: naming file and field.
    """
    file = directory / CONFIG_NAME
    if not os.path.lexists(file):
        raise ValueError(f"{directory} holds no readable adapter: {CONFIG_NAME} is missing.")
    config = checked(AdapterConfig, read_json(file), file)
    if config.peft_type == "LORA":
        config = checked(LoraConfig, config.model_dump(), file)
    return config.model_dump()


def read_adapter(directory: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """The config of an adapter and its weights, on the CPU.

    Raises:
        ValueError: if one of its files is missing or cannot be read, or a weight is not finite.
    """
    directory = Path(directory)
    config, (shapes, _) = read_config(directory), read_shapes(directory)
    config = without_patterns(config, module_names(shapes), directory)
    try:
        weights = load_peft_weights(str(directory), device="cpu")
    except Exception as error:  # torch and safetensors have many kinds of errors for a damaged file
        raise ValueError(f"{directory}: the weights cannot be read: {shortened(error)}.") from error
    check_finite(weights, str(directory))
    return config, weights


def read_shapes(directory: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of an adapter's weights by their key, and the size of their file in bytes.

    Raises:
        ValueError: if the file is missing or cannot be read, or holds something other than the weights of an adapter.
    """
    file = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    if file is None:
        raise ValueError(f"{directory} holds no readable adapter: {SAFETENSORS_WEIGHTS_NAME} is missing.")
    size = file.stat().st_size
    try:
        if file.name == SAFETENSORS_WEIGHTS_NAME:
            with safe_open(file, framework="pt") as opened:
                keys = opened.keys()[: 4 * MODULES + 1]
                shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in keys}
        else:
            weights = torch.load(file, map_location="meta", weights_only=True)
            shapes = {key: tuple(value.shape) for key, value in weights.items()}
            # A view can have more values than its file has bytes.
            if any(value.layout != torch.strided or value.nbytes > size for value in weights.values()):
                raise ValueError("it holds tensors that are larger than the file")
    except Exception as error:  # torch and safetensors have many kinds of errors for a damaged file
        raise ValueError(f"{file} cannot be read: {shortened(error) or type(error).__name__}.") from error
    _check_shapes(shapes, file)
    return shapes, size


def _check_shapes(shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    if len(shapes) > 4 * MODULES:
        raise ValueError(f"{file} holds more than {4 * MODULES:,} tensors.")
    checked(list[Name], list(shapes), file)
    ranks: dict[str, dict[str, int]] = {}
    for key, shape in shapes.items():
        axis = rank_axis(key)
        if axis is None:
            continue
        if len(shape) < 2:
            raise ValueError(f"{file}: {key} of shape {shape} is not a matrix.")
        ranks.setdefault(lora_layers.module_of_key(key) or "", {})["AB"[axis]] = shape[axis]
    if len(ranks) > MODULES:
        raise ValueError(f"{file} adapts more than {MODULES:,} modules.")
    for module, pair in ranks.items():
        if pair.keys() != {"A", "B"} or pair["A"] != pair["B"]:
            raise ValueError(f"{file}: the LoRA matrices of {module} are not a pair: their ranks are {pair}.")


def rank_axis(key: str) -> int | None:
    """The dimension of a tensor that is as long as the rank: 0 of A, 1 of B; None for what is not a LoRA matrix."""
    matrix = _MATRIX.search(key)
    return None if matrix is None else "AB".index(matrix.group(1))


def module_names(shapes: dict[str, Any]) -> list[str]:
    """Names of the modules that an adapter adapts by LoRA, from the keys of its weights."""
    return list(dict.fromkeys(filter(None, map(lora_layers.module_of_key, shapes))))


def check_finite(weights: dict[str, Tensor], source: str) -> None:
    """Check that every weight is a finite number.

    Raises:
        ValueError: naming the first one that is not.
    """
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if bad:
        raise ValueError(
            f"{source}: {len(bad)} of {len(weights)} weights are not finite (NaN or infinite), the first is {bad[0]}. "
            "The training diverged: use an earlier checkpoint, or train with a lower learning rate."
        )


def without_patterns(config: dict, modules: list[str], directory: Path) -> dict:
    """An adapter's config in which `rank_pattern` and `alpha_pattern` name modules instead of describing them.

    PEFT matches these regular expressions without a limit of time. Here each is matched once, with one.

    Raises:
        ValueError: if one is not a valid regular expression, or matching takes too long.
    """
    config, deadline = dict(config), time.monotonic() + MATCHING_SECONDS
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if all(PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
            continue
        named: dict[float, list[str]] = {}
        for name in modules:
            for pattern, value in patterns.items():
                if _matches(pattern, name, deadline, f"{directory / CONFIG_NAME}: {field}"):
                    named.setdefault(value, []).append(re.escape(name))
                    break
        config[field] = {f"(?<!\\.)(?:{'|'.join(names)})": value for value, names in named.items()}
    return config


def _matches(pattern: str, name: str, deadline: float, where: str) -> bool:
    try:  # as PEFT matches it
        left = max(deadline - time.monotonic(), 1e-3)
        return regex.match(rf"(.*\.)?({pattern})$", name, timeout=left) is not None
    except TimeoutError as error:
        raise ValueError(f"{where}: matching {shortened(pattern, 80)!r} takes too long.") from error
    except regex.error as error:
        raise ValueError(f"{where}: {shortened(pattern, 80)!r} is not a valid regular expression.") from error


def read_summary(directory: Path) -> dict | None:
    """The contents of `gates.json`; None if there is none.

    Raises:
        ValueError: naming file and field.
    """
    file = directory / SUMMARY_FILE
    if not os.path.lexists(file):
        return None
    summary = checked(Summary, read_json(file), file).model_dump(by_alias=True, exclude_unset=True)
    if summary["gates"] != len(summary["blocks"]):
        raise ValueError(f"{file}: gates is {summary['gates']}, but blocks has {len(summary['blocks'])} entries.")
    return summary


def summary_text(summary: dict) -> str:
    """What `gates.json` is to hold. JSON has no NaN and no infinity: they become null, and are read as NaN."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(summary), indent=1, allow_nan=False) + "\n"


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The measurements of a results file, or of the one in an adapter's folder; none if there is no file.

    Raises:
        ValueError: naming file, row and field.
    """
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    if not os.path.lexists(file):
        return []
    if not file.is_file():
        raise ValueError(f"{file} is not a file.")
    if (size := file.stat().st_size) > ROWS_BYTES:
        raise ValueError(f"{file} is too large: {size:,} bytes, at most {ROWS_BYTES:,} are read.")
    try:
        rows = read_results(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = shortened(str(error).removeprefix(f"{file}, ").removesuffix("."))
        raise ValueError(f"{file} cannot be read: {reason}.") from error
    checked(list[Row], rows, file)
    return rows


def read_state_tensors(directory: Path) -> dict[str, Tensor]:
    """The contents of `gatelora_state.safetensors`, on the CPU.

    Raises:
        ValueError: if it is missing or cannot be read, or does not hold the state of gates.
    """
    file = directory / STATE_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(f"{file} cannot be read: {shortened(error)}.") from error
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    for key in ("progress", "steps", "total_steps"):
        if shapes.get(key) != () or not tensors[key].double().isfinite():
            raise ValueError(f"{file}: {key} is not a finite number (its shape is {shapes.get(key)}).")
    count = shapes.get("scores", ())
    if len(count) != 1 or shapes.get("open") not in ((0,), count):
        raise ValueError(f"{file}: scores and open do not fit: {shapes.get('scores')} and {shapes.get('open')}.")
    return tensors


# ---- writing ------------------------------------------------------------------------------------------------------


def replace_files(directory: Path, write: Callable[[Path], None], stale: tuple[str, ...] | set[str]) -> None:
    """Move the files that `write` puts into a temporary folder to `directory`, and remove old ones.

    The temporary folder has a name of its own, and links are replaced, not followed.

    Args:
        stale: names or patterns such as `model*.safetensors` of the files to remove if `write` did not write them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=directory) as temporary:
        write(Path(temporary))
        written = {
            file.name: file for file in (*Path(temporary).glob("*"), *Path(temporary).glob("*/*")) if file.is_file()
        }
        for name, file in written.items():
            os.replace(file, directory / name)
    for file in directory.iterdir():
        if file.name not in written and any(fnmatch(file.name, pattern) for pattern in stale) and not file.is_dir():
            file.unlink(missing_ok=True)


def copy_processor(source: Path, folder: Path) -> None:
    """Copy the processor and the tokenizer of an adapter's folder to another one.

    Links are followed only within the cache of the Hub: elsewhere they may lead to files that are not to be published.
    """
    blobs = source.absolute().parent.parent / "blobs"
    for file in (source / name for name in PROCESSOR_FILES):
        if file.is_symlink() and file.resolve().parent != blobs.resolve():
            logger.warning(f"{file} is a link and is not copied.")
        elif file.is_file():
            shutil.copyfile(file, folder / file.name)
