"""Compilation of a model's kernels before they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .classifier import Classifier


def warmup(model: nn.Module, *inputs: Any, **named: Any) -> None:
    """Run a model once to compile its Triton kernels before the first real step, and leave the model unchanged.

    In eval mode this runs a forward without gradients. In training mode it also runs a forward with a backward. Call it under the
    same autocast as training, and before a CUDA graph is captured, because compilation is not allowed during capture.

    Kernels depend on dtypes, head dimension, kinds of masks and, in 16 bits, on whether the number of queries divided by 64 rounds
    up to an odd or an even number. Texts of arbitrary length therefore need two calls, with 64 and with 128 tokens. More than 511
    tokens, more than 127 samples, and a batch with no more samples than experts each use separate kernels.

    Parameters, their gradients, buffers, modes, and the state of torch's random number generators are restored. Module and tensor
    hooks run; post-accumulate-grad hooks of parameters don't. For a DistributedDataParallel only the wrapped module runs. Warm up
    before parameters are sharded.

    Args:
        model: a module with prompts of this library, either itself or in a part of it.
        inputs, named: positional and keyword arguments for the model's forward.

    Raises:
        Whatever the model's forward or backward raises; torch's RuntimeError for a part that is checkpointed with
        use_reentrant=True.

    Examples:
        >>> warmup(model.train(), images, text, labels=labels)
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    with _left_as_it_was(model):
        if model.training:
            with torch.enable_grad():
                output = model(*inputs, **named)
                # square() gives gradients the same memory layout as in a real step; a plain sum's would have strides of zero
                results = [output.loss] if getattr(output, "loss", None) is not None else tree_leaves(output)
                results += [part._auxiliary for part in _classifiers(model)]
                taken = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
                leaves = (*model.parameters(), *tree_leaves((inputs, named)))
                wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
                if taken and wanted:
                    torch.autograd.grad([result.square().sum() for result in taken], wanted, allow_unused=True)
                for part in _classifiers(model):
                    part._auxiliary = None
        for module in model.modules():  # not eval(), because a layer may merge weights in it
            module.training = False
        with torch.no_grad():
            model(*inputs, **named)


def _classifiers(model: nn.Module) -> list[Classifier]:
    return [part for part in model.modules() if isinstance(part, Classifier)]


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    names = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    # an inference tensor has no version counter and can't be written to here
    kept = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_inference()]
    auxiliary = [(part, part._auxiliary) for part in _classifiers(model)]
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        try:
            for part, _ in auxiliary:
                part._auxiliary = None
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for part, loss in auxiliary:
                part._auxiliary = loss
            for holder, own in names:
                holder.clear()
                holder.update(own)
            for buffer, version, value in kept:
                if buffer._version != version and buffer.shape == value.shape:
                    with torch.no_grad():
                        buffer.copy_(value)  # in place, because a CUDA graph may refer to its memory
                elif buffer._version != version:
                    buffer.data = value
