"""Where a command writes an adapter or a model: an empty folder, or one that it wrote from the same source before."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..records import FRONTIER, GATE_MAP, RESULTS_FILE, STATE_FILE, SUMMARY_FILE, write_results
from .files import PROCESSOR_FILES, copy_processor, replace_files, summary_text

logger = logging.getLogger(__name__)

MARK = ".gatelora_written"  # hidden, so that no push takes it along; says by which command, from what, and what
# What an adapter or a model may consist of. Transformers would load an adapter on top of a model in the same folder.
REPLACED = (
    *(CONFIG_NAME, "adapter_model.*", SUMMARY_FILE, STATE_FILE, RESULTS_FILE, GATE_MAP, FRONTIER),
    *("config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*.bin*", *PROCESSOR_FILES),
)


def check_output(output: Path, command: str, sources: list[Path], force: bool = False) -> None:
    """Check that a command may write to a folder.

    Args:
        command: which one, as `fold`.
        sources: the folders that it reads.
        force: allow a folder that holds something else. Of an adapter or model there the files are replaced.

    Raises:
        ValueError: if it is one of the sources, or holds what this command did not write from them.
    """
    if output.resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"{output} is the adapter's own folder: give another one, the adapter stays as it is.")
    if force or not output.is_dir():
        return
    there = sorted(file.name for file in output.iterdir() if not file.name.startswith("."))
    mark = output / MARK
    if there and not (mark.is_file() and mark.read_bytes() == _mark(output, command, sources)):
        kinds = {"config.json": "a model", CONFIG_NAME: "an adapter"}
        found = next((kind for name, kind in kinds.items() if name in there), there[0])
        raise ValueError(
            f"{output} holds {found} that `{command}` did not write from {' and '.join(map(str, sources))}, or that "
            "was changed since. Give an empty folder, or --force (force=True) to replace an adapter or model."
        )


def write_output(output: Path, command: str, sources: list[Path], write: Callable[[Path], None]) -> None:
    """Replace what a folder holds of an adapter or a model by the files that `write` puts into a temporary one."""

    def marked(folder: Path) -> None:
        write(folder)
        (folder / MARK).write_bytes(_mark(folder, command, sources))

    replace_files(output, marked, REPLACED)


def _mark(folder: Path, command: str, sources: list[Path]) -> bytes:
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.safetensors"))]
    made = command, [str(source.resolve()) for source in sources], weights
    return hashlib.sha256(repr(made).encode()).hexdigest().encode()  # not the paths: folders are copied and shared


def write_stock(
    output: Path,
    command: str,
    sources: list[Path],
    config: dict,
    weights: dict[str, Tensor],
    summary: dict | None = None,
    rows: list[dict] | None = None,
) -> None:
    """Write a stock adapter with the processor of its sources; `gates.json` and `results.jsonl` if there are contents.

    Args:
        command, sources: as for `check_output`.
    """
    processors = {source: _contents(source) for source in sources if _contents(source)}
    if len(set(map(str, processors.values()))) > 1:
        logger.warning(
            f"The adapters were trained with different processors: that of {next(iter(processors))} is kept."
        )

    def write(folder: Path) -> None:
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        if summary is not None:
            (folder / SUMMARY_FILE).write_text(summary_text(summary), encoding="utf-8")
        if rows:
            write_results(rows, folder / RESULTS_FILE)
        if processors:
            copy_processor(next(iter(processors)), folder)

    write_output(output, command, sources, write)


def _contents(folder: Path) -> dict[str, str]:
    files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
