"""Parameters whose storage an engine manages: telling which one does, reading them whole, writing every copy.

DDP leaves parameters as they are. DeepSpeed ZeRO-1 and 2 update a partitioned copy in the optimizer; ZeRO-3 and FSDP2
hold only a part of each parameter on each process.
"""

import gc

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO, of any stage, updates the parameter."""
    return hasattr(parameter, "_hp_mapping") or is_zero3(parameter)


def is_zero3(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions the parameter."""
    return hasattr(parameter, "ds_id")


def is_fsdp2(parameter: Tensor) -> bool:
    """Whether FSDP2 shards the parameter."""
    return hasattr(parameter, "device_mesh")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether this process holds only a part of the parameter."""
    return is_zero3(parameter) or is_fsdp2(parameter)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter."""
    return parameter.ds_shape if is_zero3(parameter) else parameter.shape


@torch.no_grad()
def read(parameters: list[Tensor]) -> list[Tensor]:
    """The whole parameters, detached. Collective where they are partitioned."""
    if any(is_zero3(p) for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in parameters if is_zero3(p)]):
            return [p.detach().clone() for p in parameters]
    return [p.detach().full_tensor() if is_fsdp2(p) else p.detach() for p in parameters]


@torch.no_grad()
def write(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Overwrite whole parameters, in the model and in the optimizer's copy. Collective where they are partitioned."""
    for parameter, value in zip(parameters, values, strict=True):
        value = value.to(parameter.device)
        if is_zero3(parameter):
            import deepspeed
            from deepspeed.utils import safe_set_local_fp32_param

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
            if hasattr(parameter, "_z3_optimizer"):  # from_pretrained partitions before there is an optimizer
                # In DeepSpeed 0.19 the function that takes the whole value fails on partitions with padding.
                safe_set_local_fp32_param(parameter, parameter.ds_tensor.float())
        elif is_fsdp2(parameter):
            from torch.distributed.tensor import distribute_tensor

            parameter.copy_(distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(value)
            if is_zero(parameter):
                from deepspeed.utils import safe_set_full_fp32_param

                safe_set_full_fp32_param(parameter, value.float())


def updates(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether a torch optimizer updates any of the parameters, itself or through the flat copies of ZeRO."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids = {id(p) for p in held}
    for parameter in parameters:
        if id(parameter) in ids or getattr(getattr(parameter, "_z3_optimizer", None), "optimizer", None) is optimizer:
            return True
        flat = getattr(getattr(parameter, "_hp_mapping", None), "hp_fragment", None)  # of this process's part
        if flat is not None and any(flat.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in held):
            return True
    return False


def stack_shards(parameters: list[nn.Parameter]) -> Tensor:
    """FSDP2's parameters of one element each as one whole tensor, with gradient to the shards. Collective.

    One reduction instead of a gather for each. Every process sees all values; the gradient goes to the one that holds
    the element.
    """
    shards = [p.to_local() for p in parameters]
    held = torch.tensor([bool(s.numel()) for s in shards], device=shards[0].device)
    mine = torch.cat([s if s.numel() else s.new_zeros(1) for s in shards])
    values = torch.where(held, mine.detach(), -torch.inf)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values + (mine - mine.detach())


def strict_ddp_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP module around `model` that demands a gradient for every parameter in each step, if there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for wrapper in gc.get_objects():
        if type(wrapper) is DistributedDataParallel and wrapper.module is model:
            return None if wrapper.find_unused_parameters else wrapper
    return None
