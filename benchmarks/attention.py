"""Shared by the two groups of attention benchmarks: inputs as encoders make them, steps, the float64 truth, the check."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.baselines import attention as providers
from benchmarks.cases.attention import AttentionCase
from mope_fast import reference

REFERENCE_PAIRS = 2**24
"""Query-key pairs that the reference holds at a time: a few tensors of 128 MiB in float64."""


@dataclass(frozen=True)
class Inputs:
    """Arguments and a random upstream gradient; only arguments whose gradients the case measures require grad."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefixes: tuple[tuple[Tensor, Tensor], ...]
    upstream: Tensor

    @classmethod
    def random(cls, case: AttentionCase, device: torch.device, mode: str) -> "Inputs":
        """Draw inputs: q, k and v are views of one packed projection; prefixes and gradient have tokens before heads in memory."""

        def tokens(batch: int, length: int, heads: int) -> Tensor:
            return torch.randn(batch, length, heads, case.head_dim, device=device).to(case.dtype).transpose(1, 2)

        def leaf(tensor: Tensor, learned: bool = True) -> Tensor:
            return tensor.detach().requires_grad_(learned and mode != "forward")

        heads, of_keys = case.heads, case.heads_of_keys
        packed = tokens(case.batch, case.tokens, heads + 2 * of_keys)
        q, k, v = (leaf(part, not case.first_layer) for part in packed.split([heads, of_keys, of_keys], dim=1))
        batches = (1, case.batch)[: len(case.prefixes)]
        prefixes = tuple(
            (leaf(tokens(batch, length, of_keys)), leaf(tokens(batch, length, of_keys)))
            for batch, length in zip(batches, case.prefixes, strict=True)
        )
        return cls(q, k, v, prefixes, tokens(case.batch, case.tokens, heads))

    @property
    def arguments(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(tensor for pair in self.prefixes for tensor in pair)]


def forward(function: providers.Provider, inputs: Inputs) -> measure.Outputs:
    return (function(inputs.q, inputs.k, inputs.v, inputs.prefixes),)


def forward_backward(function: providers.Provider, inputs: Inputs) -> measure.Outputs:
    (out,) = forward(function, inputs)
    grads = torch.autograd.grad(out, [t for t in inputs.arguments if t.requires_grad], inputs.upstream)
    # detached, because graph checks write into outputs, and autograd forbids writing into a view returned by a custom function
    return out.detach(), *grads


STEPS = {"forward": forward, "forward+backward": forward_backward}


def build_step(provider: str, case: AttentionCase, device: torch.device, mode: str) -> suite.Step:
    function = providers.PROVIDERS[provider](case, device)
    return lambda inputs: STEPS[mode](function, inputs)


def _blocks(case: AttentionCase) -> Iterator[tuple[slice, slice]]:
    """Yield slices of samples and key heads, small enough for the reference's (S, P + S) matrices."""
    pairs = case.tokens * case.keys * (case.heads // case.heads_of_keys)
    heads = min(case.heads_of_keys, max(1, REFERENCE_PAIRS // pairs))
    samples = max(1, REFERENCE_PAIRS // (pairs * heads))
    for sample in range(0, case.batch, samples):
        for head in range(0, case.heads_of_keys, heads):
            yield slice(sample, sample + samples), slice(head, head + heads)


def _reference(case: AttentionCase, arguments: Sequence[Tensor], padding: Tensor | None) -> Tensor:
    q, k, v, *rest = arguments
    if case.field is not None:
        return reference.receptive_field_attention(q, k, v, case.field, key_padding_mask=padding)
    prefixes = list(zip(rest[::2], rest[1::2], strict=True))
    return reference.prompt_attention(q, k, v, prefixes, is_causal=case.causal, window=case.window, key_padding_mask=padding)


def expected(case: AttentionCase, mode: str, inputs: Inputs, dtype: torch.dtype) -> measure.Outputs:
    """Return the reference's outputs in ``dtype``, block by block; a prefix of batch 1 gets the sum of the samples' gradients."""
    needs = [t.requires_grad for t in inputs.arguments]
    arguments = [t.detach().to(dtype) for t in inputs.arguments]
    out = torch.empty_like(arguments[0])
    grads = [torch.zeros_like(t) for t in arguments]
    padding = case.padding(inputs.q.device)
    group = case.heads // case.heads_of_keys
    for samples, of_keys in _blocks(case):
        heads = slice(of_keys.start * group, of_keys.stop * group)
        # a tensor of batch 1 belongs to every block
        at = [(samples if t.shape[0] == case.batch else slice(None), heads if t is arguments[0] else of_keys) for t in arguments]
        leaves = [t[where].requires_grad_(need) for t, where, need in zip(arguments, at, needs, strict=True)]
        block = _reference(case, leaves, None if padding is None else padding[samples])
        out[samples, heads] = block.detach()
        if mode != "forward":
            asked = [(grad[where], leaf) for grad, where, leaf in zip(grads, at, leaves, strict=True) if leaf.requires_grad]
            upstream = inputs.upstream[samples, heads].to(dtype)
            for (total, _), part in zip(asked, torch.autograd.grad(block, [leaf for _, leaf in asked], upstream), strict=True):
                total += part
    return out, *(grad for grad, need in zip(grads, needs, strict=True) if need)


def check(provider: str, case: AttentionCase, mode: str, got: measure.Outputs, inputs: Inputs) -> None:
    # the reference accumulates in float32 for every dtype: with its result rounded, it is the eager form in the case's dtype
    eager = tuple(t.to(case.dtype) for t in expected(case, mode, inputs, torch.float32))
    truth = expected(case, mode, inputs, torch.float64)
    names = ["q", "k", "v", *(f"prefix {i} {part}" for i in range(len(case.prefixes)) for part in ("keys", "values"))]
    asked = [f"gradient of {name}" for name, tensor in zip(names, inputs.arguments, strict=True) if tensor.requires_grad]
    # twice the usual tolerance: fused kernels recompute probabilities from a rounded sum, torch's with a faster exp
    measure.assert_as_exact_as_eager(got, eager, truth, ["out", *asked], times=4)


def op(name: str, cases: Callable[[torch.device, str], Sequence[AttentionCase]]) -> suite.Op:
    return suite.Op(
        name, list(providers.PROVIDERS), providers.OURS, cases, providers.why_not, Inputs.random, build_step, check,
        providers.implementation,
    )  # fmt: skip
