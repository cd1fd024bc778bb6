"""How many kernels a model has Triton compile, told by Triton's own cache keys; nothing is compiled or run."""

from collections import defaultdict
from types import ModuleType
from typing import Any

import pytest
import torch
from mope_fast.kernels import prompt_attention as attention_kernels
from mope_fast.kernels import route_and_mix as mixing_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from mope_fast import _dispatch
from mope_fast._implementations import IMPLEMENTATIONS
from mope_fast.ops import layer_prompts, prompt_attention, route_and_mix

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
KERNELS: dict[ModuleType, tuple[str, ...]] = {
    attention_kernels: ("attention_kernel", "query_grads_kernel", "key_grads_kernel", "bias_grads_kernel"),
    mixing_kernels: ("mix_kernel", "mixture_grads_kernel", "router_grads_kernel"),
}


class _Counting:
    """Stands in for a kernel: keeps the cache keys of its launches."""

    def __init__(self, kernel: Any, keys: set[str]):
        self.arg_names, self.keys = kernel.arg_names, keys
        self.bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        self.known: dict[Any, str] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            _, specialization, options = self.bind(*args, **kwargs)
            self.keys.add(compute_cache_key(self.known, specialization, options))

        return launch


def count_variants(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """By kernel the cache keys of launches to come: what a model on the CPU computes goes the way of a GPU, without numbers."""
    keys: dict[str, set[str]] = defaultdict(set)
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, _Counting(getattr(module, name), keys[name]))
    monkeypatch.setattr(
        _dispatch, "choose", lambda function, impl, problem: "triton" if "triton" in IMPLEMENTATIONS[function] else impl
    )
    pairs = {
        prompt_attention: (
            prompt_attention._of_forward(prompt_attention._triton_forward),
            prompt_attention._of_backward(prompt_attention._triton_backward),
        ),
        layer_prompts: (layer_prompts._triton_forward, layer_prompts._triton_backward),
        route_and_mix: (route_and_mix._triton_forward, route_and_mix._triton_backward),
    }
    for module, functions in pairs.items():
        name = module.__name__.rpartition(".")[2]
        for suffix, function in zip(("forward", "backward"), functions, strict=True):
            monkeypatch.setattr(module, f"{name}_{suffix}", torch.no_grad()(function))
    return keys
