"""The seam to PEFT: the only file that touches its internals.

PEFT's `LoraLayer.lora_variant[adapter]` decides how a LoRA layer's forward, merge and unmerge work. A gated layer is an
ordinary LoRA layer with `GatedLora` in that slot; taking it out again leaves a stock layer.
"""

import copy
import hashlib
import re
from collections import Counter

import torch
import torch.utils._python_dispatch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import engines
from .kinds import Gate
from .product import AddGated

PREFIX = "base_model.model."

# What transformers 5 calls modules of its vision models, by their names in transformers 4.
RENAMED = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "attention.output.dense": "o_proj",
    "output.dense": "fc2",
    "intermediate.dense": "fc1",
    "dense": "o_proj, fc1 and fc2",
    "out_proj": "o_proj",
    "o_proj": "out_proj",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


PRESET = "Or take target_modules=hf_gatelora.lora_targets(model), the linear layers of its transformer layers."

# The initialisations that leave the base weights as they are.
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

# PEFT's layers whose forward, merge and unmerge all ask the variant slot. By name, because those of bitsandbytes are
# not there without it; not by isinstance, because layers of other quantised weights derive from Linear but merge past
# the slot.
GATEABLE = {"layer.Linear", "layer.Conv1d", "layer.Conv2d", "layer.Conv3d", "bnb.Linear8bitLt", "bnb.Linear4bit"}


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# What the fused path has to know and no public name tells. If a version of torch lacks one of them, nothing is fused:
# the plain path computes the same.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
TRANSFORMS = getattr(torch._C, "_are_functorch_transforms_active", None)
DISPATCH_MODES = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", None)


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its own forward."""
    return any(getattr(module, name, True) for name in HOOKS) or "forward" in module.__dict__


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling the module is nothing but a product with its weight."""
    return type(linear) is nn.Linear and not _is_hooked(linear)


def _is_watched() -> bool:
    """Whether operations count one by one here, so that none may be fused or write over what another returned."""
    # Compilers fuse by themselves; tracing, function transforms and forward-mode AD allow no writing over.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if GLOBAL_HOOKS is None or TRANSFORMS is None or DISPATCH_MODES is None:
        return True
    if TRANSFORMS() or getattr(forward_ad, "_current_level", 0) >= 0 or GLOBAL_HOOKS():
        return True
    # Selective activation checkpointing keeps what operations returned, and gives it out again in the backward.
    classes = (parent for mode in DISPATCH_MODES() for parent in type(mode).__mro__)
    return any(parent.__module__ == "torch.utils.checkpoint" for parent in classes)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast brings the inputs of a product; None if it does not."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


class GatedLora(LoraVariant):
    """Computes `base(x) + g * (alpha / r) * B A x` for the gate `g` of the layer's block; None is closed for good."""

    def __init__(self, gate: Gate | None):
        self.gate = gate
        self._merged: Tensor | float = 0.0  # the gate value that was merged: unmerging must take away the same

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x, scaling = module.lora_dropout[active_adapter](x), module.scaling[active_adapter]
        if self.gate is None:
            return result + up(down(x) * 0.0)
        if self._may_overwrite(module, down, up, x, result):
            dtype, tau = result.dtype, self.gate.kind.threshold
            if tau is not None and self.gate.score.dtype == torch.float32 and not _is_hooked(self.gate):
                gate = self.gate.score
            else:
                gate, tau = self.gate(noisy=module.training), None
            return AddGated.apply(result, x.to(dtype), down.weight.to(dtype), up.weight.to(dtype), gate, tau, scaling)
        hidden = down(x)
        return result + up(hidden * (self.gate(noisy=module.training) * scaling).to(hidden.dtype))

    def _may_overwrite(self, module: LoraLayer, down: nn.Module, up: nn.Module, x: Tensor, result: Tensor) -> bool:
        # Nobody else holds what a plain nn.Linear returned. Engines that partition parameters hook the modules.
        if _is_watched() or x.layout != torch.strided or not result.is_contiguous():
            return False
        if torch.is_grad_enabled() and not down.weight.requires_grad:  # by itself, a frozen A does not keep x
            return False
        plain = _is_plain(down) and _is_plain(up) and _is_plain(module.base_layer)
        same = result.dtype == x.dtype or result.dtype == _autocast_dtype(x)
        return plain and same and x.device == result.device

    def _delta(self, module: LoraLayer, adapter: str, weight: Tensor) -> Tensor:
        return (module.get_delta_weight(adapter).detach() * self._merged).to(weight.dtype)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self._merged = 0.0 if self.gate is None else self.gate().detach()
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(self.merge_safe(module, active_adapter, orig_weight))

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - self._delta(module, active_adapter, orig_weight)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that PEFT wrapped; the module itself if it is not an adapter's layer."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def refuse_injected(model: nn.Module) -> None:
    """Refuse a model that holds adapter layers without being a `PeftModel`, as transformers' `add_adapter` leaves it.

    Raises:
        TypeError: saying how to adapt the model instead.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError(
            f"{type(model).__name__} already has adapter layers, from its own add_adapter or load_adapter; gates need "
            "a PeftModel. Replace model.add_adapter(LoraConfig(...)) by model = peft.get_peft_model(model, "
            "LoraConfig(...)). To continue with a trained adapter, call model.save_pretrained(directory) "
            "(transformers 5.24 needs PEFT 0.22 for that), then peft.PeftModel.from_pretrained(base_model, directory, "
            "is_trainable=True) on a fresh base model."
        )


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """The LoRA layers of one adapter by their module name in the base model, in module order.

    Raises:
        ValueError: if there is none.
        TypeError: if a layer is of a type that cannot be gated.
    """
    config = model.peft_config[adapter]
    if not isinstance(config, LoraConfig):
        raise TypeError(f"Adapter {adapter!r} is a {type(config).__name__}: only LoRA (LoraConfig) can be gated.")
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r} trains biases of the base model, which no gate can close. Set bias='none'."
        )
    if config.trainable_token_indices:
        raise ValueError(
            "trainable_token_indices trains embeddings of the base model, which no gate can close. Leave it out, or "
            "name the embedding in modules_to_save, as one does with a head."
        )
    if config.layer_replication:
        raise ValueError(
            "layer_replication makes layers that share their base weights, so that closed blocks would not be the base "
            "model and merging one copy would change the other. Leave it out, or replicate the layers before LoRA."
        )
    if config.init_lora_weights not in PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights (or, as 'mica', trains another "
            f"way), so that a closed block would not be the base model. Use one of {PLAIN_INITS}."
        )
    found = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in _adapter_names(module)
    }
    if not found:
        raise ValueError(f"Adapter {adapter!r} has no LoRA layer. {describe_linear_layers(model)} {PRESET}")
    named = [name for name in found if name in (config.target_modules or ())]
    if config.layers_to_transform is not None and named and not isinstance(config.target_modules, str):
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform} has no effect on target_modules that name a module in "
            f"full, as {named[0]!r} does. Leave it out, and keep the names of the other layers out of target_modules."
        )
    for name, layer in found.items():
        kind = f"{type(layer).__module__}.{type(layer).__name__}".removeprefix("peft.tuners.lora.")
        if kind not in GATEABLE:
            raise TypeError(
                f"{name}: a LoRA layer of type {type(layer).__name__} cannot be gated, only Linear and Conv layers "
                "and those of bitsandbytes (8 and 4 bit) can: PEFT's others do not ask for a gate wherever they "
                "compute and merge, or are untested. Leave it out of target_modules (and out of target_parameters); "
                "load a base model that is quantised another way in full precision or with BitsAndBytesConfig."
            )
        parent = model.get_submodule((PREFIX + name).rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{name}: nn.MultiheadAttention reads this layer's weight without calling it, so that LoRA has no "
                "effect there. Leave it out of target_modules, which target_modules=lora_targets(model) does."
            )
        if adapter in layer.lora_variant:
            raise ValueError(
                f"{name}: the LoRA variant slot of adapter {adapter!r} is already taken by "
                f"{type(layer.lora_variant[adapter]).__name__}, so it cannot be gated. Use plain LoRA: switch off "
                "use_dora and other variants."
            )
        if not layer.lora_A[adapter].weight.requires_grad:
            raise ValueError(
                f"{name}: the LoRA weights of adapter {adapter!r} do not train. Make it the active adapter "
                "(set_adapter), and load a saved one with is_trainable=True."
            )
        if layer.lora_bias[adapter]:
            raise ValueError(f"{name}: lora_bias=True cannot be gated. Set lora_bias=False in the LoraConfig.")
    return found


def _adapter_names(layer: LoraLayer) -> set[str]:
    return set(layer.lora_A) | set(layer.lora_embedding_A)


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Check that every entry of `target_modules` matches at least one module of `model`.

    Raises:
        ValueError: naming the entries that match nothing, what they may be called here, and what there is.
    """
    missing = missing_targets(model, getattr(config, "target_modules", None))
    if missing:
        raise ValueError(explain_missing(model, missing))


def missing_targets(model: nn.Module, targets: list[str] | str | None) -> list[str]:
    """The entries of `target_modules` that name no module of the model."""
    if targets is None or targets in ("all-linear", ["all-linear"]):
        return []
    # On an adapted model, modules keep their names within PEFT's wrapper.
    names = [name.removeprefix(PREFIX).replace(".base_layer", "") for name, _ in model.named_modules()]
    if isinstance(targets, str):
        return [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    return sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))


def explain_missing(model: nn.Module, missing: list[str]) -> str:
    """Why targets match nothing: what they may be called here, and which linear layers there are."""
    leaves = {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    hints = [
        f"{target!r} is called {RENAMED[target]} since transformers 5"
        for target in missing
        if target in RENAMED and any(new in leaves for new in RENAMED[target].replace(" and ", ", ").split(", "))
    ]
    hint = f" ({'; '.join(hints)})" if hints else ""
    return (
        f"target_modules: {', '.join(map(repr, missing))} matches no module of {type(model).__name__}{hint}. "
        f"{describe_linear_layers(model)} {PRESET}"
    )


def describe_linear_layers(model: nn.Module) -> str:
    """One sentence that lists the linear layers by the last part of their name, with their number."""
    leaves = Counter(
        name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    )
    if not leaves:
        return "The model has no linear layer."
    listed = ", ".join(f"{leaf} (x{count})" for leaf, count in sorted(leaves.items()))
    return f"Its linear layers are: {listed}. Name in target_modules those to adapt."


def layer_of(model: PeftModel, name: str) -> str:
    """Name of the transformer layer that holds the module: the innermost entry of an `nn.ModuleList`, or itself."""
    parts = (PREFIX + name).split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end].isdigit() and isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1]).removeprefix(PREFIX)
    return name


def install(layer: LoraLayer, adapter: str, gate: Gate | None) -> None:
    """Gate one adapter of a LoRA layer; None closes it for good."""
    layer.lora_variant[adapter] = GatedLora(gate)


def uninstall(layer: LoraLayer, adapter: str) -> None:
    """Make the adapter of a LoRA layer a stock one again."""
    layer.lora_variant.pop(adapter, None)


def remove_adapter(layer: LoraLayer, adapter: str) -> list[nn.Parameter]:
    """Take one adapter out of a LoRA layer, which then computes its base layer; returns the removed parameters.

    Not `layer.delete_adapter`: that would activate another adapter on this layer. The adapter stays the active one
    here, and PEFT's layers skip adapters that they do not have, also after `disable_adapter()` or a switch.
    """
    removed = lora_parameters(layer, adapter)
    for attribute in layer.adapter_layer_names + layer.other_param_names:
        per_adapter = getattr(layer, attribute)
        if adapter in per_adapter:
            del per_adapter[adapter]
    uninstall(layer, adapter)
    return removed


def lora_parameters(layer: LoraLayer, adapter: str) -> list[nn.Parameter]:
    """The parameters of one adapter of a LoRA layer."""
    return [*layer.lora_A[adapter].parameters(), *layer.lora_B[adapter].parameters()]


def reset(layer: LoraLayer, adapter: str) -> None:
    """Make one adapter of a LoRA layer add nothing, as LoRA starts: B = 0. Collective if it is partitioned."""
    parameters = list(layer.lora_B[adapter].parameters())
    engines.write(parameters, [torch.zeros(engines.whole_shape(p)) for p in parameters])


@torch.no_grad()
def update_norm(layer: LoraLayer, adapter: str) -> float:
    """Squared Frobenius norm of (alpha / r) B A, through the r x r Gram matrices."""
    a, b = (p.flatten(1).double() for p in engines.read(lora_parameters(layer, adapter)))
    return (layer.scaling[adapter] ** 2 * ((b.T @ b) * (a @ a.T)).sum()).item()


def multiplications(layer: LoraLayer, adapter: str) -> tuple[int, int]:
    """Multiplications per token of the adapter and of the base layer."""
    own = sum(engines.whole_shape(p).numel() for p in lora_parameters(layer, adapter))
    if isinstance(layer.get_base_layer(), CONVS):
        return own, engines.whole_shape(layer.get_base_layer().weight).numel()
    return own, layer.in_features * layer.out_features  # weights of 4 bit are packed


def is_merged(layer: LoraLayer) -> bool:
    """Whether an adapter is merged into the layer's base weight."""
    return layer.merged


def fingerprint(layers: dict[str, LoraLayer]) -> str:
    """Hash of the shapes and first values of the layers' base weights: tells one base model from another."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        (weight,) = engines.read([layer.get_base_layer().weight])
        first = weight.flatten()[:64]
        head = [] if first.is_meta else first.float().cpu().tolist()
        digest.update(repr((name, tuple(weight.shape), [f"{value:.5g}" for value in head])).encode())
    return digest.hexdigest()[:16]


def is_adapter_key(key: str) -> bool:
    """Whether a key of the model's state dict belongs to an adapter, heads included."""
    return ".lora_" in key or ".modules_to_save." in key


def module_of_key(key: str) -> str | None:
    """Module in the base model that a key of an adapter's file adapts; None for what is not LoRA, as heads."""
    module, lora, _ = key.partition(".lora_")
    return module.removeprefix(PREFIX) if lora else None


def b_key(name: str, adapter: str) -> str:
    """Key of a LoRA layer's B in the model's state dict."""
    return f"{PREFIX}{name}.lora_B.{adapter}.weight"


def narrow_targets(model: PeftModel, adapter: str, names: list[str]) -> None:
    """Make the adapter's config target exactly the modules in `names`."""
    # A copy: PEFT keeps the user's own config, which may serve for another model too.
    config = model.peft_config[adapter] = copy.deepcopy(model.peft_config[adapter])
    every = [
        name.removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, (LoraLayer, nn.Linear, *CONVS)) and ".base_layer" not in name
    ]
    for field, value in exact_targets(names, every, vars(config)).items():
        setattr(config, field, value)


def exact_targets(names: list[str], every: list[str], config: dict) -> dict:
    """The fields of an adapter's config that make it target exactly the modules in `names` among `every`."""
    # PEFT matches targets as suffixes: what a full name would catch besides itself must be excluded, by a pattern
    # (which it matches in full), because names in a list would again be suffixes.
    caught = {other for other in every for name in names if other.endswith(f".{name}")} - set(names)
    fields: dict = {
        "target_modules": list(names),
        "exclude_modules": "|".join(re.escape(name) for name in sorted(caught)) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    for field in ("rank_pattern", "alpha_pattern"):  # PEFT warns of patterns that match nothing
        patterns = config.get(field) or {}
        fields[field] = {k: v for k, v in patterns.items() if any(get_pattern_key([k], name) == k for name in names)}
    return fields


def scaling(config: dict, name: str, rank: int) -> float:
    """What the product B A of a module is multiplied by, from the contents of `adapter_config.json`."""
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def unwrap_empty_layers(model: PeftModel) -> None:
    """Replace LoRA layers that no longer hold an adapter by their base layers."""
    empty = [n for n, m in model.named_modules() if isinstance(m, LoraLayer) and not _adapter_names(m)]
    for name in empty:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(name).get_base_layer())
