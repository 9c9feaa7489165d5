"""Features of vision backbones: the input of k-NN, and input and output of a classification head."""

import re
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from .parallel import map_images


class BackboneFeatures(NamedTuple):
    """What one forward pass gives for n images, fp32 on the CPU."""

    pooled: Tensor  # (n, d): the backbone's pooled output, else the head's input, else the first token
    head_input: Tensor  # (n, h): the input of the classification head; `pooled` if there is no head
    logits: Tensor  # (n, classes): its output; (n, 0) if there is no head


def split_classifier(model: nn.Module) -> tuple[nn.Module, str | None, nn.Module | None]:
    """An image classifier's backbone, and the name and module of its head (None for a bare backbone).

    Args:
        model: a transformers model, or a `PeftModel` on one.

    Raises:
        ValueError: if it is not clear which part is the backbone or the head.
    """
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone, classifies = whole.base_model, type(whole).__name__.endswith("ForImageClassification")
    if backbone is whole and classifies:  # as in SigLIP and CLIP
        backbone = getattr(whole, "vision_model", whole)
    if backbone is whole and not classifies:
        return whole, None, None
    beside = {
        name: module
        for name, module in whole.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    }
    if backbone is whole or len(beside) != 1:
        raise ValueError(
            f"{type(whole).__name__} cannot be split into one backbone and one classification head (its parts: "
            f"{', '.join(name for name, _ in whole.named_children())}). Use an AutoModelForImageClassification that "
            "has one head beside its backbone, such as Dinov2, ViT, SigLIP or CLIP."
        )
    name, head = next(iter(beside.items()))
    return backbone, name, head


def head_names(id2label: dict | None) -> list[str] | None:
    """Names of the classes in the order of a head's outputs; None for placeholders.

    Args:
        id2label: of the model's config; its keys may be strings.
    """
    names = [name for _, name in sorted((id2label or {}).items(), key=lambda item: int(item[0]))]
    # LABEL_0 and so on are the placeholders of transformers.
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def backbone_features(
    model: nn.Module, images: Dataset, batch_size: int = 64, description: str = "images", num_workers: int = 0
) -> BackboneFeatures:
    """Features of a vision backbone, with or without a classification head.

    Collective: each process computes a part of the images, and all get all features. Images are not kept.

    Args:
        model: a transformers vision backbone or image classifier, or a `PeftModel` on one; its mode is left as it was.
        images: rows with `pixel_values` of shape (3, H, W).
        num_workers: processes that load images, 0 by default: none.

    Raises:
        ValueError: as `split_classifier`.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone, _, head = split_classifier(model)
    caught: dict[str, Any] = {}
    widths: list[int] = []
    hooks = [backbone.register_forward_hook(lambda module, args, output: caught.update(backbone=output))]
    if head is not None:
        hooks.append(head.register_forward_pre_hook(lambda module, args: caught.update(head_input=args[0])))

    def compute(pixels: Tensor) -> Tensor:
        output = whole(pixel_values=pixels)
        pooled = getattr(caught["backbone"], "pooler_output", None)
        if pooled is None:
            pooled = caught["head_input"] if head is not None else output.last_hidden_state[:, 0]
        logits = pooled.new_zeros(len(pixels), 0) if head is None else output.logits
        parts = [tensor.flatten(1) for tensor in (pooled, caught.get("head_input", pooled), logits)]
        widths[:] = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    try:
        joined = map_images(compute, model, images, batch_size, description, num_workers)
    finally:
        for hook in hooks:
            hook.remove()
    return BackboneFeatures(*joined.split(widths, dim=1))
