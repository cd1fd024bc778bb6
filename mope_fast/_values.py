"""Whether the numbers of a tensor can be asked for."""

import torch
from torch import Tensor


def can_be_looked_at(tensor: Tensor) -> bool:
    """Whether its numbers are at hand without a wait: in the host's memory, outside of a compiler and of functorch's transforms."""
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and torch._C._functorch.peek_interpreter_stack() is None
