"""Check whether the values of a tensor can be read."""

import torch
from torch import Tensor


def can_be_looked_at(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read without waiting: on the CPU, outside of a compiler and functorch transforms."""
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and torch._C._functorch.peek_interpreter_stack() is None
