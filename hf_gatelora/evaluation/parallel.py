"""Spreading the rows of a data set over processes, and bringing what they computed together again."""

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset, Subset


def own_rows(data: Dataset) -> Subset:
    """The rows that this process takes: every one by exactly one process."""
    state = PartialState()
    return Subset(data, range(state.process_index, len(data), state.num_processes))


def join_rows(own: Tensor) -> Tensor:
    """The results of all processes for their `own_rows`, in the order of the data set, on each of them. Collective."""
    parts = gather_object([own])
    joined = own.new_empty(sum(len(part) for part in parts), *own.shape[1:])
    for i, part in enumerate(parts):
        joined[i :: len(parts)] = part
    return joined
