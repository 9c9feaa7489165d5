"""Gated models as files: saving them as stock adapters, resuming from them, pushing them to the Hub."""

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn

from ..adapters.checkpoint import check_same_run, load_raw, read_state
from ..adapters.export import write_adapter
from ..adapters.files import read_rows
from ..gates import engines, lora_layers
from ..gates.state import open_mask_of

if TYPE_CHECKING:
    from .controller import GateController

logger = logging.getLogger(__name__)


def is_partitioned(model: nn.Module) -> bool:
    """Whether each process holds only a part of the parameters."""
    return any(engines.engine_of(p).partitioned for p in model.parameters())


def whole_adapters(model: PeftModel) -> dict[str, Tensor] | None:
    """Weights of all adapters by their name in the model, gathered from all processes; None if each holds them whole.

    Collective.
    """
    if not is_partitioned(model):
        return None
    weights = {n: t for n, t in model.state_dict(keep_vars=True).items() if lora_layers.is_adapter_key(n)}
    return dict(zip(weights, engines.read(list(weights.values())), strict=True))


def save_folded(gates: "GateController", directory) -> None:
    """Write a stock PEFT adapter that gives the gated model's outputs; the model stays as it is. Collective."""
    if not gates.frozen:
        logger.warning(
            f"The gates are not frozen yet: this adapter holds all {len(gates.names)} blocks (step was called "
            f"{gates.steps} times, up to progress {gates.progress:g}; they freeze at {gates.config.freeze_ratio:g})."
        )
    weights = whole_adapters(gates.model)
    if PartialState().is_main_process:
        _write(gates, directory, state_dict=weights)
    PartialState().wait_for_everyone()


def save_pretrained(
    gates: "GateController",
    save_directory,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    is_main_process: bool = True,
    **kwargs,
) -> None:
    """`PeftModel.save_pretrained` of a gated model: the gated adapter is written folded, the others as always.

    The folded adapter's files lie in `save_directory` itself, unless the adapter named "default" is also saved.
    """
    model, name = gates.model, gates.adapter_name
    selected = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
    kwargs["safe_serialization"] = safe_serialization
    if kwargs.get("state_dict") is None:
        kwargs["state_dict"] = whole_adapters(model)
    others = [other for other in selected if other != name]
    if others:
        PeftModel.save_pretrained(
            model, save_directory, selected_adapters=others, is_main_process=is_main_process, **kwargs
        )
    if name in selected and is_main_process:
        _write(gates, Path(save_directory) / (name if "default" in others else ""), **kwargs)


def _write(gates: "GateController", directory, **kwargs) -> None:
    from ..card.write import refresh_card  # late: training needs no cards until it saves

    values = gates.gates.tolist()
    factors = {m: v for members, v in zip(gates.blocks.values(), values, strict=True) for m in members}
    write_adapter(
        gates.model,
        gates.adapter_name,
        factors,
        gates.state_dict(),
        gates.description(),
        directory,
        results=gates.results,
        **kwargs,
    )
    refresh_card(directory)


def describe_base(model: PeftModel) -> dict:
    """Class of the base model, and names of the classes that its head tells apart, for the model card."""
    base = model.get_base_model()
    described: dict = {"class": type(base).__name__, "library": type(base).__module__.split(".")[0]}
    if described["class"].endswith(("ForImageClassification", "ForSequenceClassification")):
        names = getattr(getattr(base, "config", None), "id2label", None) or {}
        described["classes"] = [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return described


def push_to_hub(gates: "GateController", repo_id: str, *, commit_message: str | None = None, **kwargs) -> str | None:
    """`PeftModel.push_to_hub` of a gated model: its folder as `save_pretrained` writes it, with our model card.

    Collective, as a save is; the main process pushes.

    Args:
        kwargs: private, revision, token and create_pr, as for `card.push.push_adapter`.

    Returns:
        The URL of the repository; None on the other processes.
    """
    from ..card.push import PushError, push_adapter  # late: training needs no Hub until it pushes

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(gates, folder, selected_adapters=[gates.adapter_name])
        if not PartialState().is_main_process:
            return None
        try:
            return push_adapter(folder, repo_id, commit_message=commit_message, **kwargs)
        except PushError as error:
            raise PushError(
                error.reason,
                "Call push_to_hub again, or save_pretrained(FOLDER) and push that later: gatelora push FOLDER "
                f"{repo_id}",
            ) from error


def check_resumable(gates: "GateController", directory) -> None:
    """Check that a checkpoint was written by a run with the same base model, blocks and gate configuration.

    Raises:
        ValueError: naming what differs.
    """
    check_same_run(directory, gates.summary())


def restore(gates: "GateController", directory, engine_loaded: bool = False) -> None:
    """Take over the gates of a checkpoint that `check_resumable` accepted and whose weights are loaded.

    Args:
        engine_loaded: whether an engine loaded the weights as trained; otherwise they came from the folded adapter.

    Raises:
        ValueError: if these gates are frozen and the checkpoint has other open blocks.
    """
    state, raw, summary = read_state(directory)
    if gates.frozen:
        mask = open_mask_of(state)
        if mask is None or not torch.equal(mask, gates.open_mask):
            raise ValueError(
                f"{directory} has other open blocks than these gates, which are frozen. Load it into a new model, with "
                "new gates."
            )
    elif not engine_loaded:
        load_raw(gates.model, raw)
    gates.load_state_dict(state, write_scores=not engine_loaded, run=summary.get("run"))
    gates.record(read_rows(Path(directory)))
