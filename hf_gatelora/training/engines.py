"""What DeepSpeed and FSDP2 need in order to take a vision model with LoRA layers over."""

import logging
import os
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import Trainer

from ..gates.sharding import is_zero3, whole_shape

logger = logging.getLogger(__name__)


class EngineTrainer(Trainer):
    """`Trainer` that gets CLIP and DINOv2 through `accelerator.prepare` under DeepSpeed and FSDP2.

    Raises:
        ValueError: at the start, where the processes would train apart, and under FSDP settings that lose the adapter.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if "LOCAL_RANK" in os.environ and self.args.world_size != launched:
            raise ValueError(
                f"Launched with {launched} processes, but each would train alone (world size {self.args.world_size}). "
                "On the CPU also pass --use_cpu (use_cpu=True in the training arguments)."
            )
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            logger.warning(
                "Launched for FSDP, but accelerate applies it on accelerators only: without one this is plain data "
                "parallelism, and every process holds the whole model."
            )
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError("FSDP 1 cannot shard gated LoRA. Set fsdp_version: 2 in the accelerate config.")
            if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                raise ValueError(
                    f"fsdp_state_dict_type is {plugin.state_dict_type}, under which Trainer writes no adapter. Set it "
                    "to FULL_STATE_DICT in the accelerate config."
                )

    def _prepare_for_training(self, *args, **kwargs):
        with ExitStack() as stack:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                stack.enter_context(scalars_as_vectors(self.model))
            if self.is_fsdp_enabled:
                stack.enter_context(without_embedding_units(self.model))
            return super()._prepare_for_training(*args, **kwargs)


@contextmanager
def without_embedding_units(model: nn.Module):
    """Within this context the model names no embeddings, so that FSDP2 makes no units of their own of them.

    Accelerate (seen in 1.15) asks a vision-language model in vain for its one embedding, and wraps the patch embedding
    of a vision model a second time.
    """
    methods = ("get_input_embeddings", "get_output_embeddings")
    for method in methods:
        setattr(model, method, lambda: None)
    try:
        yield
    finally:
        for method in methods:
            delattr(model, method)


@contextmanager
def scalars_as_vectors(model: nn.Module):
    """Within this context frozen parameters without dimensions, as CLIP's `logit_scale`, have one.

    When they take a model over, DeepSpeed (seen in 0.19) cannot broadcast parameters of dimension 0, and FSDP2 cannot
    shard them. What is sharded only then keeps the one dimension.
    """
    scalars = [p for p in model.parameters() if p.dim() == 0 and not p.requires_grad]
    for parameter in scalars:
        parameter.data = parameter.data.reshape(1)
    try:
        yield
    finally:
        for parameter in scalars:
            if not is_zero3(parameter) or (parameter.numel() and not whole_shape(parameter)):
                parameter.data = parameter.data.reshape(())
