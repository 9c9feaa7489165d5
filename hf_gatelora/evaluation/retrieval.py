"""Image-text retrieval."""

import torch
from torch import Tensor


def recall_at(images: Tensor, texts: Tensor, captions: list[str], k: int = 1) -> tuple[float, float]:
    """Recall at k of image-to-text and of text-to-image retrieval.

    Pairs whose captions are the same string count as matches of each other.

    Args:
        images, texts: normalised features of shape (n, d), row i of both from pair i.
        captions: the n caption strings.
    """
    index = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([index[caption] for caption in captions])
    similarity = images @ texts.T
    recalls = []
    for rows in (similarity, similarity.T):
        nearest = group[rows.topk(min(k, len(group)), dim=-1).indices]
        recalls.append((nearest == group[:, None]).any(dim=-1).float().mean().item())
    return recalls[0], recalls[1]
