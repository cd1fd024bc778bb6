"""Every implementation of attention against a dense float64 truth; xformers' on a GPU, and on a CPU against a strict stand-in."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as_eager
from torch import Tensor

from mope_fast import ReceptiveField, _dispatch, _implementations, functional
from mope_fast._implementations import Problem, choose
from mope_fast.ops import xformers_attention

BATCH, HEADS, HEAD_DIM, TOKENS = 3, 2, 12, 13
CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# float64 on both sides: only the order of sums differs
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def field(lengths: str, **visible: str) -> ReceptiveField:
    """``field("a2 b3", a="a b", b="b")``: groups a of 2 and b of 3 positions."""
    return ReceptiveField({name[0]: int(name[1:]) for name in lengths.split()}, {g: seen.split() for g, seen in visible.items()})


INTERVALS = field("a2 b5 c5 d1", a="a b", b="a b c", c="b c d", d="c d")
GAPS = field("a2 b5 c5 d1", a="a c", b="a b d", c="b c", d="a d")
NEIGHBOURS_SEE_THE_SAME = field("a2 b5 c6", a="a b", b="a b", c="c")


class Case(NamedTuple):
    """One call of a public function, as facts."""

    queries: int = TOKENS
    tokens: int = TOKENS
    prefixes: tuple[int, ...] = ()
    """Their batches; the first has 3 keys, the second 5."""
    is_causal: bool = False
    padded: bool = False
    bias: tuple[int, int] | None = None
    field: ReceptiveField | None = None
    head_dim: int = HEAD_DIM
    window: tuple[int | None, int | None] | None = None
    key_heads: int = HEADS
    masked_prefixes: bool = False


CASES = {
    "nothing": Case(),
    "shared prefix": Case(prefixes=(1,)),
    "prefix": Case(prefixes=(BATCH,)),
    "both prefixes, more queries": Case(queries=17, prefixes=(1, BATCH)),
    "padding": Case(padded=True),
    "padding, prefix": Case(padded=True, prefixes=(1,)),
    "causal": Case(is_causal=True),
    "causal, prefix": Case(is_causal=True, prefixes=(BATCH,)),
    "causal, more tokens": Case(queries=6, is_causal=True, prefixes=(1,)),
    "causal, more queries": Case(queries=17, is_causal=True, prefixes=(1,)),
    "causal, padding": Case(is_causal=True, padded=True, prefixes=(1,)),
    "bias of all": Case(bias=(1, 1)),
    "bias of heads": Case(bias=(1, HEADS)),
    "bias of samples": Case(bias=(BATCH, 1)),
    "bias of heads and samples": Case(bias=(BATCH, HEADS)),
    "bias, prefix, more tokens": Case(queries=6, bias=(1, HEADS), prefixes=(1,)),
    "everything": Case(bias=(BATCH, 1), prefixes=(BATCH, 1), is_causal=True, padded=True),
    "padding, 31 keys": Case(tokens=23, queries=23, prefixes=(1, BATCH), padded=True),
    "causal, 26 keys": Case(tokens=23, queries=23, prefixes=(BATCH,), is_causal=True),
    "bias, 31 keys": Case(23, 23, (BATCH, 1), bias=(1, HEADS)),
    "everything, 31 keys": Case(23, 23, (BATCH, 1), is_causal=True, padded=True, bias=(BATCH, 1)),
    "intervals": Case(field=INTERVALS),
    "intervals, padding": Case(field=INTERVALS, padded=True),
    "intervals, bias": Case(field=INTERVALS, bias=(1, HEADS)),
    "intervals, padding, bias": Case(field=INTERVALS, padded=True, bias=(BATCH, 1)),
    "gaps": Case(field=GAPS),
    "gaps, padding": Case(field=GAPS, padded=True),
    "gaps, bias": Case(field=GAPS, bias=(1, 1)),
    "gaps, padding, bias": Case(field=GAPS, padded=True, bias=(BATCH, HEADS)),
    "aligned": Case(16, 16, (1,), is_causal=True, padded=True, bias=(1, 1), head_dim=16),
    "window": Case(window=(3, 1)),
    "window, prefix": Case(window=(2, 3), prefixes=(1,)),
    "window of one side, more tokens": Case(6, prefixes=(BATCH,), window=(None, 2)),
    "causal window, more queries": Case(17, is_causal=True, window=(4, 4), prefixes=(1,)),
    "window that hides nothing": Case(window=(TOKENS, TOKENS - 1), padded=True),
    "window, masked prefixes": Case(window=(2, 2), prefixes=(1, BATCH), masked_prefixes=True),
    "masked prefixes, causal, more queries": Case(17, is_causal=True, prefixes=(BATCH, 1), masked_prefixes=True, bias=(1, HEADS)),
    "masked prefixes, padding, 31 keys": Case(23, 23, (1, BATCH), padded=True, masked_prefixes=True),
    "shared keys": Case(key_heads=1),
    "shared keys, window, padding, prefixes, bias": Case(
        key_heads=1, window=(3, 2), padded=True, prefixes=(1, BATCH), bias=(BATCH, HEADS)
    ),
    "shared keys, causal": Case(key_heads=1, is_causal=True),
    "shared keys, intervals": Case(key_heads=1, field=INTERVALS),
}


def make_padding(tokens: int) -> Tensor:
    """Holes in the middle of the first sample, a ragged end of the second, an early end of the third; token 0 is real."""
    index = torch.arange(tokens)
    return torch.stack([(index % 5 != 2) & (index % 7 != 4), index < tokens - 3, index < 2])


def make_masks(case: Case) -> list[Tensor]:
    """Of each prefix which keys are there, (its batch, P); nothing of what the last sample alone has."""
    masks = [(torch.arange(3 + 2 * i) + torch.arange(batch)[:, None]) % 3 > 0 for i, batch in enumerate(case.prefixes)]
    for mask in masks:
        mask[1:][-1:] = False
    return masks


def make_tensors(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"q": (BATCH, HEADS, case.queries, case.head_dim)}
    shapes |= dict.fromkeys(("k", "v"), (BATCH, case.key_heads, case.tokens, case.head_dim))
    for i, batch in enumerate(case.prefixes):
        shapes |= {f"prefix {i} {side}": (batch, case.key_heads, 3 + 2 * i, case.head_dim) for side in ("key", "value")}
    if case.bias is not None:
        shapes["bias"] = (*case.bias, case.queries, case.tokens)
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for name, shape in shapes.items()}


def visibility(case: Case, padding: Tensor | None) -> Tensor:
    """bool (B, Sq, Sk) of token keys, from the definitions, one pair at a time."""
    if case.field is not None:
        group = [name for name, length in zip(case.field.groups, case.field.lengths, strict=True) for _ in range(length)]
        seen_by = dict(zip(case.field.groups, case.field.visible, strict=True))
    sees = torch.ones(BATCH, case.queries, case.tokens, dtype=torch.bool)
    for i in range(case.queries):
        for j in range(case.tokens):
            ahead = j - (i + case.tokens - case.queries)
            left, right = case.window or (None, None)
            hidden = (case.is_causal and ahead > 0) or (left is not None and ahead < -left) or (right is not None and ahead > right)
            if hidden or (case.field is not None and group[j] not in seen_by[group[i]]):
                sees[:, i, j] = False
    return sees if padding is None else sees & padding[:, None]


class Dense(NamedTuple):
    """A case with all of its products written out."""

    keys: Tensor
    values: Tensor
    sees: Tensor
    bias: Tensor | None


def written_out(case: Case, tensors: dict[str, Tensor], padding: Tensor | None) -> Dense:
    prefixes = range(len(case.prefixes))
    keys, values = (
        torch.cat([*(tensors[f"prefix {i} {side}"].expand(BATCH, -1, -1, -1) for i in prefixes), tensors[tokens]], dim=2)
        for side, tokens in (("key", "k"), ("value", "v"))
    )
    keys, values = (
        torch.stack([rows[:, head * case.key_heads // HEADS] for head in range(HEADS)], dim=1) for rows in (keys, values)
    )
    prefix = (keys.shape[2] - case.tokens, 0)
    sees = visibility(case, padding)[:, None].expand(-1, HEADS, -1, -1)
    if (bias := tensors.get("bias")) is not None:
        sees, bias = sees & (bias > float("-inf")), F.pad(bias, prefix)
    sees = F.pad(sees, prefix, value=True)
    if case.masked_prefixes:
        masks = torch.cat([mask.expand(BATCH, -1) for mask in make_masks(case)], dim=1)
        sees = torch.cat([masks[:, None, None].expand(*sees.shape[:3], -1), sees[..., prefix[0] :]], dim=-1)
    return Dense(keys, values, sees, bias)


def dense(case: Case, tensors: dict[str, Tensor], padding: Tensor | None) -> Tensor:
    """Attention as its formula says, in the dtype of the tensors."""
    keys, values, sees, bias = written_out(case, tensors, padding)
    logits = torch.einsum("bhid,bhjd->bhij", tensors["q"], keys) * case.head_dim**-0.5
    if keys.shape[2] == 0:
        return logits @ values
    logits = logits if bias is None else logits + bias
    largest = torch.where(sees, logits, -1e4).amax(-1, keepdim=True).detach()
    weights = torch.where(sees, torch.where(sees, logits - largest, 0.0).exp(), 0.0)
    sums = weights.sum(-1, keepdim=True)
    return (weights / torch.where(sums == 0, 1.0, sums)) @ values


def plain_sdpa(case: Case, tensors: dict[str, Tensor], padding: Tensor | None) -> Tensor:
    keys, values, sees, bias = written_out(case, tensors, padding)
    mask = sees if bias is None else bias.masked_fill(~sees, float("-inf"))
    return F.scaled_dot_product_attention(tensors["q"], keys, values, attn_mask=mask)


class Backend(NamedTuple):
    impl: str
    device: torch.device

    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor
    laid_out: tuple[str, ...] = ()

    def __call__(self, case: Case, tensors: dict[str, Tensor], padding: Tensor | None) -> Tensor:
        """Takes and gives CPU tensors; gradients flow through the copies."""
        t = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        t |= {name: self.layout(t[name]) for name in self.laid_out}
        masks = {"key_padding_mask": None if padding is None else padding.to(self.device), "bias": t.get("bias")}
        if case.field is not None:
            out = functional.receptive_field_attention(t["q"], t["k"], t["v"], case.field, **masks, impl=self.impl)
        else:
            prefixes = [(t[f"prefix {i} key"], t[f"prefix {i} value"]) for i in range(len(case.prefixes))]
            if case.masked_prefixes:
                prefixes = [(*pair, mask.to(self.device)) for pair, mask in zip(prefixes, make_masks(case), strict=True)]
            masks |= {"is_causal": case.is_causal, "window": case.window}
            out = functional.prompt_attention(t["q"], t["k"], t["v"], prefixes, **masks, impl=self.impl)
        return out.cpu()

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float64 or self.impl != "xformers" or self.device == CPU


GPU = [pytest.param((impl, "cuda"), marks=pytest.mark.gpu, id=f"{impl}-cuda") for impl in ("sdpa", "xformers")]


@pytest.fixture(params=[*(pytest.param((impl, "cpu"), id=impl) for impl in ("reference", "sdpa", "xformers")), *GPU])
def backend(request) -> Backend:
    impl, device = request.param
    if request.param == ("xformers", "cpu"):
        request.getfixturevalue("stand_in")
    elif impl == "xformers" and (reason := xformers_attention.why_not_loaded()) is not None:
        pytest.skip(reason)
    return Backend(impl, torch.device(device))


class StandIn:
    """xformers' memory_efficient_attention on a CPU. Refuses what the CUDA kernels refuse, and knows what it was asked."""

    def __init__(self, fmha):
        self.fmha = fmha
        self.calls = []

    def __call__(self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        inputs = self.fmha.Inputs(query, key, value, attn_bias, p, scale, output_dtype)
        inputs.validate_inputs()
        trained = any(t.requires_grad for t in (query, key, value))
        self._check(inputs, trained)
        self.calls.append(inputs)
        # like xformers, which looks at query, key and value only to find out whether a gradient will be asked for
        with contextlib.nullcontext() if trained else torch.no_grad():
            return self._attention(inputs).to(query.dtype)

    def _attention(self, inputs):
        dtype = torch.promote_types(inputs.query.dtype, torch.float32)
        q, k, v = (t.to(dtype).transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
        weights = inputs.scale_float * q @ k.mT
        if isinstance(inputs.attn_bias, Tensor):
            weights = weights + inputs.attn_bias
        elif inputs.attn_bias is not None:
            queries, keys = weights.shape[-2:]
            hidden = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
            weights = weights.masked_fill(hidden, float("-inf"))
        return (weights.softmax(-1) @ v).transpose(1, 2)

    def _check(self, inputs, trained):
        for name, tensor in (("query", inputs.query), ("key", inputs.key), ("value", inputs.value)):
            if tensor.dim() != 4:
                raise ValueError(f"{name} must be (B, M, H, K)")
            self._check_memory(name, tensor)
            if tensor.shape[-1] % 8:
                raise ValueError(f"{name} has a last dimension of {tensor.shape[-1]}, no multiple of 8")
        if isinstance(inputs.attn_bias, Tensor):
            if inputs.attn_bias.dtype != inputs.query.dtype:
                raise ValueError(f"attn_bias is {inputs.attn_bias.dtype}, query {inputs.query.dtype}")
            self._check_memory("attn_bias", inputs.attn_bias)
        elif inputs.attn_bias is not None and type(inputs.attn_bias) is not self.fmha.attn_bias.LowerTriangularFromBottomRightMask:
            raise NotImplementedError(f"the stand-in knows no {type(inputs.attn_bias).__name__}")
        # what xformers itself says, save what it says because this is a CPU, and of float64, which exact tests need
        because_of_cpu = ("device=cpu", "bf16 is only supported on A100+", "dtype=torch.float64")
        for operator in (self.fmha.cutlass.FwOp, *([self.fmha.cutlass.BwOp] if trained else [])):
            reasons = [r for r in operator.not_supported_reasons(inputs) if not r.startswith(because_of_cpu)]
            if reasons:
                raise NotImplementedError(f"{operator.NAME}: {'; '.join(reasons)}")

    @staticmethod
    def _check_memory(name, tensor):
        """Vectors of 8 elements are loaded: rows must be dense and start at a multiple of 8."""
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has a last stride of {tensor.stride(-1)}, not 1")
        # no address is made with the stride of a dimension of size 1
        strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
        if tensor.storage_offset() % 8 or any(stride % 8 for stride in strides):
            raise ValueError(f"{name} is misaligned: strides {tensor.stride()}, offset {tensor.storage_offset()}")


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    """Makes impl="xformers" run on a CPU."""
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    # on a CPU xformers asks for no alignment; a GPU loads 16 bytes at once
    monkeypatch.setattr(ops.fmha.cutlass, "_minimum_gemm_alignment", lambda inputs: 128 // torch.finfo(inputs.query.dtype).bits)
    stand_in = StandIn(ops.fmha)
    monkeypatch.setattr(ops, "memory_efficient_attention", stand_in)
    monkeypatch.setitem(_implementations._ATTENTION, "xformers", lambda problem: None)
    return stand_in


def most_exact_dtype(backend: Backend) -> torch.dtype:
    return torch.float64 if backend.takes(torch.float64) else torch.float32


def results(attention: Callable, case: Case, tensors: dict[str, Tensor], padding: Tensor | None, upstream: Tensor):
    out = attention(case, tensors, padding)
    grads = torch.autograd.grad(out, [*tensors.values()], upstream.to(out.dtype))
    return {"out": out.detach(), **{f"grad of {name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def as_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def assert_right(
    backend: Backend, case: Case, tensors: dict[str, Tensor], padding: Tensor | None, expected: Callable = dense
) -> None:
    """Output and all gradients: in float64 equal to the dense formula, else as good as it is in that dtype."""
    dtype = tensors["q"].dtype
    if not backend.takes(dtype):
        pytest.skip(f"{backend.impl} does not take {dtype}")
    upstream = torch.randn_like(tensors["q"])
    truth = results(expected, case, as_double(tensors), padding, upstream)
    # of float32's 24 bits, torch's attention on a CPU has 20 in its exp
    yardstick = plain_sdpa if (backend.impl, backend.device, dtype) == ("sdpa", CPU, torch.float32) else expected
    eager = results(yardstick, case, tensors, padding, upstream)
    for name, got in results(backend, case, tensors, padding, upstream).items():
        if dtype == torch.float64:
            torch.testing.assert_close(got, truth[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert_as_good_as_eager(name, got, eager[name], truth[name], dtype)


IN_16_BITS = ("nothing", "both prefixes, more queries", "causal, prefix", "everything", "everything, 31 keys", "aligned")
"""One of each kind of mask; with a field ``"gaps, padding, bias"`` and ``"intervals"``."""


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{name}-{dtype}")
        for name, case in CASES.items()
        for dtype in (DTYPES if name in (*IN_16_BITS, "gaps, padding, bias", "intervals") else DTYPES[:2])
    ],
)
def test_output_and_gradients_are_those_of_the_dense_formula(case, dtype, backend):
    assert_right(backend, case, make_tensors(case, dtype), make_padding(case.tokens) if case.padded else None)


@pytest.mark.parametrize(
    ("tokens", "dtype", "masked", "keys"),
    [
        (23, torch.float32, True, 32), (16, torch.float32, True, 32), (23, torch.bfloat16, True, 32),
        # whole vectors, a few keys more, float64, no mask
        (24, torch.float32, True, 32), (14, torch.float32, True, 22), (23, torch.float64, True, 31), (23, torch.float32, False, 31),
    ],
)  # fmt: skip
def test_on_a_cpu_a_mask_hides_keys_up_to_whole_vectors(tokens, dtype, masked, keys, monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **kw: seen.append(k.shape[2]) or attention(q, k, v, **kw)
    )
    case = Case(tokens, tokens, (1, BATCH))
    tensors = make_tensors(case, dtype)
    Backend("sdpa", CPU)(case, tensors, make_padding(tokens) if masked else None)
    assert seen == [keys]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_prefixes_and_bias_meet_16_bit_tokens_and_get_float32_gradients(dtype, backend):
    case = Case(prefixes=(1, BATCH), bias=(1, HEADS))
    tensors = make_tensors(case, dtype)
    # representable in the dtype, so that nothing is lost where an implementation casts them
    tensors |= {name: t.detach().float().requires_grad_() for name, t in tensors.items() if name not in ("q", "k", "v")}
    upstream = torch.randn_like(tensors["q"])
    truth = results(dense, case, as_double(tensors), None, upstream)
    eager = results(dense, case, {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}, None, upstream)
    for name, got in results(backend, case, tensors, None, upstream).items():
        of_parameter = "prefix" in name or "bias" in name
        assert got.dtype == (torch.float32 if of_parameter else dtype), name
        assert_as_good_as_eager(name, got.to(dtype), eager[name], truth[name], dtype)


LAYOUTS = {
    "tokens before heads": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "heads last": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "rows last": lambda t: t.mT.contiguous().mT,
    "rows of odd length": lambda t: F.pad(t, (0, 3 - t.shape[-1] % 2))[..., : t.shape[-1]],
    "odd beginning": lambda t: F.pad(t, (1, -t.shape[-1] % 8 + 7))[..., 1 : t.shape[-1] + 1],
    "one row for all": lambda t: t[:, :, :1].expand_as(t),
    "one column for all": lambda t: t[..., :1].expand_as(t),
    "heads that overlap": lambda t: t.contiguous().as_strided(t.shape, (t.stride(0), 1, t.shape[-1], 1)),
}


def assert_right_in_layout(backend: Backend, layout: Callable, names: tuple[str, ...], case: Case) -> None:
    """The layout is a view of other memory, so it changes values only where it repeats some."""

    def contiguous(case, tensors, padding):
        return dense(case, tensors | {name: layout(tensors[name]).contiguous() for name in names}, padding)

    tensors = make_tensors(case, most_exact_dtype(backend))
    assert_right(backend._replace(layout=layout, laid_out=names), case, tensors, None, contiguous)


@pytest.mark.parametrize(
    ("head_dim", "case"),
    [
        pytest.param(head_dim, case, id=f"head_dim={head_dim}-{case}")
        for head_dim, case in ((HEAD_DIM, "nothing"), (16, "shared prefix"), (16, "intervals"), (HEAD_DIM, "causal"))
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_queries_keys_and_values_may_have_any_strides(layout, head_dim, case, backend):
    assert_right_in_layout(backend, layout, ("q", "k", "v"), CASES[case]._replace(head_dim=head_dim))


@pytest.mark.parametrize(
    ("prefixes", "shape", "tokens"),
    [((), (1, HEADS), TOKENS), ((1,), (BATCH, 1), TOKENS), ((1,), (1, HEADS), 16), ((), (BATCH, 1), 16)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_bias_may_have_any_strides(layout, prefixes, shape, tokens, backend):
    assert_right_in_layout(backend, layout, ("bias",), Case(tokens, tokens, prefixes, bias=shape))


def blind_cases() -> dict[str, tuple[Case, Tensor | None, Tensor | None]]:
    """Case, padding and bias -inf: each leaves some queries without a key."""
    padded = make_padding(TOKENS)
    padded[1] = False
    row = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    row[..., 4, :] = True
    behind_the_second = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    behind_the_second[..., 4, :2] = True
    ends_in_padding = field("a3 b8 c2", a="a", b="a b", c="c")
    nothing_for_b = field("a4 b3 c6", a="a", b="", c="b c")
    return {
        "a wholly padded sample": (Case(padded=True), padded, None),
        "a wholly padded sample, causal": (Case(padded=True, is_causal=True), padded, None),
        "a wholly padded sample, intervals": (Case(padded=True, field=INTERVALS), padded, None),
        "a wholly padded sample, gaps": (Case(padded=True, field=GAPS), padded, None),
        "a row of -inf": (Case(bias=(1, 1)), None, row),
        "a row of -inf of a head": (Case(bias=(1, HEADS)), None, torch.cat([row, torch.zeros_like(row)], dim=1)),
        "a row of -inf, intervals": (Case(bias=(1, 1), field=INTERVALS), None, row),
        "-inf where there is no padding": (Case(bias=(1, 1), padded=True), make_padding(TOKENS), behind_the_second),
        "causal, more queries": (Case(queries=17, is_causal=True), None, None),
        "a group that sees nothing": (Case(field=nothing_for_b), None, None),
        "a group that sees nothing, gaps": (Case(field=field("a4 b3 c6", a="a c", b="", c="b c")), None, None),
        "a group that sees padding": (Case(field=ends_in_padding, padded=True), make_padding(TOKENS), None),
        "no group sees anything": (Case(field=field("a4 b9", a="", b="")), None, None),
        "no token": (Case(tokens=0), None, None),
        "no token, causal": (Case(tokens=0, is_causal=True), None, None),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", blind_cases())
def test_a_query_without_a_key_gives_zeros_and_zero_gradients(name, dtype, backend):
    case, padding, hidden = blind_cases()[name]
    tensors = make_tensors(case, dtype)
    sees = visibility(case, padding)[:, None].expand(-1, HEADS, -1, -1)
    if hidden is not None:
        tensors["bias"] = tensors["bias"].detach().masked_fill(hidden, float("-inf")).requires_grad_()
        sees = sees & ~hidden
    blind = ~sees.any(-1)
    assert blind.any()
    got = results(backend, case, tensors, padding, torch.randn_like(tensors["q"]))
    assert all(tensor.isfinite().all() for tensor in got.values())
    for name in ("out", "grad of q"):
        assert torch.count_nonzero(got[name][blind]) == 0, name
    if hidden is not None:
        assert torch.count_nonzero(got["grad of bias"].masked_fill(~hidden, 0.0)) == 0
    unseen = ~sees.any(-2)
    for name in ("grad of k", "grad of v"):
        assert torch.count_nonzero(got[name][unseen]) == 0, name


@pytest.mark.parametrize("name", blind_cases())
def test_queries_next_to_one_without_a_key_are_right(name, backend):
    case, padding, hidden = blind_cases()[name]
    tensors = make_tensors(case, most_exact_dtype(backend))
    if hidden is not None:
        tensors["bias"] = tensors["bias"].detach().masked_fill(hidden, float("-inf")).requires_grad_()
    assert_right(backend, case, tensors, padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_smallest_float32_in_a_bias_hides_keys_next_to_others_and_counts_the_same_everywhere_alone(dtype, backend):
    """Encoders write it into masks that they add; float16 has no such number, bfloat16 rounds it to -inf."""
    case = Case(bias=(BATCH, 1))
    tensors = make_tensors(case, dtype)
    padding = make_padding(TOKENS)
    padding[1] = False
    smallest = torch.zeros(BATCH, 1, TOKENS, TOKENS).masked_fill(~padding[:, None, None], torch.finfo(torch.float32).min)
    got = results(backend, case, tensors | {"bias": smallest.requires_grad_()}, None, torch.randn_like(tensors["q"]))
    assert all(tensor.isfinite().all() for tensor in got.values())
    without = {name: t.double() for name, t in tensors.items() if name != "bias"}
    truth = dense(Case(padded=True), without, padding).detach()
    samples = [0, 2]
    eager = dense(Case(padded=True), {name: tensors[name] for name in ("q", "k", "v")}, padding).detach()
    assert_as_good_as_eager("out", got["out"][samples], eager[samples], truth[samples], dtype)
    if dtype != torch.float16:  # its least number leaves the logits a say
        mean = tensors["v"][1].double().mean(1, keepdim=True).expand_as(truth[1])
        assert_as_good_as_eager("padded sample", got["out"][1], mean.to(dtype), mean, dtype)


@pytest.mark.parametrize("leaf", ["bias", "prefix 0 key", "prefix 0 value", "q", "k", "v"])
def test_each_tensor_gets_its_gradient_where_all_others_are_constants(leaf, backend):
    case = Case(prefixes=(1,), bias=(1, HEADS))
    dtype = most_exact_dtype(backend)
    tensors = make_tensors(case, dtype)
    constants = {name: t.detach() for name, t in tensors.items() if name != leaf}
    upstream = torch.randn_like(tensors["q"])
    (got,) = torch.autograd.grad(backend(case, constants | {leaf: tensors[leaf]}, None), tensors[leaf], upstream)
    truth, eager = (results(dense, case, t, None, upstream)[f"grad of {leaf}"] for t in (as_double(tensors), tensors))
    assert_as_good_as_eager(leaf, got.float(), eager.float(), truth, torch.float32)


def test_an_empty_batch_gives_an_empty_output(backend):
    for case in (CASES["prefix"], CASES["causal"], CASES["intervals, bias"]):
        tensors = {name: t[:0] if t.shape[0] == BATCH else t for name, t in make_tensors(case, torch.float32).items()}
        assert backend(case, tensors, None).shape == (0, HEADS, TOKENS, HEAD_DIM)


STRUCTURED = "LowerTriangularFromBottomRightMask"


@pytest.mark.parametrize(
    ("case", "calls"),
    [
        (CASES["nothing"], [(13, 13, None)]),
        (CASES["both prefixes, more queries"], [(17, 21, None)]),
        (CASES["causal"], [(13, 13, STRUCTURED)]),
        (CASES["causal, prefix"], [(13, 16, STRUCTURED)]),
        (CASES["causal, more tokens"], [(6, 16, STRUCTURED)]),
        (CASES["causal, more queries"], [(17, 16, "Tensor")]),
        (CASES["causal, padding"], [(13, 16, "Tensor")]),
        (CASES["padding, prefix"], [(13, 16, "Tensor")]),
        (CASES["bias of all"], [(13, 13, "Tensor")]),
        (CASES["intervals"], [(2, 7, None), (5, 12, None), (5, 11, None), (1, 6, None)]),
        (Case(field=NEIGHBOURS_SEE_THE_SAME), [(7, 7, None), (6, 6, None)]),
        (Case(field=field("a4 b3 c6", a="a", b="", c="b c")), [(4, 4, None), (6, 9, None)]),
        (CASES["intervals, padding"], [(13, 13, "Tensor")]),
        (CASES["intervals, bias"], [(13, 13, "Tensor")]),
        (CASES["gaps"], [(13, 13, "Tensor")]),
        (CASES["gaps, padding"], [(13, 13, "Tensor")]),
        (CASES["window"], [(13, 13, "Tensor")]),
        (CASES["window, prefix"], [(13, 16, "Tensor")]),
        (CASES["window that hides nothing"]._replace(padded=False), [(13, 13, None)]),
        (CASES["shared keys, causal"], [(13, 13, STRUCTURED)]),
    ],
    ids=str,
)  # fmt: skip
def test_xformers_is_asked_for_structured_masks_where_there_are_some(case, calls, stand_in):
    backend = Backend("xformers", CPU)
    backend(case, make_tensors(case, torch.float32), make_padding(case.tokens) if case.padded else None)
    kinds = [None if c.attn_bias is None else type(c.attn_bias).__name__ for c in stand_in.calls]
    assert [(c.query.shape[1], c.key.shape[1], kind) for c, kind in zip(stand_in.calls, kinds, strict=True)] == calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(query=t["query"][..., :4], key=t["key"][..., :4], value=t["value"][..., :4]), "multiple of 8"),
        (lambda t: t.update(key=t["key"].mT.contiguous().mT), "key has a last stride of 2, not 1"),
        (lambda t: t.update(query=F.pad(t["query"], (1, 7))[..., 1:9]), "query is misaligned"),
        (lambda t: t.update(value=F.pad(t["value"], (0, 4))[..., :8]), "value is misaligned"),
        (lambda t: t.update(attn_bias=t["attn_bias"] > 0), "attn_bias is torch.bool"),
        (lambda t: t.update(attn_bias=t["attn_bias"].half()), "attn_bias is torch.float16"),
        (lambda t: t.update(attn_bias=t["attn_bias"][:, :1]), "Invalid shape for attention bias"),
        (lambda t: t.update(attn_bias=t["attn_bias"].mT.contiguous().mT), "attn_bias has a last stride of 16"),
        (lambda t: t.update(attn_bias=F.pad(t["attn_bias"], (0, 1))[..., :16]), "attn_bias is misaligned"),
    ],
)  # fmt: skip
def test_the_stand_in_refuses_what_cuda_kernels_refuse(change, message, stand_in):
    shape = (BATCH, 16, HEADS, 8)
    arguments = {name: torch.randn(shape) for name in ("query", "key", "value")} | {"attn_bias": torch.randn(BATCH, HEADS, 16, 16)}
    stand_in(**arguments)
    change(arguments)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        stand_in(**arguments)


def test_xformers_own_rules_are_asked_for(stand_in):
    tensors = [torch.randn(BATCH, 16, HEADS, 8, dtype=torch.complex64) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=r"cutlassF.*dtype=torch.complex64"):
        stand_in(*tensors)


def test_without_xformers_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert xformers_attention.why_not_loaded.__wrapped__() == "xformers is not installed (pip install 'mope_fast[xformers]')"


NEW_PROCESS = """
import glob
found = glob.glob
# some versions of torch load every CUDA runtime they find
glob.glob = lambda pattern, **settings: [] if "cuda_runtime" in pattern else found(pattern, **settings)
import torch
glob.glob = found

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {hidden} else find_spec(name, package)

def mapped():
    return "libcudart.so.12" in open("/proc/self/maps").read()

from mope_fast.ops.xformers_attention import why_not_loaded
print(mapped())
print(why_not_loaded())
print(mapped())
"""


def loaded_in_a_new_process(hidden: tuple[str, ...]) -> tuple[str, bool]:
    """why_not_loaded(), and whether the CUDA 12 runtime is mapped afterwards, which it was not before."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    process = subprocess.run([sys.executable, "-c", NEW_PROCESS.format(hidden=hidden)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    before, *reason, after = process.stdout.splitlines()
    if before == "True" or torch.version.cuda is None:
        pytest.skip("the CUDA 12 runtime is torch's own here, or there is no CUDA")
    return "\n".join(reason), after == "True"


def test_without_the_cuda_12_runtime_the_reason_says_what_to_install():
    reason, mapped = loaded_in_a_new_process(hidden=("nvidia.cuda_runtime",))
    assert "xformers can't load its operators; its library needs libcudart.so.12 (pip install nvidia-cuda-runtime-cu12)" in reason
    assert not mapped


def test_the_cuda_12_runtime_is_loaded_for_xformers():
    pytest.importorskip("nvidia.cuda_runtime", reason="nvidia-cuda-runtime-cu12 is not installed")
    assert loaded_in_a_new_process(hidden=()) == ("None", True)


@pytest.fixture
def chosen(monkeypatch) -> list[str]:
    """What the public functions chose, call by call, with no default from the environment."""
    names = []

    def spy(function, impl, problem):
        names.append(choose(function, impl, problem))
        return names[-1]

    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "auto")
    monkeypatch.setattr(_dispatch, "choose", spy)
    return names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [4, 600])
def test_auto_takes_sdpa_on_a_cpu_whatever_the_batch(tokens, dtype, chosen):
    for batch in (1, 2, 65):
        q, k, v = (torch.randn(batch, 1, tokens, 8, dtype=dtype) for _ in range(3))
        functional.prompt_attention(q, k, v, [(k[:1], v[:1])])
        functional.receptive_field_attention(q, k, v, ReceptiveField({"a": tokens}, {"a": ["a"]}))
    assert set(chosen) == {"sdpa"}
    assert len(chosen) == 6


@pytest.mark.parametrize("function", ["prompt_attention", "receptive_field_attention"])
def test_auto_takes_the_best_implementation_that_can_run(function, monkeypatch):
    able = {"triton", "xformers", "sdpa", "reference"}
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "auto")
    for name in sorted(able):
        monkeypatch.setitem(_implementations._ATTENTION, name, lambda problem, name=name: None if name in able else "not here")
    few, many = (Problem(torch.device("cuda"), torch.float16, keys) for keys in (512, 513))
    order = []
    while able:
        order.append((choose(function, "auto", few), choose(function, "auto", many)))
        able -= {order[-1][0]}
    assert [first for first, _ in order] == ["triton", "sdpa", "xformers", "reference"]
    assert order[0][1] == "sdpa"


@pytest.mark.parametrize("prefix_lengths", [(), (100,), (56, 57)], ids=str)
def test_auto_is_told_the_number_of_all_keys_and_not_the_batch(prefix_lengths, monkeypatch):
    problems = []
    monkeypatch.setattr(_dispatch, "choose", lambda function, impl, problem: problems.append(problem) or "reference")
    for batch in (1, 3):
        q, k = torch.randn(batch, 1, 2, 8), torch.randn(batch, 1, 400, 8)
        functional.prompt_attention(q, k, k, [(k[:1, :, :length],) * 2 for length in prefix_lengths])
    assert [problem.keys for problem in problems] == [400 + sum(prefix_lengths)] * 2
    assert problems[0] == problems[1]


def call(function: str, **changes):
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM) for _ in range(3))
    arguments = {"q": q, "k": k, "v": v} | ({"field": INTERVALS} if function == "receptive_field_attention" else {})
    arguments |= {name: change(arguments) if callable(change) else change for name, change in changes.items()}
    return getattr(functional, function)(**arguments)


@pytest.mark.parametrize("function", ["prompt_attention", "receptive_field_attention"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": lambda a: a["q"].half()}, TypeError, "q, k and v must have one dtype, got torch.float16, torch.float32"),
        ({"v": lambda a: a["v"].double()}, TypeError, "q, k and v must have one dtype, got torch.float32, torch.float32 and"),
        ({"q": lambda a: a["q"][..., :8]}, ValueError, r"k and v must be \(3, Hkv, Sk, 8\) to fit q .*; got k \(3, 2, 13, 12\)"),
        (
            {"k": lambda a: a["k"].repeat(1, 2, 1, 1), "v": lambda a: a["v"].repeat(1, 2, 1, 1)},
            ValueError,
            "k and v must have as many heads as q, or a divisor of that number: q has 2 heads, k 4, v 4",
        ),
        ({"v": lambda a: a["v"][:, :1]}, ValueError, "a divisor of that number: q has 2 heads, k 2, v 1"),
        ({"key_padding_mask": [True] * 13}, TypeError, "key_padding_mask must be a bool tensor, got list"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a Python float, got a tensor"),
        ({"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
        (dict.fromkeys("qkv", torch.zeros(1, 1, 13, 257)), ValueError, "head dimension Dh must be 1 to 256, got 257"),
        (dict.fromkeys("qkv", torch.zeros(1, 1, 13, 0)), ValueError, "head dimension Dh must be 1 to 256, got 0"),
        ({"key_padding_mask": torch.ones(3, 13)}, ValueError, r"must be bool \(3, 13\), True = a real token; got torch.float32"),
        ({"bias": torch.zeros(1, 1, 13, 13).bool()}, TypeError, r"bias must have a floating-point dtype, got torch.bool"),
        ({"bias": torch.zeros(2, 1, 13, 13)}, ValueError, r"bias must be \(3 or 1, 2 or 1, 13, 13\), got \(2, 1, 13, 13\)"),
        ({"bias": torch.zeros(1, 1, 13, 1)}, ValueError, r"bias must be \(3 or 1, 2 or 1, 13, 13\), got \(1, 1, 13, 1\)"),
        ({"bias": torch.zeros(1, 1, 13, 13, device="meta")}, ValueError, "q is on cpu and bias on meta: move them to one device"),
        ({"impl": "flash"}, ValueError, r"_attention got impl='flash', expected one of \['auto', 'triton', 'xformers', 'sdpa', "),
        (
            {"impl": "xformers"}, RuntimeError,
            r"impl='xformers', which can't run on float32 tensors on cpu: xformers has operators for CUDA only; the tensors are on "
            r"cpu\. Here it can run as \['sdpa', .*'reference'\]; impl='auto' chooses 'sdpa'",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_of_both_functions_are_named(changes, error, message, function):
    with pytest.raises(error, match=message):
        call(function, **changes)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs here")
@pytest.mark.parametrize("function", ["prompt_attention", "receptive_field_attention"])
def test_triton_without_a_gpu_says_what_to_do(function):
    with pytest.raises(
        RuntimeError, match=r"impl='triton', which can't run on float32 tensors on cpu: .*; impl='auto' chooses 'sdpa'"
    ):
        call(function, impl="triton")


def test_an_implementation_that_could_not_be_loaded_says_why(monkeypatch):
    reason = "xformers is not installed (pip install 'mope_fast[xformers]')"
    monkeypatch.setattr(_implementations, "_why_not_loaded_xformers", lambda: reason)
    monkeypatch.setitem(_implementations._ATTENTION, "triton", lambda problem: None)
    with pytest.raises(
        RuntimeError, match=r"on cuda: xformers is not installed .*Here it can run as \['triton', 'sdpa', 'reference'\]"
    ):
        choose("prompt_attention", "xformers", Problem(torch.device("cuda"), torch.float16, 100))
    with pytest.raises(RuntimeError, match="float64 tensors on cuda: xformers takes float16, bfloat16 and float32"):
        choose("prompt_attention", "xformers", Problem(torch.device("cuda"), torch.float64, 100))


def prefix(key_dtype=torch.float32, value_dtype=torch.float32, head_dim=HEAD_DIM, heads=HEADS):
    return torch.zeros(1, heads, 3, head_dim, dtype=key_dtype), torch.zeros(1, heads, 3, head_dim, dtype=value_dtype)


@pytest.mark.parametrize(
    ("prefixes", "error", "message"),
    [
        ([prefix(value_dtype=torch.half)], TypeError, "key and value of prefix 0 must have one dtype, got torch.float32 and torch"),
        ([prefix(), prefix(key_dtype=torch.int)], TypeError, "prefix 1 must have a floating-point dtype, got torch.int32"),
        ([prefix(heads=1)], ValueError, r"prefix 0 must be two tensors \(3 or 1, 2, P, 12\), got \(1, 1, 3, 12\)"),
        ([prefix(), prefix(head_dim=8)], ValueError, r"prefix 1 must be two tensors \(3 or 1, 2, P, 12\), got \(1, 2, 3, 8\)"),
        ([prefix()[0]], TypeError, r"must be a sequence of \(key, value\) pairs or \(key, value, mask\) triples, \(\) for none"),
        (prefix(), TypeError, r"must be a sequence of \(key, value\) pairs or \(key, value, mask\) triples, \(\) for none"),
        (None, TypeError, r"must be a sequence of \(key, value\) pairs or \(key, value, mask\) triples, \(\) for none"),
    ],
)  # fmt: skip
def test_wrong_prefixes_are_named(prefixes, error, message):
    with pytest.raises(error, match=message):
        call("prompt_attention", prefixes=prefixes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"field": {"a": 13}}, TypeError, "field must be a mope_fast.ReceptiveField, got dict"),
        ({"field": INTERVALS.mask()}, TypeError, "field must be a mope_fast.ReceptiveField, got Tensor"),
        (
            {"field": field("a2 b3", a="a", b="b")}, ValueError,
            r"the field has 2 \+ 3 = 5 positions, but q has 13 and k 13: make them equal",
        ),
        (
            {"q": lambda a: a["q"][:, :, :4]}, ValueError,
            r"the field has 2 \+ 5 \+ 5 \+ 1 = 13 positions, but q has 4 and k 13: make them equal",
        ),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call("receptive_field_attention", **changes)


def test_a_mask_that_is_given_again_counts_as_it_is_now():
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM) for _ in range(3))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    for _ in range(2):
        got = functional.prompt_attention(q, k, v, [(k, v)], key_padding_mask=mask, impl="sdpa")
        torch.testing.assert_close(got, functional.prompt_attention(q, k, v, [(k, v)], key_padding_mask=mask, impl="reference"))
        mask.numpy()[:, 1:4] = False  # which torch doesn't count
    assert not vars(mask)
