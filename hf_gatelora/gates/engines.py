"""The engines that train a model, one class each: how they hold parameters, and what they need and refuse.

DDP leaves parameters as they are. DeepSpeed ZeRO-1 and 2 update a partitioned copy in the optimizer; ZeRO-3 and FSDP2
hold only a part of each parameter on each process. Which engine holds a parameter is asked in `engine_of`, which one a
run is launched with in `engine_for`.
"""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


class Engine:
    """One process, and DDP: every process holds the whole model.

    Attributes:
        title: what checkpoints of this engine are called in messages.
        partitioned: whether each process holds only a part of a parameter.
        manages: whether the engine keeps copies or shards of parameters: the model cannot be folded in place then, and
            the engine loads the weights of a checkpoint itself.
        loads_in: the method of Trainer by whose call they are loaded.
        takes_groups: whether an optimizer that was prepared takes another group.
    """

    title = "plain or DDP"
    partitioned = False
    manages = False
    loads_in = "_load_from_checkpoint"
    takes_groups = True

    # ---- parameters ---------------------------------------------------------------------------------------------

    def holds(self, parameter: Tensor) -> bool:
        """Whether the engine manages the parameter."""
        return True

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        """Shape of the whole parameter."""
        return parameter.shape

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager:
        """Within this context `whole` sees the whole parameters. Collective if they are partitioned."""
        return nullcontext()

    def whole(self, parameter: Tensor) -> Tensor:
        """The whole parameter, detached. Collective if it is partitioned."""
        return parameter.detach()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite the whole parameter, in the model and in the optimizer's copy. Collective if it is partitioned."""
        parameter.copy_(value)

    def scores(self, gates: Sequence[Any]) -> Tensor:
        """The scores of all gates, shape (N,), with gradient to them. Collective if they are partitioned."""
        return torch.cat([gate.score for gate in gates])

    def updates(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
        """Whether a torch optimizer updates any of the parameters."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in held for p in parameters)

    def groups(self, optimizer) -> list[list[nn.Parameter]]:
        """The parameters of an optimizer's groups, as the model holds them."""
        return [group["params"] for group in optimizer.param_groups]

    # ---- runs ---------------------------------------------------------------------------------------------------

    def wrote(self, checkpoint: Path) -> bool:
        """Whether the optimizer state in a Trainer's checkpoint is this engine's."""
        return True

    def check(self, accelerator: Accelerator) -> None:
        """Check the settings that the run was launched with.

        Raises:
            ValueError: if gated LoRA would be lost or could not be trained under them.
        """

    def preparing(self, model: nn.Module) -> AbstractContextManager:
        """Within this context `accelerator.prepare` can take the model over."""
        return nullcontext()


class Zero(Engine):
    """DeepSpeed ZeRO-1 and 2: the optimizer updates flat copies, of which each process holds a part."""

    title = "DeepSpeed"
    manages = True
    loads_in = "_load_optimizer_and_scheduler"
    takes_groups = False

    def holds(self, parameter):
        return hasattr(parameter, "_hp_mapping")

    def write(self, parameter, value):
        from deepspeed.utils import safe_set_full_fp32_param

        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value.float())

    def updates(self, optimizer, parameters):
        held = {p.untyped_storage().data_ptr() for group in optimizer.param_groups for p in group["params"]}
        fragments = [getattr(p._hp_mapping, "hp_fragment", None) for p in parameters]  # None: another process's part
        return any(f is not None and f.untyped_storage().data_ptr() in held for f in fragments)

    def groups(self, optimizer):
        return optimizer.bit16_groups

    def wrote(self, checkpoint):
        return any(checkpoint.glob("global_step*"))

    def preparing(self, model):
        return scalars_as_vectors(model)


class Zero3(Zero):
    """DeepSpeed ZeRO-3: each process holds a part of every parameter."""

    partitioned = True

    def holds(self, parameter):
        return hasattr(parameter, "ds_id")

    def whole_shape(self, parameter):
        return parameter.ds_shape

    def gathered(self, parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)

    def whole(self, parameter):
        return parameter.detach().clone()

    def write(self, parameter, value):
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        if hasattr(parameter, "_z3_optimizer"):  # from_pretrained partitions before there is an optimizer
            # In DeepSpeed 0.19 the function that takes the whole value fails on partitions with padding.
            safe_set_local_fp32_param(parameter, parameter.ds_tensor.float())

    def scores(self, gates):
        # Read outside its module's forward, a partitioned parameter gets no gradient.
        if torch.is_grad_enabled():
            return torch.cat([gate(raw=True) for gate in gates])
        return torch.cat(read([gate.score for gate in gates]))

    def updates(self, optimizer, parameters):
        return any(getattr(getattr(p, "_z3_optimizer", None), "optimizer", None) is optimizer for p in parameters)

    def groups(self, optimizer):
        return optimizer.fp16_groups


class Fsdp2(Engine):
    """PyTorch FSDP2: each process holds a shard of every parameter, as a DTensor."""

    title = "FSDP"
    partitioned = True
    manages = True

    def holds(self, parameter):
        return hasattr(parameter, "device_mesh")

    def whole(self, parameter):
        return parameter.detach().full_tensor()

    def write(self, parameter, value):
        from torch.distributed.tensor import distribute_tensor

        parameter.copy_(distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements))

    def scores(self, gates):
        # One reduction instead of a gather for each: every process sees all values, and the gradient goes to the
        # process that holds the element.
        shards = [gate.score.to_local() for gate in gates]
        held = torch.tensor([bool(s.numel()) for s in shards], device=shards[0].device)
        mine = torch.cat([s if s.numel() else s.new_zeros(1) for s in shards])
        values = torch.where(held, mine.detach(), -torch.inf)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values + (mine - mine.detach())

    def wrote(self, checkpoint):
        return any(checkpoint.glob("*_fsdp*"))

    def check(self, accelerator):
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError("FSDP 1 cannot shard gated LoRA. Set fsdp_version: 2 in the accelerate config.")
        if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise ValueError(
                f"fsdp_state_dict_type is {plugin.state_dict_type}, under which Trainer writes no adapter. Set it "
                "to FULL_STATE_DICT in the accelerate config."
            )

    @contextmanager
    def preparing(self, model):
        with scalars_as_vectors(model), without_embedding_units(model):
            yield


PLAIN = Engine()
# The engines that manage parameters, most special first, and those that a run can be launched with.
MANAGING: list[Engine] = [Zero3(), Zero(), Fsdp2()]
LAUNCHED = {DistributedType.DEEPSPEED: Zero(), DistributedType.FSDP: Fsdp2()}


def engine_of(parameter: Tensor) -> Engine:
    """The engine that holds a parameter."""
    return next((engine for engine in MANAGING if engine.holds(parameter)), PLAIN)


def engine_for(accelerator: Accelerator) -> Engine:
    """The engine that an accelerator trains with."""
    return LAUNCHED.get(accelerator.distributed_type, PLAIN)


def writer_of(checkpoint: Path) -> Engine:
    """The engine whose optimizer state a Trainer's checkpoint holds."""
    return next((engine for engine in LAUNCHED.values() if engine.wrote(checkpoint)), PLAIN)


@torch.no_grad()
def read(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The whole parameters, detached. Collective if they are partitioned."""
    engines = [engine_of(parameter) for parameter in parameters]
    partitioned = [p for p, engine in zip(parameters, engines, strict=True) if engine.partitioned]
    with engine_of(partitioned[0]).gathered(partitioned) if partitioned else nullcontext():
        return [engine.whole(p) for p, engine in zip(parameters, engines, strict=True)]


@torch.no_grad()
def write(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Overwrite whole parameters, in the model and in the optimizer's copy. Collective if they are partitioned."""
    for parameter, value in zip(parameters, values, strict=True):
        engine_of(parameter).write(parameter, value.to(parameter.device))


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter."""
    return engine_of(parameter).whole_shape(parameter)


def check_launch(world_size: int, accelerator: Accelerator) -> None:
    """Check at the start that the processes train together, under settings that gated LoRA can be trained with.

    Raises:
        ValueError: if they would train apart, or the engine refuses its settings.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and world_size != launched:
        raise ValueError(
            f"Launched with {launched} processes, but each would train alone (world size {world_size}). "
            "On the CPU also pass --use_cpu (use_cpu=True in the training arguments)."
        )
    engine = engine_for(accelerator)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not isinstance(engine, Fsdp2):
        logger.warning(
            "Launched for FSDP, but accelerate applies it on accelerators only: without one this is plain data "
            "parallelism, and every process holds the whole model."
        )
    engine.check(accelerator)


def strict_ddp_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP module around `model` that demands the same gradients in each step, if there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for wrapper in gc.get_objects():
        if type(wrapper) is DistributedDataParallel and wrapper.module is model:
            return wrapper if wrapper.static_graph or not wrapper.find_unused_parameters else None
    return None


@contextmanager
def without_embedding_units(model: nn.Module) -> Iterator[None]:
    """Within this context the model names no embeddings, so that FSDP2 does not make units of them.

    Accelerate (seen in 1.15) fails to find the one embedding of a vision-language model, and wraps the patch embedding
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
def scalars_as_vectors(model: nn.Module) -> Iterator[None]:
    """Within this context frozen parameters without dimensions, such as CLIP's `logit_scale`, have one.

    When they take a model over, DeepSpeed (seen in 0.19) cannot broadcast parameters of dimension 0, and FSDP2 cannot
    shard them. A parameter that is partitioned then keeps the one dimension.
    """
    scalars = [p for p in model.parameters() if p.dim() == 0 and not p.requires_grad]
    for parameter in scalars:
        parameter.data = parameter.data.reshape(1)
    try:
        yield
    finally:
        for parameter in scalars:
            if not engine_of(parameter).partitioned or (parameter.numel() and not whole_shape(parameter)):
                parameter.data = parameter.data.reshape(())
