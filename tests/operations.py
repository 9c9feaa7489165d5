"""Counts the operations that torch runs."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MATMULS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.convolution}


class Operations(TorchDispatchMode):
    """The operations run within it, those of a backward included, as (name, shape of the first result)."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        first = result[0] if isinstance(result, (tuple, list)) and len(result) else result
        self.seen[operation.overloadpacket, getattr(first, "shape", None)] += 1
        return result

    @property
    def matmuls(self) -> int:
        return sum(count for (operation, _), count in self.seen.items() if operation in MATMULS)
