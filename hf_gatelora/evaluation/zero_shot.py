"""Zero-shot classification with a CLIP model: each image over the texts of all class prompts."""

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .parallel import join_rows, own_rows


@torch.no_grad()
def image_features(model, images: Dataset, batch_size: int = 64, description: str = "images") -> Tensor:
    """L2-normalised image features, fp32 on the CPU, shape (n, d). Collective: each process computes a part of them.

    Args:
        model: a `CLIPModel` or a `PeftModel` on one; its mode is left as it was.
        images: rows with `pixel_values` of shape (3, H, W).
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    loader = DataLoader(
        own_rows(images), batch_size=batch_size, collate_fn=lambda rows: torch.stack([r["pixel_values"] for r in rows])
    )
    features = [torch.zeros(0, model.config.projection_dim)]
    for pixels in tqdm(loader, desc=description, leave=False, disable=None if PartialState().is_main_process else True):
        embedded = model.get_image_features(pixels.to(device)).pooler_output
        features.append(torch.nn.functional.normalize(embedded.float(), dim=-1).cpu())
    model.train(training)
    return join_rows(torch.cat(features))


@torch.no_grad()
def text_features(model, tokens: dict[str, Tensor], batch_size: int = 256) -> Tensor:
    """L2-normalised text features, fp32 on the CPU, shape (n, d).

    Args:
        tokens: `input_ids` and `attention_mask` of shape (n, length).
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    features = []
    for start in range(0, len(tokens["input_ids"]), batch_size):
        batch = {k: v[start : start + batch_size].to(device) for k, v in tokens.items()}
        embedded = model.get_text_features(**batch).pooler_output
        features.append(torch.nn.functional.normalize(embedded.float(), dim=-1).cpu())
    model.train(training)
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
        ValueError: no class, no template, or a template without `{}`.
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
        features.append(torch.nn.functional.normalize(embedded.mean(dim=1), dim=-1))
    return torch.cat(features)
