"""Every launch-table entry of prompt_attention compiles for sm_80 to sm_120, fits, and moves its data in wide words."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from compiler import Recorder, assert_fits, assert_wide_words, compile_launch, innermost_first, misaligned
from tiers import slow_but

from mope_fast import ReceptiveField

pytestmark = pytest.mark.aot

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("attention_kernel", "query_grads_kernel", "key_grads_kernel", "bias_grads_kernel")
LENGTHS = {"lp": 10, "text": 40, "image": 197, "vp": 10}
INTERVALS = ReceptiveField(
    LENGTHS, {"lp": ["lp", "text"], "text": ["lp", "text", "image"], "image": ["text", "image", "vp"], "vp": ["image", "vp"]}
)
GAPS = ReceptiveField(LENGTHS, {"lp": ["lp", "image"], "text": ["lp", "image"], "image": ["text", "vp"], "vp": ["text", "vp"]})


@dataclass(frozen=True)
class Case:
    """A call as an encoder makes it: q, k and v are slices of one packed projection."""

    name: str
    dtype: torch.dtype = BF16
    head_dim: int = 64
    tokens: int = 197
    prefixes: tuple[tuple[int, int], ...] = ()
    """(batch, length) of each."""
    window: tuple[int | None, int | None] = (None, None)
    padding: bool = False
    bias: bool = False
    field: ReceptiveField | None = None
    batch: int = 2
    heads: int = 4
    key_heads: int = 4
    masked_prefixes: bool = False

    def __str__(self) -> str:
        return self.name


BOTH = ((1, 6), (2, 7))
# one of each launch-table entry: compiled for all GPUs
ENTRIES = [
    Case("Dh=64", prefixes=BOTH),
    Case("Dh=128", head_dim=128, prefixes=BOTH),
    Case("Dh=64, 257 tokens", tokens=257, prefixes=BOTH),
    Case("Dh=128, 257 tokens", tokens=257, head_dim=128, prefixes=BOTH),
    Case("Dh=256", head_dim=256, prefixes=BOTH),
    Case("Dh=64 fp32", dtype=FP32, prefixes=BOTH),
    Case("Dh=128 fp32", dtype=FP32, head_dim=128, prefixes=BOTH),
    Case("Dh=256 fp32", dtype=FP32, head_dim=256, prefixes=BOTH),
]
# what encoders use most: nothing spilled, wide words
COMMON = [
    *ENTRIES[:4],
    Case("Dh=32", head_dim=32, prefixes=BOTH),
    Case("Dh=80", head_dim=80, prefixes=BOTH),
    Case("Dh=64 padded", prefixes=BOTH, padding=True),
    Case("Dh=64 causal", prefixes=BOTH, window=(None, 0)),
    Case("Dh=64 window", prefixes=BOTH, window=(64, 64)),
    Case("Dh=64 shared keys", prefixes=BOTH, key_heads=2),
    Case("Dh=64 intervals", field=INTERVALS),
    Case("Dh=64 fp16, one prefix", dtype=FP16, prefixes=((2, 32),)),
]
OTHERS = [
    Case("Dh=64 groups", field=GAPS),
    Case("Dh=34 intervals, padded", head_dim=34, field=INTERVALS, padding=True),
    Case("Dh=34 with prefixes", head_dim=34, prefixes=BOTH),
    Case("Dh=64 everything", prefixes=BOTH, padding=True, bias=True, window=(None, 0), masked_prefixes=True),
    # Triton 3.6 spills 16 bytes in the gradients of its keys
    Case("Dh=64 window, shared keys", prefixes=BOTH, window=(64, 64), key_heads=2),
    Case("Dh=256 window, shared keys, padded", head_dim=256, prefixes=BOTH, padding=True, window=(511, 0), key_heads=1),
    Case("Dh=64 groups, padded, bias", field=GAPS, padding=True, bias=True),
    Case("Dh=16, one token", head_dim=16, tokens=1, prefixes=((2, 1),), batch=2, heads=1, key_heads=1),
    Case("Dh=256 fp32 everything", dtype=FP32, head_dim=256, prefixes=BOTH, padding=True, bias=True),
    Case("Dh=64 long, prefix split over queries", tokens=2305, prefixes=((1, 32),)),
]


ELSEWHERE = [case for case in (*COMMON, *OTHERS) if case.name in ("Dh=64", "Dh=64 padded", "Dh=64 window, shared keys")]
QUICK = [case for case in COMMON if case.name in ("Dh=64", "Dh=64 window", "Dh=64 intervals")]


@pytest.fixture
def record(monkeypatch):
    """A function that gives the launches of a forward and a backward."""
    from mope_fast.kernels import prompt_attention as kernels

    from mope_fast.ops import prompt_attention as ops

    launches = []
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))

    def run(case: Case, view: Any = lambda tensor: tensor) -> list:
        launches.clear()
        tokens = case.field.size if case.field else case.tokens
        batch, heads, head_dim = case.batch, case.heads, case.head_dim

        def empty(*shape: int) -> torch.Tensor:
            return view(torch.empty(shape, dtype=case.dtype))

        packed = empty(batch, tokens, heads + 2 * case.key_heads, head_dim).transpose(1, 2)
        q, k, v = packed.split([heads, case.key_heads, case.key_heads], dim=1)
        pairs = [(b, length) for b, length in case.prefixes for _ in range(2)]
        prefixes = [empty(b, length, case.key_heads, head_dim).transpose(1, 2) for b, length in pairs] + [None] * (4 - len(pairs))
        field = case.field.lowered(q.device) if case.field else None
        masked = tokens + sum(length for _, length in case.prefixes) * case.masked_prefixes
        padding = torch.empty(batch, masked, dtype=torch.bool) if case.padding else None
        bias = empty(1, heads, tokens, tokens) if case.bias else None
        inputs = (q, k, v, *prefixes, field, padding, bias)
        out, lse = ops._triton_forward(ops._Tensors(*inputs), 0.125, *case.window)
        needs = [True] * 5 + [case.bias]
        ops._triton_backward(view(torch.empty_like(out)), ops._Tensors(*inputs), out, lse, 0.125, *case.window, needs)
        assert [launch.kernel.fn.__name__ for launch in launches] == list(KERNELS[: 3 + case.bias])
        return list(launches)

    return run


@pytest.mark.parametrize(
    ("case", "capability"),
    slow_but(
        # sm_86 has the least shared memory, and head dim 256 takes the most
        [*((case, 86) for case in (COMMON[0], ENTRIES[4])), *((case, 90) for case in QUICK)],
        [
            *((case, capability) for capability in (80, 89, 100, 120) for case in ELSEWHERE),
            *((case, 86) for case in ENTRIES),
            *((case, 90) for case in (*ENTRIES, *COMMON[4:], *OTHERS)),
        ],
    ),
    ids=str,
)
def test_compiles_and_fits(case, capability, record):
    for launch in record(case):
        assert_fits(compile_launch(launch, capability), capability)


@pytest.mark.slow
@pytest.mark.parametrize("view", [misaligned, innermost_first])
def test_compiles_for_other_layouts(view, record):
    for launch in record(COMMON[0], view=view):
        assert_fits(compile_launch(launch, 90), 90)


@pytest.mark.parametrize("needs_query", [False, True])
def test_compiles_for_a_first_layer_with_prefix_gradients_only(needs_query, record):
    launch = next(launch for launch in record(COMMON[0]) if launch.kernel.fn.__name__ == "query_grads_kernel")
    if not needs_query:
        launch.arguments["grad_q_ptr"] = None
    products = len(re.findall(r"wgmma|mma\.sync", compile_launch(launch, 90).ptx))
    assert (products > 0) == needs_query, "without it only delta is left"


@pytest.mark.parametrize(
    "case",
    slow_but(
        [(case,) for case in QUICK],
        [(case,) for case in (*COMMON, *(case for case in ENTRIES if case.dtype == FP32 and case.head_dim < 256))],
    ),
    ids=str,
)
def test_spills_nothing_on_sm_90(case, record):
    for launch in record(case):
        compiled = compile_launch(launch, 90)
        of_old_triton = triton.__version__.startswith("3.6.") and (case.name, compiled.name) == ("Dh=64 causal", "attention_kernel")
        assert compiled.spills <= 8 * of_old_triton, f"{compiled.name}: {compiled.spills} bytes of local memory"


@pytest.mark.parametrize("case", slow_but([(case,) for case in QUICK], [(case,) for case in COMMON]), ids=str)
def test_tiles_move_in_words_of_16_bytes_and_meet_in_tensor_cores_on_sm_90(case, record):
    for launch in record(case):
        compiled = compile_launch(launch, 90)
        assert_wide_words(compiled)
        assert re.search(r"wgmma|mma\.sync", compiled.ptx), f"{compiled.name}: no matrix instruction"
