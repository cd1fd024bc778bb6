"""What every op shares: the library namespace and the guards against gradients that would silently be wrong."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

library = torch.library.Library("mope_fast", "DEF")


_uncounted: dict[str, Callable[..., int]] = {}
"""Operations of ops that torch's counter hasn't been told yet: importing it would import Triton."""
_COUNTER = "torch.utils.flop_counter"


def _tell_the_counter() -> None:
    known = sys.modules[_COUNTER]
    # who counts now has a copy of what was known when it began
    counting = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    while _uncounted:
        name, flops = _uncounted.popitem()
        op = getattr(torch.ops.mope_fast, name)
        known.register_flop_formula(op)(functools.partial(lambda flops, *args, out_shape=None, **kwargs: flops(*args), flops))
        for counter in counting:
            if isinstance(counter, known.FlopCounterMode):
                counter.flop_registry[op] = known.flop_registry[op]


def _on_their_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensors' own."""

    @functools.wraps(launch)
    def call(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.index == torch.cuda.current_device():
            return _launched(launch, args)
        with torch.cuda.device(device):
            return _launched(launch, args)

    return call


def _launched(launch: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return launch(*args)
    except Exception as error:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a kernel could not be launched while a CUDA graph was captured ({type(error).__name__}): a first call compiles, "
                "which a capture does not allow; call mope_fast.warmup(model, *inputs) before, with inputs of the same shapes"
            ) from error
        raise


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    use: str,
) -> Any:
    """Register one op and return its overload.

    Args:
        schema: in torch's schema language, without the namespace.
        cpu, cuda: implementations.
        fake: shapes, strides and dtypes of the result.
        flops: operations of its matrix products, of the arguments with shapes for tensors, for torch's FlopCounterMode: a
            multiplication and an addition are two, and what a mask hides counts, as for torch's own.
        use: the differentiable function to call instead, for the error message.
    """
    name = library.define(schema)
    library.impl(name, cpu, "CPU")
    library.impl(name, _on_their_device(cuda), "CUDA")
    torch.library.register_fake(f"mope_fast::{name}", fake, lib=library)
    _uncounted[name] = flops
    overload = getattr(torch.ops.mope_fast, name).default

    def refuse_gradients(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            raise RuntimeError(
                f"torch.ops.mope_fast.{name} got an input that requires grad, and a raw op has no gradient: "
                f"call {use}, or detach its inputs"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    library.impl(name, refuse_gradients, "Autograd")
    return overload


class _OnceOnly(torch.autograd.Function):
    """Hands the first ``count`` tensors on; a derivative of them with respect to any of the tensors raises."""

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "a second derivative was asked for of an op whose backward is once_differentiable: impl='reference' has one"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A second derivative raises, whatever it is taken with respect to.

    torch's decorator of this name gives zero, or a part of it, for one with respect to what the op itself was given: it raises only
    where a gradient is taken of everything at once.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return results
        return _OnceOnly.apply(len(results), *results, *grads, *ctx.saved_tensors)

    return call


@functools.cache
def _context_form(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    own = {"forward": staticmethod(forward), "backward": staticmethod(function.backward), "__module__": function.__module__}
    return type(function.__name__, (torch.autograd.Function,), own)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call an autograd function that has ``setup_context``; where no transform needs that, by its cheaper form without.

    With it torch binds the arguments to forward's signature at every call, ten times the cost of the call. Without gradients its
    forward alone is called.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return function.apply(*args)
    if _uncounted and _COUNTER in sys.modules:
        _tell_the_counter()
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        with torch._C._AutoDispatchBelowAutograd():
            return function.forward(*args)
    return _context_form(function).apply(*args)
