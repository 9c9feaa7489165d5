"""Image-text retrieval."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .knn import nearest


@torch.no_grad()
def recall_at(
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    ks: Sequence[int] = (1, 5, 10),
    groups: Sequence | Tensor | None = None,
) -> dict[str, float]:
    """Recall at k of image-to-text and text-to-image retrieval: how often a match is among the k nearest.

    An image and a text match if some pair has that image and that caption: pairs of the same group have the same image,
    and equal strings are the same caption. Every text is a query and a candidate, every image (not every
    pair) likewise, as on COCO and Flickr30k with five captions an image. With k or fewer candidates the recall is 1.

    Args:
        images, texts: normalised features of shape (n, d), row i of both from pair i. The first row of a group
            represents its image.
        captions: the n caption strings.
        ks: values of k, 1, 5 and 10 by default.
        groups: n ids of the images, equal for the pairs of one image; None: each pair has its own image.

    Returns:
        Fractions `image_to_text_recall@{k}` and `text_to_image_recall@{k}`.

    Raises:
        ValueError: if the lengths differ, or there is no k or one below 1.
    """
    groups = range(len(images)) if groups is None else groups.tolist() if isinstance(groups, Tensor) else groups
    counts = {"images": len(images), "texts": len(texts), "captions": len(captions), "groups": len(groups)}
    if len(set(counts.values())) > 1 or not len(images):
        raise ValueError(f"the pairs do not match: {counts}. Give one of each for every pair.")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks = {tuple(ks)}: give one or more numbers, each 1 or larger.")
    image, caption = _indices(groups), _indices(captions)
    row = torch.arange(len(image))
    first = row.new_full((int(image.max()) + 1,), len(image)).scatter_reduce(0, image, row, "amin")
    pairs = image * len(captions) + caption

    recalls = {}
    for direction in ("image_to_text", "text_to_image"):
        queries, bank = images[first.to(images.device)], texts
        if direction == "text_to_image":
            queries, bank = bank, queries
        rows = nearest(queries, bank, min(max(ks), len(bank)))[1].cpu()
        if direction == "image_to_text":
            found = torch.arange(len(first))[:, None] * len(captions) + caption[rows]
        else:
            found = rows * len(captions) + caption[:, None]
        matches = torch.isin(found, pairs)
        for k in ks:
            recalls[f"{direction}_recall@{k}"] = matches[:, :k].any(dim=-1).double().mean().item()
    return recalls


def _indices(values: Iterable) -> Tensor:
    """0 for the first value and all equal to it, 1 for the next one, and so on."""
    seen: dict = {}
    return torch.tensor([seen.setdefault(value, len(seen)) for value in values])
