"""Zero-shot classification with a CLIP model: each image over the texts of all class prompts."""

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


def top1_accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose nearest class, by cosine, is their label.

    Args:
        images, classes: normalised features of shape (n, d) and (classes, d).
        labels: class indices of shape (n,).
    """
    return ((images @ classes.T).argmax(dim=-1) == labels).float().mean().item()
