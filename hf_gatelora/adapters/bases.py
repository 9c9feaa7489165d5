"""The base model of an adapter: finding its class, loading it, and writing it with the adapter merged into it."""

import inspect
import logging
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..gates import lora_layers
from .files import IMAGE_FILES, PROCESSOR_FILES, TOKENIZER_FILES, check_finite, read_json
from .inspection import Adapter
from .names import explain_renamed
from .outputs import check_output, write_output
from .schemas import shortened

MOST_LAYERS, MOST_PARAMETERS = 1_000, 10**12  # of a base model: more can only come from a damaged config
# The files of an adapter's folder from which each of these is loaded.
PARTS = {AutoImageProcessor: IMAGE_FILES, AutoTokenizer: TOKENIZER_FILES, AutoProcessor: PROCESSOR_FILES}
logger = logging.getLogger(__name__)


def model_class(config: PreTrainedConfig, adapter: dict | None = None) -> type:
    """The class of a model: the one that an adapter was trained on, else that of the checkpoint, else `AutoModel`.

    Args:
        adapter: contents of `adapter_config.json`.
    """
    trained_on = ((adapter or {}).get("auto_mapping") or {}).get("base_model_class")
    found = [getattr(transformers, name, None) for name in (trained_on, *(config.architectures or [])) if name]
    return next((kind for kind in found if isinstance(kind, type) and issubclass(kind, PreTrainedModel)), AutoModel)


def load_config(model: str | os.PathLike, **settings) -> PreTrainedConfig:
    """The config of a model. No code of its repository is run.

    Args:
        model: folder or Hub id.
        settings: for `from_pretrained`, for instance `revision`.

    Raises:
        ValueError: if there is none that transformers can read.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, **settings)
    except Exception as error:  # transformers checks little of what a file holds
        if (Path(model) / CONFIG_NAME).is_file():
            raise ValueError(f"{model} is an adapter, not a model.") from error
        raise ValueError(f"{model} is not a model that transformers can load: {shortened(error)}") from error
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name, value in vars(part).items() if part is not None else ():
            if re.search(r"(layers?|depths?)$", name) and str(value).isdecimal() and int(value) > MOST_LAYERS:
                raise ValueError(f"{model}: {name} is {value} in its config.json: at most {MOST_LAYERS:,} are read.")
    return config


def empty_model(config: PreTrainedConfig, adapter: dict | None = None) -> PreTrainedModel:
    """A model without weights (they are on the meta device), of the class that `model_class` gives.

    Raises:
        ValueError: if the config does not describe one.
    """
    kind = model_class(config, adapter)
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False) if kind is AutoModel else kind(config)
        if (count := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
            raise ValueError(f"it would have {count:,} parameters")
        return model
    except Exception as error:  # of a size that is zero, negative or a string
        name = config.name_or_path or config.model_type
        raise ValueError(f"The config of {name} does not describe a {kind.__name__}: {shortened(error)}") from error


def load_reporting(kind: Any, name: str | os.PathLike, **settings) -> tuple[PreTrainedModel, set[str]]:
    """Load a model, in fp32 unless `settings` say otherwise, and the names of its weights that the checkpoint lacks.

    Raises:
        ValueError: if its files cannot be read or do not fit each other.
    """
    settings = {"dtype": torch.float32, "trust_remote_code": False} | settings
    try:
        with quiet():
            model, report = kind.from_pretrained(name, output_loading_info=True, **settings)
    except Exception as error:  # torch, safetensors and transformers have many kinds of errors for a damaged file
        raise ValueError(f"{name} cannot be loaded as a {kind.__name__}: {shortened(error)}") from error
    return model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}


def refuse_random(name: str | os.PathLike, model: PreTrainedModel, random: set[str]) -> None:
    """Check that no weight of a loaded model still has its random initial value.

    Raises:
        ValueError: naming the first one that has.
    """
    if random:
        raise ValueError(
            f"{name} lacks {len(random)} weights of {type(model).__name__} (first: {min(random)}): they would be "
            "random. Is it a checkpoint of this architecture?"
        )


def load_base(
    adapter: Adapter, model: str | os.PathLike | None = None, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, bool]:
    """Load the base model of an adapter, in the revision that it was trained on.

    Args:
        model: folder or Hub id; None takes the one that the adapter names.
        dtype: of the model's weights; `"auto"` leaves them as they were saved.

    Returns:
        The model, and whether it has a new head: one that the adapter brings and the base was not published with, so
        that its own weights are random.

    Raises:
        ValueError: if the base cannot be loaded, or the adapter does not belong to it, is not LoRA, or changed its
            biases.
    """
    name, source = adapter.base(model)
    if not adapter.modules or adapter.config["peft_type"] not in ("LORA", "ADALORA"):
        raise ValueError(f"{adapter.folder} is a {adapter.config['peft_type']} adapter, or without LoRA layers.")
    if adapter.config.get("layer_replication"):
        raise ValueError(
            f"{adapter.folder} cannot be used here: its layer_replication makes another model of the base."
        )
    if (bias := adapter.config.get("bias", "none")) != "none":
        raise ValueError(f"{adapter.folder} cannot be used here: it trained biases (bias={bias!r}) of the base model.")
    try:
        config = load_config(name, **source)
    except ValueError as error:
        hint = "" if model else f" {adapter.folder} names it as its base: pass the place where it is now (--model)."
        raise ValueError(f"{error}{hint}") from error
    kind = model_class(config, adapter.config)
    if not isinstance(config, getattr(kind, "config_class", None) or PreTrainedConfig):
        raise ValueError(f"{adapter.folder} does not fit {name}: that is a {config.model_type}, not a {kind.__name__}.")
    settings = {**source, "dtype": dtype, **_head_settings(adapter, config, name)}
    loaded, new = load_reporting(kind, name, **settings)
    random = {key for key in new if key not in adapter.heads}
    poolable = "add_pooling_layer" in inspect.signature(type(loaded)).parameters
    if random and poolable and all(key.startswith("pooler.") for key in random):  # published without, as DINO's ViT
        loaded, new = load_reporting(kind, name, **settings, add_pooling_layer=False)
        random = {key for key in new if key not in adapter.heads}
    refuse_random(name, loaded, random)
    return loaded, bool(new)


def _head_settings(adapter: Adapter, config: PreTrainedConfig, name: str) -> dict:
    """What `from_pretrained` needs besides so that the adapter's heads fit; empty if they do.

    Raises:
        ValueError: if the adapter does not belong to the base.
    """
    empty = empty_model(config, adapter.config)
    own, modules = {key: tuple(value.shape) for key, value in empty.state_dict().items()}, dict(empty.named_modules())
    what = f"{adapter.folder} does not fit {type(empty).__name__} {name}"
    missing = [module for module in adapter.modules if module not in modules]
    missing += [key for key in adapter.heads if key not in own]
    if missing:
        advice = explain_renamed(config, missing, (adapter.summary or {}).get("transformers"))
        advice = advice or "give the base model that it was trained on"
        raise ValueError(f"{what}: the model has no {missing[0]} ({len(missing)} such names): {advice}.")
    settings = {}
    for key, shape in adapter.heads.items():
        if shape != own[key]:
            labels = getattr(config, "num_labels", None)
            if not shape or not own[key] or own[key][0] != labels or shape[1:] != own[key][1:]:
                raise ValueError(f"{what}: {key} is of shape {shape} in the adapter and {own[key]} in the model.")
            settings = {"num_labels": shape[0], "ignore_mismatched_sizes": True}
    return settings


def load_adapted(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The base with the adapter on it, in evaluation mode.

    Raises:
        ValueError: if they do not fit, or the adapter holds weights that are not finite.
    """
    try:
        with quiet():
            config = _without_patterns(PeftConfig.from_pretrained(str(adapter.folder)), base, adapter)
            adapted = PeftModel.from_pretrained(base, str(adapter.folder), config=config).eval()
    except Exception as error:  # PEFT checks little of what a config holds
        reason = next((line for line in str(error).splitlines() if "mismatch" in line), str(error))
        reason = shortened(reason.replace(lora_layers.PREFIX, ""))
        raise ValueError(f"{adapter.folder} does not fit {type(base).__name__}: {reason}") from error
    weights = {name: value for name, value in adapted.state_dict().items() if lora_layers.is_adapter_key(name)}
    check_finite(weights, str(adapter.folder))
    return adapted


def _without_patterns(config: Any, base: PreTrainedModel, adapter: Adapter) -> PeftConfig:
    """The config with the names of modules in place of the patterns that it has, which PEFT matches without a limit."""
    described = (getattr(config, name, None) for name in ("target_modules", "exclude_modules", "layers_pattern"))
    if any(isinstance(field, str) for field in described) or getattr(config, "layers_pattern", None):
        names = [name for name, _ in base.named_modules()]
        for name, value in lora_layers.exact_targets(list(adapter.modules), names, {}).items():
            if name not in ("rank_pattern", "alpha_pattern") and hasattr(config, name):
                setattr(config, name, value)
    if config.peft_type == "LORA":
        config.rank_pattern = adapter.config["rank_pattern"] or {}
        config.alpha_pattern = adapter.config["alpha_pattern"] or {}
    return config


def merge_adapter(
    adapter: Adapter,
    output: str | os.PathLike,
    model: str | os.PathLike | None = None,
    dtype: torch.dtype | str = "auto",
    force: bool = False,
) -> PreTrainedModel:
    """Write the base model with the adapter merged into its weights, and its processor or tokenizer beside it.

    Args:
        adapter: any LoRA.
        output: a folder, as for `outputs.check_output`.
        model: folder or Hub id of the base; None takes the one that the adapter names.
        dtype: of the merged weights; `"auto"` is that of the base. The merge itself is done in fp32.
        force: write to `output` even if it holds something else.

    Returns:
        The merged model.

    Raises:
        ValueError: as `load_base`, and if `output` may not be written to or a merged weight is not finite.
    """
    output = Path(output)
    check_output(output, "merge", [adapter.folder], force)
    base, _ = load_base(adapter, model)
    merged = load_adapted(base, adapter).merge_and_unload()
    if dtype == "auto":
        name, source = adapter.base(model)
        dtype = load_config(name, **source).dtype or torch.float32
    merged.to(dtype)
    if bad := next((name for name, value in merged.state_dict().items() if not value.float().isfinite().all()), None):
        raise ValueError(f"{bad} of the merged model is not finite in {dtype}: give another --dtype, such as float32.")
    processor = trained_processor(adapter, model)
    classes = ((adapter.summary or {}).get("base_model") or {}).get("classes") or []
    known = getattr(merged.config, "id2label", None) or {}
    # The base's order of the same names counts: earlier versions wrote more than ten classes in another one.
    if len(classes) == len(known) and set(classes) != set(known.values()):
        merged.config.id2label = dict(enumerate(classes))
        merged.config.label2id = {label: i for i, label in enumerate(classes)}

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)

    with quiet():
        write_output(output, "merge", [adapter.folder], write)
    if processor is None:
        logger.warning("Neither adapter nor base has a processor or tokenizer that can be loaded: none was written.")
    return merged


def load_processor(kind: Any, adapter: Adapter, model: str | os.PathLike | None = None):
    """The processor, tokenizer or image processor that an adapter was trained with; None if there is none.

    That is the one in the adapter's own folder, else that of the base.

    Args:
        kind: `AutoProcessor`, `AutoTokenizer` or `AutoImageProcessor`.
        model: folder or Hub id of the base; None takes the one that the adapter names.

    Raises:
        ValueError: if the one in the adapter's folder cannot be read.
    """
    return _own_processor(kind, adapter) or _base_processor(kind, adapter, model)


def trained_processor(adapter: Adapter, model: str | os.PathLike | None = None):
    """The whole processor that an adapter was trained with: what its folder lacks of it, the base has.

    Args, Raises: as `load_processor`.
    """
    image, tokenizer = _own_processor(AutoImageProcessor, adapter), _own_processor(AutoTokenizer, adapter)
    whole = _base_processor(AutoProcessor, adapter, model)
    if image is not None and tokenizer is not None and not isinstance(whole, ProcessorMixin):
        return _own_processor(AutoProcessor, adapter)
    if not isinstance(whole, ProcessorMixin):
        return image or tokenizer or whole
    for name, part in (("image_processor", image), ("tokenizer", tokenizer)):
        if part is not None and hasattr(whole, name):
            setattr(whole, name, part)
    return whole


def _own_processor(kind: Any, adapter: Adapter):
    files = [adapter.folder / name for name in PARTS[kind] if (adapter.folder / name).is_file()]
    try:
        for file in files:
            if file.suffix == ".json" and not isinstance(read_json(file), dict):
                raise ValueError(f"{file.name} is not a JSON object.")
        with quiet():
            return kind.from_pretrained(adapter.folder, trust_remote_code=False) if files else None
    except Exception as error:  # transformers and tokenizers check little of what a file holds
        raise ValueError(f"{adapter.folder}: its processor cannot be read: {shortened(error)}") from error


def _base_processor(kind: Any, adapter: Adapter, model: str | os.PathLike | None):
    name, source = adapter.base(model)
    try:
        with quiet():
            return kind.from_pretrained(name, trust_remote_code=False, **source)
    except Exception:  # there is none, or none that can be read
        return None


@contextmanager
def quiet():
    """Within this context transformers does not warn, for instance of new heads, and shows only downloads' progress."""
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
