"""Zero-shot classification with a CLIP model: each image over the texts of all class prompts."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from .parallel import evaluating, map_images


def image_features(
    model, images: Dataset, batch_size: int = 64, description: str = "images", num_workers: int = 0
) -> Tensor:
    """L2-normalised image features, fp32 on the CPU, shape (n, d). Collective: each process computes a part.

    Args:
        model: a `CLIPModel` or a `PeftModel` on one; its mode is left as it was.
        images: rows with `pixel_values` of shape (3, H, W).
        num_workers: processes that load images, 0 by default: none.
    """

    def embed(pixels: Tensor) -> Tensor:
        return normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1)

    return map_images(embed, model, images, batch_size, description, num_workers)


@torch.no_grad()
def text_features(model, tokens: Mapping[str, Tensor], batch_size: int = 256) -> Tensor:
    """L2-normalised text features, fp32 on the CPU, shape (n, d).

    Args:
        tokens: `input_ids` and `attention_mask` of shape (n, length).
    """
    device, features = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(tokens["input_ids"]), batch_size):
            batch = {k: v[start : start + batch_size].to(device) for k, v in tokens.items()}
            features.append(normalize(model.get_text_features(**batch).pooler_output.float(), dim=-1).cpu())
    return torch.cat(features)


def ensemble_text_features(
    model,
    tokenize: Callable[[list[str]], Mapping[str, Tensor]],
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> Tensor:
    """Zero-shot classifier from an ensemble of prompts, as in CLIP (arXiv 2103.00020, section 3.1.4).

    Each class gets the mean over the templates of its L2-normalised text features, L2-normalised again.

    Args:
        model: a `CLIPModel` or a `PeftModel` on one; its mode is left as it was.
        tokenize: makes `input_ids` and `attention_mask` from a list of texts.
        class_names: the strings that replace `{}`.
        templates: strings with a `{}`, for instance `prompt_templates("openai")`.
        batch_size: texts in one forward, 256 by default.

    Returns:
        Features of shape (classes, d), fp32 on the CPU.

    Raises:
        ValueError: if there is no class, no template, or a template has no `{}`.
    """
    if not class_names or not templates:
        raise ValueError(f"{len(class_names)} class names and {len(templates)} templates: give at least one of each.")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class name.")
    features = []
    step = max(1, batch_size // len(templates))  # whole classes, so that no more than a batch is held
    for start in range(0, len(class_names), step):
        names = class_names[start : start + step]
        tokens = tokenize([template.format(name) for name in names for template in templates])
        embedded = text_features(model, tokens, batch_size).unflatten(0, (len(names), len(templates)))
        features.append(normalize(embedded.mean(dim=1), dim=-1))
    return torch.cat(features)
