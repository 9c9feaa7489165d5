"""Features of vision backbones: what k-NN compares, what a classification head reads, and what it says."""

from typing import NamedTuple

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .parallel import join_rows, own_rows


class BackboneFeatures(NamedTuple):
    """What one forward pass gives for n images, fp32 on the CPU."""

    pooled: Tensor  # (n, d): the backbone's pooled output (the normalised CLS token of ViT and DINOv2)
    head_input: Tensor  # (n, h): what the classification head reads; `pooled` where there is no head
    logits: Tensor  # (n, classes): what it says; (n, 0) where there is no head


def classification_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of an image classifier's head: the part beside the backbone. None for a bare backbone.

    Args:
        model: a transformers model, or a `PeftModel` on one.

    Raises:
        ValueError: where several parts could be the head.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    if whole.base_model is whole:
        return None
    beside = {
        name: module
        for name, module in whole.named_children()
        if module is not whole.base_model and any(True for _ in module.parameters())
    }
    if len(beside) > 1:
        raise ValueError(
            f"{type(whole).__name__} has {len(beside)} parts beside its backbone ({', '.join(beside)}): which one is "
            "the classification head is not clear. Use an AutoModelForImageClassification with one head."
        )
    return next(iter(beside.items()), None)


@torch.no_grad()
def backbone_features(
    model: nn.Module, images: Dataset, batch_size: int = 64, description: str = "images"
) -> BackboneFeatures:
    """Features of a vision backbone, with or without a classification head.

    Collective: each process computes a part of the images, and every one gets all features. Images are not kept.

    Args:
        model: a transformers vision backbone or image classifier, or a `PeftModel` on one; its mode is left as it was.
        images: rows with `pixel_values` of shape (3, H, W).
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    head = classification_head(model)
    device, training, caught = next(model.parameters()).device, model.training, {}
    hooks = [whole.base_model.register_forward_hook(lambda module, args, output: caught.update(pooled=_pooled(output)))]
    if head is not None:
        hooks.append(head[1].register_forward_pre_hook(lambda module, args: caught.update(head_input=args[0])))
    loader = DataLoader(
        own_rows(images), batch_size=batch_size, collate_fn=lambda rows: torch.stack([r["pixel_values"] for r in rows])
    )
    model.eval()
    parts = []
    try:
        for pixels in tqdm(
            loader, desc=description, leave=False, disable=None if PartialState().is_main_process else True
        ):
            output = whole(pixel_values=pixels.to(device))
            pooled = caught["pooled"]
            read = caught.get("head_input", pooled)
            logits = output.logits if head is not None else pooled.new_zeros(len(pixels), 0)
            parts.append([tensor.float().flatten(1).cpu() for tensor in (pooled, read, logits)])
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if not parts:
        raise ValueError(f"{len(images)} images cannot be spread over {PartialState().num_processes} processes.")
    return BackboneFeatures(*(join_rows(torch.cat(column)) for column in zip(*parts, strict=True)))


def _pooled(output) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled
