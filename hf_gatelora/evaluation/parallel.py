"""Passing images through a model: the rows spread over processes, and the results gathered."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm


@torch.no_grad()
def map_images(
    compute: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: Dataset,
    batch_size: int,
    description: str,
    num_workers: int = 0,
) -> Tensor:
    """Apply `compute` to the pixels of all images: fp32 on the CPU, in the order of the images. Collective.

    Each process computes a part of the images, in as many batches as every other process (engines that shard a model
    need that), and gets the results of all. Progress is shown; images are not kept.

    Args:
        compute: makes one row per image from pixels of shape (batch, 3, H, W) on the model's device.
        model: it is in evaluation mode meanwhile.
        images: rows with `pixel_values` of shape (3, H, W).

    Raises:
        ValueError: if there are no images.
    """
    state, count = PartialState(), len(images)  # type: ignore[arg-type]
    if not count:
        raise ValueError(f"{description}: there are no images.")
    # The last row is repeated until all parts have the same length.
    rows = [
        min(row, count - 1)
        for row in range(
            state.process_index, -(-count // state.num_processes) * state.num_processes, state.num_processes
        )
    ]
    loader = DataLoader(
        Subset(images, rows),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=lambda items: torch.stack([item["pixel_values"] for item in items]),
    )
    device = next(model.parameters()).device
    with evaluating(model):
        own = torch.cat(
            [
                compute(pixels.to(device)).float().cpu()
                for pixels in tqdm(
                    loader, desc=description, leave=False, disable=None if state.is_main_process else True
                )
            ]
        )
    return torch.stack(gather_object([own]), dim=1).flatten(0, 1)[:count]


@contextmanager
def evaluating(model: nn.Module):
    """Within this context the model and all its parts are in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
