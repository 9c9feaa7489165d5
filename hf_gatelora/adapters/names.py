"""Releases of transformers in which the layers of a model got other names. An adapter fits the names of its release."""

import transformers
from transformers import PreTrainedConfig

BEFORE = ("query", "key", "value", "dense", "weights_in", "weights_out")  # what all of these models had
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# By model type: the first release with the new names, and the last parts of these names.
RENAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("beit", "deit", "ijepa", "segformer", "swin", "vit", "vit_mae", "vit_msn", "vivit"),
        ("5.9.0", (*ATTENTION, "fc1", "fc2")),
    ),
    "pixio": ("5.9.0", ATTENTION),
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers", "radio"), ("5.18.0", (*ATTENTION, "gate_proj", "up_proj", "down_proj"))
    ),
}


def lowest_transformers(config: PreTrainedConfig | None, modules: list[str]) -> str | None:
    """The first release of transformers that has modules of these names in such a model; None if they are older."""
    release, names = RENAMED.get(getattr(config, "model_type", ""), ("", ()))
    return release if any(name.rpartition(".")[2] in names for name in modules) else None


def explain_renamed(config: PreTrainedConfig, missing: list[str], stated: str | None = None) -> str | None:
    """Why a model lacks the modules of an adapter, if it is because transformers renamed them; else None.

    Args:
        config: of the model.
        missing: modules of the adapter that the model does not have.
        stated: the lowest version of transformers according to the adapter's `gates.json`.
    """
    here = transformers.__version__
    needed = stated or lowest_transformers(config, missing)
    if needed is not None and _release(here) < _release(needed):
        return f"its layers have these names since transformers {needed}, and {here} is installed: upgrade transformers"
    release, _ = RENAMED.get(config.model_type, (None, ()))
    if release is not None and any(name.rpartition(".")[2] in BEFORE for name in missing):
        return (
            f"transformers {release} renamed the layers of {config.model_type}, and {here} is installed: use the "
            f"adapter with transformers<{release}, or train it again"
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
