"""Batches and losses of the recipes. Each loss is a mean over samples, for any accumulation and world size."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy


def collate_images(rows: list[dict]) -> dict[str, Tensor]:
    """Pixel values and labels of labelled images."""
    return {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels")}


def class_prompt_collator(classes: dict[str, Tensor]) -> Callable[[list[dict]], dict[str, Tensor]]:
    """Makes batches of labelled images beside the texts of all classes, for `class_prompt_loss`.

    Args:
        classes: `input_ids` and `attention_mask` of one text per class.
    """
    return lambda rows: {**collate_images(rows), **classes}


def pair_collator(tokenize: Callable[[list[str]], dict[str, Tensor]]) -> Callable[[list[dict]], dict[str, Tensor]]:
    """Makes batches of images and their captions, for `contrastive_loss`.

    Args:
        tokenize: from a list of strings to `input_ids` and `attention_mask`.
    """

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        labels = torch.arange(len(rows))  # each image belongs to the text in its place
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, **tokenize([row["captions"] for row in rows]), "labels": labels}

    return collate


def class_prompt_loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """Cross-entropy of each image over the texts of all classes, as a mean over images."""
    total = cross_entropy(outputs["logits_per_image"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def contrastive_loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """CLIP's loss over the images and texts of all processes, normalised as a mean over pairs."""
    images, texts, state = outputs["image_embeds"], outputs["text_embeds"], PartialState()
    # The scale between cosines and logits: its parameter is out of reach here where an engine partitions it.
    cosines = (images @ texts.T).detach()
    scale = (outputs["logits_per_image"].detach() * cosines).sum() / cosines.square().sum()
    all_images, all_texts = images, texts
    if state.num_processes > 1:
        all_images, all_texts = torch.cat(all_gather(images)), torch.cat(all_gather(texts))
    targets = labels + state.process_index * len(labels)
    total = cross_entropy(scale * images @ all_texts.T, targets, reduction="sum")
    total = total + cross_entropy(scale * texts @ all_images.T, targets, reduction="sum")
    return total / 2 / (len(labels) if num_items_in_batch is None else num_items_in_batch)
