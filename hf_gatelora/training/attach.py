"""`attach_gates` puts gates on the LoRA layers of a `PeftModel`, which it checks first."""

import logging

from peft import PeftModel
from torch import nn

from ..config import GateConfig
from ..gates import lora_layers
from ..gates.targets import outside_of_layers
from .controller import CONTROLLER, GateController

logger = logging.getLogger(__name__)


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that is compiled, or holds a compiled base: the keys of its adapters would load nowhere else.

    Raises:
        ValueError: saying when to compile.
    """
    if any("_orig_mod" in name.split(".") for name, _ in model.named_modules()):  # as torch.compile names it
        raise ValueError(
            "The model was compiled before its gates were attached, so that stock PEFT could not load its adapters. "
            "Put LoRA and gates on the plain model, and compile afterwards: torch.compile(peft_model) after "
            "attach_gates, or torch_compile=True in the training arguments."
        )


def attach_gates(
    peft_model: PeftModel, config: GateConfig | None = None, adapter_name: str = "default"
) -> GateController:
    """Put a gate on every LoRA block of one adapter, in place.

    Args:
        peft_model: an ordinary `PeftModel` with LoRA layers, as `get_peft_model` returns it.
        config: the gates' settings; None takes the defaults.
        adapter_name: which of the model's adapters.

    Returns:
        The controller of the gates. `peft_model.save_pretrained` writes stock adapters from now on.

    Raises:
        TypeError: if the model is no `PeftModel`, `config` no `GateConfig`, the adapter is not LoRA, or a layer
            cannot be gated.
        ValueError: if the adapter does not exist or has no LoRA layer, a target pattern, budget, group or cost
            matches nothing or several, or the model has gates already.
    """
    if not isinstance(peft_model, PeftModel):
        refuse_compiled(peft_model)
        lora_layers.refuse_injected(peft_model)
        raise TypeError(
            f"attach_gates needs a PeftModel, found {type(peft_model).__name__}. Make one with "
            "peft.get_peft_model(model, LoraConfig(...)), and attach the gates before accelerator.prepare."
        )
    if not isinstance(config, GateConfig | None):
        raise TypeError(f"config must be a GateConfig, found {type(config).__name__}. Give GateConfig(...).")
    if adapter_name not in peft_model.peft_config:
        raise ValueError(f"No adapter {adapter_name!r}: the model has {sorted(peft_model.peft_config)}.")
    if getattr(peft_model, CONTROLLER, None) is not None:
        attached = getattr(peft_model, CONTROLLER).adapter_name
        raise ValueError(
            f"The model has gates already, on adapter {attached!r}: use that GateController. To gate another adapter, "
            "first call its fold(), which freezes these gates and leaves stock LoRA."
        )
    refuse_compiled(peft_model)
    layers = lora_layers.lora_layers(peft_model, adapter_name)
    lora_layers.check_targets(peft_model, peft_model.peft_config[adapter_name])
    outside = outside_of_layers(peft_model, list(layers))
    if outside:
        logger.warning(
            f"These gates are on heads or projections, outside of the repeated layers: {', '.join(outside)}. "
            'target_modules="all-linear" takes them in; target_modules=lora_targets(model) leaves them out.'
        )
    return GateController(peft_model, layers, config or GateConfig(), adapter_name)
