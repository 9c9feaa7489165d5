"""The gated low-rank product that a block adds to its base layer. Pure torch, no PEFT."""

import torch
from torch import Tensor

from .kinds import binarize


class AddGated(torch.autograd.Function):
    """`result + g * scaling * x @ a.T @ b.T`, written over `result`, in one node of the graph.

    As separate operations the gate would cost a small layer more than LoRA itself. Gate and scaling go onto the rank-r
    intermediate, which is far smaller than the output; the product with `b` is added in place.

    Args:
        gate: the gate's value, shape (1,); with `tau` the score of a straight-through gate, which it opens at tau.
    """

    @staticmethod
    def forward(ctx, result: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor, tau: float | None, scaling: float):
        hidden = x.reshape(-1, x.shape[-1]) @ a.t()
        factor = ((gate if tau is None else gate >= tau) * scaling).to(hidden.dtype)
        ctx.save_for_backward(x, a, b, gate, hidden, factor)
        ctx.tau, ctx.scaling = tau, scaling
        ctx.mark_dirty(result)
        result.view(-1, result.shape[-1]).addmm_(hidden * factor, b.t())
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, a, b, gate, hidden, factor = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # for double backward, which needs the graph of these two
            value = gate if ctx.tau is None else binarize(gate, ctx.tau)
            hidden, factor = rows @ a.t(), (value * ctx.scaling).to(hidden.dtype)
        _, x_needed, a_needed, b_needed, gate_needed, *_ = ctx.needs_input_grad
        to_result = gradient.reshape(-1, gradient.shape[-1])
        to_product = to_result @ b  # before gate and scaling
        to_hidden = to_product * factor
        to_x = (to_hidden @ a).view(x.shape) if x_needed else None
        to_a = to_hidden.t() @ rows if a_needed else None
        # With the rank in rows, as gradients of A and B: the faster way round on CPUs, by a quarter and more.
        to_b = ((hidden * factor).t() @ to_result).t() if b_needed else None
        to_gate = (to_product * hidden).sum(dtype=torch.float32).mul(ctx.scaling).view(1) if gate_needed else None
        return gradient, to_x, to_a, to_b, to_gate, None, None
