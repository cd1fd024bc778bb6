"""Measurement of attention in windows: steps, the float64 truth, the check."""

import dataclasses
import functools

import torch
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.baselines import window_attention as providers
from benchmarks.baselines.window_attention import Form, Inputs
from benchmarks.cases.window_attention import WindowCase, cases
from mope_fast import reference
from mope_fast.reference.window_attention import windows_of


def run(form: Form, attention: providers.Provider, mode: str, inputs: Inputs) -> measure.Outputs:
    out = attention(inputs)
    if mode == "forward":
        return (out,)
    # detached, because the check of a replay writes into outputs, which autograd forbids for some outputs of a graph
    return out.detach(), *torch.autograd.grad(out, list(form.learned(inputs).values()), inputs.upstream)


def build_step(provider: str, case: WindowCase, device: torch.device, mode: str) -> suite.Step:
    form = providers.PROVIDERS[provider]
    return functools.partial(run, form, form.build(case, device), mode)


def _reference(case: WindowCase, inputs: Inputs, prompted: bool) -> Tensor:
    sides = {"window_size": (case.window,) * 2, "shift_size": (case.shift,) * 2}
    prefixes = inputs.prefixes if prompted else ()
    return reference.window_prompt_attention(inputs.qkv, prefixes, case.bias(inputs.qkv.device), pad_qkv=inputs.pad_qkv, **sides)


def expected(case: WindowCase, mode: str, inputs: Inputs, dtype: torch.dtype, prompted: bool) -> dict[str, Tensor]:
    """Return the reference's outputs in ``dtype``, with or without prompts; the gradient of ``tokens`` is the queries'."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    inputs = dataclasses.replace(
        inputs, qkv=leaf(inputs.qkv), pad_qkv=None if inputs.pad_qkv is None else inputs.pad_qkv.to(dtype),
        prefixes=tuple((leaf(keys), leaf(values)) for keys, values in inputs.prefixes), upstream=inputs.upstream.to(dtype),
    )  # fmt: skip
    form = Form(providers.PROVIDERS["auto"].build, prompted=prompted)
    outputs = run(form, functools.partial(_reference, case, prompted=prompted), mode, inputs)
    named = dict(zip(["out", *form.learned(inputs)], outputs, strict=mode != "forward"))
    if "qkv" in named:
        named["tokens"] = named["qkv"][..., 0, :, :].flatten(-2)
    return named


def in_image_order(case: WindowCase, windows: Tensor) -> Tensor:
    """Reorder (B * windows, W, 3 * H * Dh) to (B, Hi, Wi, 3, H, Dh), without the padding."""
    tokens, _ = windows_of(*case.size, (case.window,) * 2, (case.shift,) * 2, windows.device)
    back = tokens.flatten().argsort()[: case.tokens]  # padding has the largest index
    flat = windows.unflatten(0, (case.batch, -1)).flatten(1, 2)[:, back]
    return flat.unflatten(-1, (3, case.heads, -1)).unflatten(1, case.size)


def check(provider: str, case: WindowCase, mode: str, got: measure.Outputs, inputs: Inputs) -> None:
    form = providers.PROVIDERS[provider]
    named = dict(zip(["out", *form.learned(inputs)], got, strict=mode != "forward"))
    if "windows" in named:
        named["qkv"] = in_image_order(case, named.pop("windows"))
    eager, truth = (expected(case, mode, inputs, dtype, form.prompted) for dtype in (torch.float32, torch.float64))
    # the reference accumulates in float32 for every dtype: with its result rounded, it is the eager form in the case's dtype
    peers, exact = tuple(eager[name].to(case.dtype) for name in named), tuple(truth[name] for name in named)
    titles = [name if name == "out" else f"gradient of {name}" for name in named]
    # twice the usual tolerance: as for other attention, and timm's default form rounds the probabilities too
    measure.assert_as_exact_as_eager(tuple(named.values()), peers, exact, titles, times=4)


OP = suite.Op(
    "window_prompt_attention", list(providers.PROVIDERS), providers.OURS, cases, providers.why_not, Inputs.random, build_step,
    check, providers.implementation,
)  # fmt: skip
