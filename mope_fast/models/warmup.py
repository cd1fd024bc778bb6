"""Compile a model's kernels before they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .classifier import Classifier


def warmup(model: nn.Module, *inputs: Any, **named: Any) -> None:
    """Run a model once as it is used, so that its Triton kernels are compiled now and not in a first step; leave it as it was.

    In eval mode that is a forward without gradients; in training mode a forward and a backward too. Call it under the autocast that
    training has, and before a CUDA graph is captured, which allows no compilation.

    Kernels depend on dtypes, head dimension, kinds of masks and, in 16 bits, on whether the number of queries divided by 64 rounds
    up to an odd number or an even one. So texts of any length take two calls, with 64 and with 128 tokens. More than 511 tokens,
    more than 127 samples, and no more samples than experts have kernels of their own.

    Parameters, their gradients, buffers, modes, and the state of torch's random numbers are afterwards what they were. Hooks of
    modules and tensors run, those behind a parameter's accumulated gradient don't. Of a DistributedDataParallel its module
    runs. Warm up before parameters are sharded.

    Args:
        model: what has prompts of this library; it may be a part of the module.
        inputs, named: as of the model's forward.

    Raises:
        Whatever the model's forward or backward does; torch's RuntimeError for a part that is checkpointed with use_reentrant=True.

    Example:
        >>> warmup(model.train(), images, text, labels=labels)
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    with _left_as_it_was(model):
        if model.training:
            with torch.enable_grad():
                output = model(*inputs, **named)
                # gradients laid out as a step's: those of a mere sum would have strides of zero
                results = [output.loss] if getattr(output, "loss", None) is not None else tree_leaves(output)
                results += [part._auxiliary for part in _classifiers(model)]
                taken = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
                leaves = (*model.parameters(), *tree_leaves((inputs, named)))
                wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
                if taken and wanted:
                    torch.autograd.grad([result.square().sum() for result in taken], wanted, allow_unused=True)
                for part in _classifiers(model):
                    part._auxiliary = None
        for module in model.modules():  # not eval(), by which a layer may merge weights
            module.training = False
        with torch.no_grad():
            model(*inputs, **named)


def _classifiers(model: nn.Module) -> list[Classifier]:
    return [part for part in model.modules() if isinstance(part, Classifier)]


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    names = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    # an inference tensor has no version, and can't be written to here
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
                        buffer.copy_(value)  # in its own memory, which a CUDA graph may know
                elif buffer._version != version:
                    buffer.data = value
