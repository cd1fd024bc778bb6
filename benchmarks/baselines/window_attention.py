"""Forms of attention in windows, without prompts (timm's own) and with them; masks are made ahead of a call.

There are two starting points. A form "in windows" moves the D-wide tokens of the image into windows, as timm does before the
projection, and is then given the packed projection of those windows at no cost. The others are given the projection of the image's
tokens in image order.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.attention import Prefixes, aligned
from benchmarks.cases.window_attention import WindowCase
from mope_fast import _implementations, functional
from mope_fast.reference.window_attention import window_bias, windows_of


@dataclass(frozen=True)
class Inputs:
    """Arguments and a random upstream gradient; only arguments whose gradients the case measures require grad."""

    qkv: Tensor
    """(B, Hi, Wi, 3, H, Dh), in image order."""
    pad_qkv: Tensor | None
    """(3, H, Dh) if the size is not a multiple of the window, else None: the projection of timm's padding, which is its bias."""
    tokens: Tensor
    """(B, Hi, Wi, H * Dh), stands for the normed input of the projection."""
    windows: Tensor
    """(B * windows, W, 3 * H * Dh): ``qkv`` with its padding, in the order of windows."""
    prefixes: Prefixes
    upstream: Tensor

    @classmethod
    def random(cls, case: WindowCase, device: torch.device, mode: str) -> "Inputs":
        """Draw inputs; prefixes have tokens before heads in memory, as a projection returns them."""

        def rows(*shape: int) -> Tensor:
            return torch.randn(*shape, case.heads, case.head_dim, device=device).to(case.dtype)

        def leaf(tensor: Tensor, learned: bool = True) -> Tensor:
            return tensor.detach().requires_grad_(learned and mode != "forward")

        qkv = rows(case.batch, *case.size, 3)
        pad = rows(3)
        tokens, _ = windows_of(*case.size, (case.window,) * 2, (case.shift,) * 2, device)
        with_padding = torch.cat([qkv.flatten(1, 2), pad.expand(case.batch, 1, -1, -1, -1)], dim=1)
        windows = with_padding[:, tokens].flatten(0, 1).flatten(2)
        shared, own = case.prefixes
        lengths = ((1, shared), (case.batch, own))
        prefixes = tuple(tuple(leaf(rows(*length).transpose(1, 2)) for _ in "kv") for length in lengths)
        image, upstream = (rows(case.batch, *case.size).flatten(-2) for _ in range(2))
        qkv, image, windows = (leaf(tensor, not case.first_layer) for tensor in (qkv, image, windows))
        return cls(qkv, pad if case.padded != case.size else None, image, windows, prefixes, upstream)


Provider = Callable[[Inputs], Tensor]
"""Returns (B, Hi, Wi, H * Dh), in image order."""


class _GivenProjection(torch.autograd.Function):
    """A projection at no cost: it returns a precomputed result, and passes the queries' gradient back as the input's."""

    @staticmethod
    def forward(x: Tensor, projected: Tensor) -> Tensor:
        return projected.view_as(projected)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.width = inputs[0].shape[-1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad[..., : ctx.width], grad


class _Projection(nn.Module):
    """Replaces the projection of windows."""

    def forward(self, x: Tensor) -> Tensor:
        return _GivenProjection.apply(x, self.projected)


def timm_block(case: WindowCase, device: torch.device, attention: nn.Module | None = None) -> nn.Module:
    """Make timm's ``SwinTransformerBlock`` to run only its ``_attn`` with a given projection; with its own or other attention."""
    from timm.models.swin_transformer import SwinTransformerBlock

    width = case.heads * case.head_dim
    block = SwinTransformerBlock(width, case.size, case.heads, case.head_dim, case.window, case.shift, always_partition=True)
    block = block.to(device, case.dtype).requires_grad_(False).eval()
    block.attn.relative_position_bias_table.copy_(case.bias_table(device))
    block.attn.proj = nn.Identity()
    if attention is not None:
        block.attn = attention
    block.attn.qkv = _Projection()
    return block


def timm(case: WindowCase, device: torch.device, fused: bool) -> Provider:
    """timm's attention without prompts. ``fused``: use SDPA, which timm has off by default."""
    block = timm_block(case, device)
    block.attn.fused_attn = fused

    def attention(inputs: Inputs) -> Tensor:
        block.attn.qkv.projected = inputs.windows
        return block._attn(inputs.tokens)

    return attention


class _ConcatenatedAttention(nn.Module):
    """SDPA whose keys are the prompts of a window's image and the window; seams and bias are one mask made ahead.

    Windows are treated as samples; if their masks differ, they are treated as heads of their image, because the mask is the same
    for all images.
    """

    def __init__(self, case: WindowCase, device: torch.device):
        super().__init__()
        _, regions = windows_of(*case.size, (case.window,) * 2, (case.shift,) * 2, device)
        mask = window_bias(case.bias(device), regions) if case.shift else case.bias(device)[None]
        mask = F.pad(mask, (case.keys - case.area, 0))
        # a view into a tensor whose rows are padded to a multiple of ALIGNMENT
        self.mask = aligned(mask)[..., : case.keys].flatten(0, 1)[None]
        self.case, self.windows = case, len(regions)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = self.case.heads
        q, k, v = self.qkv(x).unflatten(-1, (3, heads, -1)).unflatten(0, (-1, self.windows)).permute(3, 0, 1, 4, 2, 5)
        keys, values = (
            [prefix[:, None].expand(len(q), self.windows, -1, -1, -1) for prefix in part]
            for part in zip(*self.prefixes, strict=True)
        )
        first, last = (1, 2) if self.case.shift else (0, 1)
        q, k, v = (part.flatten(first, last) for part in (q, torch.cat([*keys, k], dim=3), torch.cat([*values, v], dim=3)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return out.reshape(len(x), heads, self.case.area, -1).transpose(1, 2).flatten(2)


def sdpa_concat(case: WindowCase, device: torch.device) -> Provider:
    """Use timm's block with prompts concatenated to the keys of every window."""
    block = timm_block(case, device, _ConcatenatedAttention(case, device))

    def attention(inputs: Inputs) -> Tensor:
        block.attn.qkv.projected, block.attn.prefixes = inputs.windows, inputs.prefixes
        return block._attn(inputs.tokens)

    return attention


def flex_attention(case: WindowCase, device: torch.device) -> Callable[[Tensor, Tensor | None, Prefixes], Tensor]:
    """Return partition, concatenation and FlexAttention, to be compiled together; bias and seams are its ``score_mod``."""
    from torch.nn.attention.flex_attention import flex_attention

    (height, width), (rows, columns), window = case.size, case.padded, case.window
    length = case.keys - case.area
    tokens, regions = windows_of(height, width, (window,) * 2, (case.shift,) * 2, device)
    windows, bias = len(tokens), case.bias(device)
    padding = torch.ones(rows, columns, dtype=torch.bool, device=device)
    padding[:height, :width] = False

    def with_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = torch.clamp(key - length, min=0)
        added = bias[h, query, token].to(score.dtype)
        if case.shift:
            seam = regions[b % windows, query] != regions[b % windows, token]
            added = torch.where(seam, added - 100, added)
        return torch.where(key < length, score, score + added)

    def partition(x: Tensor, pad_qkv: Tensor | None) -> tuple[Tensor, ...]:
        """Return q, k, v, each (B, windows, H, W, Dh)."""
        x = torch.roll(x, (-case.shift, -case.shift), (1, 2)) if case.shift else x
        if pad_qkv is not None:
            x = F.pad(x, (0,) * 6 + (0, columns - width, 0, rows - height))
            x = torch.where(padding[:, :, None, None, None], pad_qkv, x)
        x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, rows, window, columns, window, 3, H, Dh)
        return x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(2, 3).flatten(4, 5).unbind()

    def attention(qkv: Tensor, pad_qkv: Tensor | None, prefixes: Prefixes) -> Tensor:
        q, k, v = partition(qkv, pad_qkv)
        keys, values = (
            [prefix[:, None].expand(len(q), windows, -1, -1, -1) for prefix in part] for part in zip(*prefixes, strict=True)
        )
        k, v = torch.cat([*keys, k], dim=3), torch.cat([*values, v], dim=3)
        out = flex_attention(*(part.flatten(0, 1) for part in (q, k, v)), score_mod=with_bias)
        out = out.unflatten(2, (window, window)).unflatten(0, (len(q), rows // window, -1)).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.flatten(1, 2).flatten(2, 3).flatten(3)[:, :height, :width]
        return torch.roll(out, (case.shift, case.shift), (1, 2)) if case.shift else out

    return attention


@functools.lru_cache(maxsize=1)
def flex(case: WindowCase, device: torch.device) -> Provider:
    """FlexAttention compiled for this case only; a case's modes and timings run in a row and share it."""
    torch.compiler.reset()
    compiled = torch.compile(flex_attention(case, device), fullgraph=True, dynamic=False)
    return lambda inputs: compiled(inputs.qkv, inputs.pad_qkv, inputs.prefixes)


def _mope_fast(case: WindowCase, device: torch.device, impl: str) -> Provider:
    """Use the public function, argument checks included."""
    bias = case.bias(device)
    return lambda inputs: functional.window_prompt_attention(
        inputs.qkv, inputs.prefixes, bias, window_size=case.window, shift_size=case.shift, pad_qkv=inputs.pad_qkv, impl=impl
    )


class Form(NamedTuple):
    build: Callable[[WindowCase, torch.device], Provider]
    in_windows: bool = False
    """Starts from ``tokens`` and ``windows``, not from ``qkv``."""
    prompted: bool = True

    def learned(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return the tensors that it takes gradients for, by name."""
        arguments = {"tokens": inputs.tokens, "windows": inputs.windows} if self.in_windows else {"qkv": inputs.qkv}
        if self.prompted:
            for i, (keys, values) in enumerate(inputs.prefixes):
                arguments |= {f"prefix {i} keys": keys, f"prefix {i} values": values}
        return {name: tensor for name, tensor in arguments.items() if tensor.requires_grad}


PROVIDERS = {
    "timm": Form(functools.partial(timm, fused=True), in_windows=True, prompted=False),
    "timm-eager": Form(functools.partial(timm, fused=False), in_windows=True, prompted=False),
    "sdpa-concat": Form(sdpa_concat, in_windows=True),
    "flex": Form(flex),
    "triton": Form(functools.partial(_mope_fast, impl="triton")),
    "auto": Form(functools.partial(_mope_fast, impl="auto")),
}
OURS = ("triton", "auto")


def _problem(case: WindowCase, device: torch.device) -> _implementations.Problem:
    return _implementations.Problem(device, case.dtype, case.keys, head_dim=case.head_dim)


def why_not(name: str, case: WindowCase, device: torch.device, smoke: bool) -> str | None:
    """Return why a provider isn't measured here; None if it is."""
    form = PROVIDERS[name]
    if form.in_windows and importlib.util.find_spec("timm") is None:
        return "timm is not installed"
    if case.first_layer and not form.prompted:
        return "without prompts a first layer has no gradients to measure"
    if name == "flex":
        if device.type != "cuda":
            return "FlexAttention has no backward on a CPU"
        return "a smoke run compiles nothing" if smoke else None
    if name == "triton":
        return _implementations.why_not(case.op, _problem(case, device))[name]
    return None


def implementation(name: str, case: WindowCase, device: torch.device) -> str | None:
    """Return the implementation that ``auto`` chooses."""
    return _implementations.choose(case.op, "auto", _problem(case, device)) if name == "auto" else None
