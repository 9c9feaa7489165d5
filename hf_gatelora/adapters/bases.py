"""The base model of an adapter: finding its class, loading it, and writing it with the adapter merged in."""

import inspect
import logging
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..gates.lora_layers import PREFIX
from .files import replace_files
from .inspection import Adapter

# Weight files of a model that an earlier merge, in one file or in several, may have left.
STALE = {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME}
logger = logging.getLogger(__name__)


def model_class(config: PreTrainedConfig, adapter: dict | None = None) -> type:
    """The class of a model: the one that an adapter was trained on, else that of the checkpoint, else `AutoModel`.

    Args:
        adapter: contents of `adapter_config.json`.
    """
    trained_on = ((adapter or {}).get("auto_mapping") or {}).get("base_model_class")
    names = [trained_on, *(config.architectures or [])]
    return next((getattr(transformers, name) for name in names if name and hasattr(transformers, name)), AutoModel)


def load_config(model: str | os.PathLike) -> PreTrainedConfig:
    """The config of a model, a folder or a Hub id.

    Raises:
        ValueError: where there is none that transformers can read.
    """
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if (Path(model) / CONFIG_NAME).is_file():
            raise ValueError(f"{model} is an adapter, not a model.") from error
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{model} is no model that transformers can load: {reason}") from error


def empty_model(config: PreTrainedConfig, adapter: dict | None = None) -> PreTrainedModel:
    """A model without weights (they are on the meta device), of the class that `model_class` says."""
    with init_empty_weights():
        kind = model_class(config, adapter)
        return kind.from_config(config, trust_remote_code=False) if kind is AutoModel else kind(config)


def load_reporting(kind: type, name: str | os.PathLike, **settings) -> tuple[PreTrainedModel, set[str]]:
    """Load a model, in fp32 unless `settings` say otherwise, and the names of its weights that the checkpoint lacks."""
    with quiet():
        model, report = kind.from_pretrained(name, output_loading_info=True, **{"dtype": torch.float32} | settings)
    return model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}


def refuse_random(name: str | os.PathLike, model: PreTrainedModel, random: set[str]) -> None:
    """Check that no weight of a loaded model is left at its random start.

    Raises:
        ValueError: naming the first of them.
    """
    if random:
        raise ValueError(
            f"{name} lacks {len(random)} weights of {type(model).__name__} (first: {min(random)}): they would be "
            "random. Is it a checkpoint of this architecture?"
        )


def load_base(
    adapter: Adapter, model: str | os.PathLike | None = None, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, bool]:
    """Load the base model of an adapter.

    Args:
        model: folder or Hub id; None takes the one that the adapter names.
        dtype: of the model's weights; `"auto"` leaves them as they were saved.

    Returns:
        The model, and whether it has a new head: one that the adapter brings and the base was not published with, whose
        own weights are random.

    Raises:
        ValueError: where the base cannot be loaded, the adapter does not belong to it, or it changed its biases.
    """
    name = model or adapter.config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{adapter.folder} does not say what its base model is: give it.")
    if (bias := adapter.config.get("bias", "none")) != "none":
        raise ValueError(f"{adapter.folder} cannot be used here: it trained biases (bias={bias!r}) of the base model.")
    try:
        config = load_config(name)
    except ValueError as error:
        hint = "" if model else f" {adapter.folder} names it as its base: give the place where it is now."
        raise ValueError(f"{error}{hint}") from error
    kind = model_class(config, adapter.config)
    if not isinstance(config, getattr(kind, "config_class", None) or PreTrainedConfig):
        raise ValueError(f"{adapter.folder} does not fit {name}: that is a {config.model_type}, no {kind.__name__}.")
    settings = _head_settings(adapter, config, name)
    loaded, new = load_reporting(kind, name, dtype=dtype, **settings)
    random = {key for key in new if key not in adapter.heads}
    poolable = "add_pooling_layer" in inspect.signature(type(loaded)).parameters
    if random and poolable and all(key.startswith("pooler.") for key in random):  # published without, as DINO's ViT
        loaded, new = load_reporting(kind, name, dtype=dtype, **settings, add_pooling_layer=False)
        random = {key for key in new if key not in adapter.heads}
    refuse_random(name, loaded, random)
    return loaded, bool(new)


def _head_settings(adapter: Adapter, config: PreTrainedConfig, name) -> dict:
    """What the base's class needs to be told so that the adapter's heads fit; empty where they do.

    Raises:
        ValueError: where the adapter does not belong to the base.
    """
    empty = empty_model(config, adapter.config)
    own, modules = {key: tuple(value.shape) for key, value in empty.state_dict().items()}, dict(empty.named_modules())
    what = f"{adapter.folder} does not fit {type(empty).__name__} {name}"
    missing = [module for module in adapter.modules if module not in modules]
    missing += [key for key in adapter.heads if key not in own]
    if missing:
        raise ValueError(f"{what}: the model has no {missing[0]} ({len(missing)} such names). Give its own base model.")
    settings = {}
    for key, shape in adapter.heads.items():
        if shape != own[key]:
            labels = getattr(config, "num_labels", None)
            if own[key][0] != labels or shape[1:] != own[key][1:]:
                raise ValueError(f"{what}: {key} is of shape {shape} in the adapter and {own[key]} in the model.")
            settings = {"num_labels": shape[0], "ignore_mismatched_sizes": True}
    return settings


def load_adapted(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The base with the adapter on it, in evaluation mode.

    Raises:
        ValueError: where they do not fit.
    """
    try:
        with quiet():
            return PeftModel.from_pretrained(base, str(adapter.folder)).eval()
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), str(error))
        reason = reason.replace(PREFIX, "")
        raise ValueError(f"{adapter.folder} does not fit {type(base).__name__}: {reason}") from error


def merge_adapter(
    adapter: Adapter,
    output: str | os.PathLike,
    model: str | os.PathLike | None = None,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """Write the base model with the adapter merged into its weights, and its processor or tokenizer beside it.

    Args:
        adapter: any LoRA.
        output: a folder that holds no adapter.
        model: folder or Hub id of the base; None takes the one that the adapter names.
        dtype: of the merged weights; `"auto"` is that of the base. The merge itself is done in fp32.

    Returns:
        The merged model.

    Raises:
        ValueError: as `load_base`, and where `output` holds an adapter, which transformers would load on top of it.
    """
    output = Path(output)
    if (output / CONFIG_NAME).is_file():
        raise ValueError(f"{output} holds an adapter, which would be loaded on top of the merged model: give another.")
    if not adapter.modules:
        raise ValueError(f"{adapter.folder} is a {adapter.config.get('peft_type')} adapter without LoRA layers.")
    base, _ = load_base(adapter, model)
    merged = load_adapted(base, adapter).merge_and_unload()
    if dtype == "auto":
        dtype = load_config(model or adapter.config["base_model_name_or_path"]).dtype or torch.float32
    merged.to(dtype)
    # The base's first: the adapter's folder may have a part of it, such as the image processor without a tokenizer.
    processor = load_processor(AutoProcessor, model or adapter.config["base_model_name_or_path"], adapter.folder)
    classes = ((adapter.summary or {}).get("base_model") or {}).get("classes") or []
    if len(classes) == getattr(merged.config, "num_labels", None):
        merged.config.id2label = dict(enumerate(classes))
        merged.config.label2id = {label: i for i, label in enumerate(classes)}

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)

    with quiet():
        replace_files(output, write, STALE)
    if processor is None:
        logger.warning("The base has no processor or tokenizer that transformers can load: none was written.")
    return merged


def load_processor(kind: type, *places: str | os.PathLike):
    """The processor, tokenizer or image processor of the first place that has one; None where none has.

    Args:
        kind: `AutoProcessor`, `AutoTokenizer` or `AutoImageProcessor`.
        places: folders or Hub ids.
    """
    for place in places:
        try:
            with quiet():
                return kind.from_pretrained(place)
        except (OSError, ValueError):
            continue
    return None


@contextmanager
def quiet():
    """Within this context transformers does not warn, as it does of new heads; of progress only downloads are shown."""
    log = transformers.utils.logging
    level, bars, downloads = log.get_verbosity(), log.is_progress_bar_enabled(), not are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
