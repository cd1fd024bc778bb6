"""``mope_fast::window_prompt_attention`` and its backward on a CPU, in torch's own ops.

Some images at a time (one, if it is large) go through scratch memory that is used again, so that hardly a page is touched for the
first time. One gather of rows of Dh numbers rolls, pads, partitions and puts heads first, all at once. Keys of a window are
[tokens | prompts | nothing], a multiple of 16: softmax and products are fast with such lengths. Formulas are those of
``kernels/window_attention.py``; in float32 seams hide, because exp(-100) is a denormal number there, which CPUs are slow with.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.window_attention import SEAM, window_bias, windows_of

KEY_MULTIPLE = 16
"""Keys are padded to a multiple of this: on a CPU 64 of them take torch's kernels half the time of 62."""
LOGITS_AT_ONCE = 2**18
"""For each thread: 1 MiB in float32."""
CPU = torch.device("cpu")


def seam_of(image: Tensor) -> float:
    """SEAM; -inf on a CPU below float64: exp(-100) is a denormal number there, with which a backward pass takes thrice as long."""
    return -math.inf if image.device.type == "cpu" and image.dtype != torch.float64 else SEAM


class _Rows(NamedTuple):
    """Which row of Dh numbers goes where, for some images. Scratch is [queries | keys | values], by image, window and head."""

    gather_qkv: Tensor
    """Of packed qkv, for each row of scratch; 0 where no token belongs."""
    scatter_qkv: Tensor
    """Of scratch, for each row of packed qkv."""
    gather_out: Tensor
    """Of the image (tokens, H), for each row of the queries; 0 where no token belongs."""
    scatter_out: Tensor
    """Of the queries, for each row of the image."""
    padding: Tensor
    """Of scratch, where padding belongs."""
    of_padding: Tensor
    """Of ``pad_qkv`` (3, H), for each row of padding."""


@functools.lru_cache(maxsize=32)  # a Swin has up to 14 for one size of image, of 1 to 20 MB each
def _rows(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], heads: int, keys: int, images: int
) -> _Rows:  # fmt: skip
    tokens, _ = windows_of(*size, window, shift, CPU)
    number, (windows, area) = size[0] * size[1], tokens.shape
    image, head = torch.arange(images, device=CPU)[:, None, None, None], torch.arange(heads, device=CPU)[:, None]
    here = (tokens < number)[:, None].expand(images, windows, heads, area)
    in_image = (image * number + tokens[:, None]) * heads + head
    wanted, places, sources, start = [], [], [], 0
    for part, length in enumerate((area, keys, keys)):
        place = start + torch.arange(here[..., 0].numel() * length, device=CPU).view(images, windows, heads, length)
        source = ((image * number + tokens[:, None]) * 3 + part) * heads + head
        wanted.append(F.pad(source.where(here, 0), (0, length - area)).flatten())
        places.append(place[..., :area])
        sources.append(source)
        start += place.numel()
    back, scatter_out = (torch.empty(images * number * heads * parts, dtype=torch.int64, device=CPU) for parts in (3, 1))
    for place, source in zip(places, sources, strict=True):
        back[source[here]] = place[here]
    scatter_out[in_image[here]] = places[0][here]
    of_padding = [(part * heads + head).expand(images, windows, -1, area)[~here] for part in range(3)]
    padding = torch.cat([place[~here] for place in places])
    of_tokens = (torch.cat(wanted), back, in_image.where(here, 0).flatten(), scatter_out)
    gather_qkv, scatter_qkv, gather_out, scatter_out = (rows.int() for rows in of_tokens)
    return _Rows(gather_qkv, scatter_qkv, gather_out, scatter_out, padding, torch.cat(of_padding))


class _Scratch:
    """For some images: rows, and views of them as queries, keys and values (images * windows * H, W or keys, Dh)."""

    def __init__(self, call: "Call", images: int):
        _, height, width, _, heads, head_dim = call.shape
        each = (images, call.windows, heads)
        self.at = _rows((height, width), call.window, call.shift, heads, call.keys, images)
        self.rows = call.qkv.new_empty(len(self.at.gather_qkv), head_dim)
        products = math.prod(each)
        sizes = [products * call.area, products * call.keys, products * call.keys]
        self.q, self.k, self.v = (part.view(products, -1, head_dim) for part in self.rows.split(sizes))
        self.queries = self.rows[: sizes[0]]
        # (2, images, windows, H, keys - W, Dh)
        self.prompts = self.rows[sizes[0] :].view(2, *each, call.keys, head_dim)[..., call.area :, :]


def _images_at_once(batch: int, logits: int) -> int:
    """Of ``batch``, with so many logits each."""
    return max(1, min(batch, round(LOGITS_AT_ONCE * torch.get_num_threads() / logits)))


class Call:
    """What one forward or backward needs for all images."""

    def __init__(self, qkv, prefixes: Sequence[tuple[Tensor, Tensor]], prefix_mask, bias, pad_qkv, window_size, shift_size, scale):
        batch, height, width, _, heads, head_dim = self.shape = qkv.shape
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        self.window, self.shift, self.scale, self.prefix_mask = tuple(window_size), tuple(shift_size), scale, prefix_mask
        self.windows = -(-height // self.window[0]) * -(-width // self.window[1])
        self.area = self.window[0] * self.window[1]
        self.lengths = [pk.shape[2] for pk, _ in prefixes]
        self.keys = -(-(self.area + sum(self.lengths)) // KEY_MULTIPLE) * KEY_MULTIPLE
        self.qkv = qkv.to(dtype).reshape(batch, height * width * 3 * heads, head_dim)
        self.pad_rows = None if pad_qkv is None else pad_qkv.to(qkv.dtype).to(dtype).reshape(-1, head_dim)
        self.prompts = self.qkv.new_zeros(2, batch, heads, self.keys - self.area, head_dim)
        for side in range(2):
            parts = self.prompts[side, :, :, : sum(self.lengths)].split(self.lengths, dim=2) if prefixes else ()
            for part, prefix in zip(parts, prefixes, strict=True):
                part.copy_(prefix[side])
        if prefix_mask is not None:
            self.prompts[:, :, :, : sum(self.lengths)].masked_fill_(~prefix_mask[:, None, :, None], 0.0)
        mask = bias.to(dtype)[None]
        if any(self.shift):
            _, regions = windows_of(height, width, self.window, self.shift, CPU)
            mask = window_bias(mask[0], regions, seam_of(self.qkv))
        mask = F.pad(mask, (0, sum(self.lengths)))
        self.mask = F.pad(mask, (0, self.keys - mask.shape[-1]), value=-math.inf)  # (1 or windows, H, W, keys)
        # only a bias can hide all keys there are
        self.may_be_fully_masked = not sum(self.lengths) or prefix_mask is not None

    def chunks(self) -> Iterator[tuple[slice, _Scratch, Tensor]]:
        """Images, their rows in scratch memory, and memory for their logits (images * windows * H, W, keys)."""
        batch, heads = self.shape[0], self.shape[4]
        images = _images_at_once(batch, self.windows * heads * self.area * self.keys)
        scratch = None
        for start in range(0, batch, images):
            own = slice(start, min(batch, start + images))
            number = own.stop - own.start
            if scratch is None or number < images:
                scratch = _Scratch(self, number)
                weights = self.qkv.new_empty(number * self.windows * heads, self.area, self.keys)
            self._load(own, scratch)
            yield own, scratch, self._softmax(own, scratch, weights)

    def _load(self, own: slice, scratch: _Scratch) -> None:
        at = scratch.at
        torch.index_select(self.qkv[own].flatten(0, 1), 0, at.gather_qkv, out=scratch.rows)
        if len(at.padding) and self.pad_rows is not None:
            scratch.rows.index_copy_(0, at.padding, self.pad_rows[at.of_padding])
        elif len(at.padding):
            scratch.rows.index_fill_(0, at.padding, 0.0)
        scratch.prompts.copy_(self.prompts[:, own, None])

    def _softmax(self, own: slice, scratch: _Scratch, logits: Tensor) -> Tensor:
        """p, in place of the logits; 0 for a query that sees no key."""
        images = own.stop - own.start
        masked = logits.view(images, self.windows, -1, self.area, self.keys)
        masked.copy_(self.mask)
        if self.prefix_mask is not None:
            to_prompts = masked[..., self.area : self.area + sum(self.lengths)]
            to_prompts.masked_fill_(~self.prefix_mask[own][:, None, None, None], -math.inf)
        fully_masked = (logits == -math.inf).all(-1, keepdim=True) if self.may_be_fully_masked else None
        logits.baddbmm_(scratch.q, scratch.k.mT, alpha=self.scale)
        torch.softmax(logits, -1, out=logits)
        return logits if fully_masked is None else logits.masked_fill_(fully_masked, 0.0)


def forward(call: Call) -> Tensor:
    """(B, Hi, Wi, H * Dh) in float32 (float64 for float64)."""
    batch, height, width, _, heads, head_dim = call.shape
    out = call.qkv.new_empty(batch, height, width, heads * head_dim)
    windows = None
    for own, scratch, weights in call.chunks():
        if windows is None or len(windows) != len(weights):
            windows = torch.empty_like(scratch.q)
        torch.bmm(weights, scratch.v, out=windows)
        torch.index_select(windows.view(-1, head_dim), 0, scratch.at.scatter_out, out=out[own].view(-1, head_dim))
    return out


class Gradients(NamedTuple):
    """What was asked for, else None, in float32 (float64 for float64)."""

    qkv: Tensor | None
    prefixes: list[Tensor]
    """(2, B, H, P, Dh) each, keys before values."""
    bias: Tensor | None
    padding: Tensor | None


def backward(grad_out: Tensor, call: Call, *, of_tokens: bool, of_bias: bool, of_padding: bool) -> Gradients:
    heads, head_dim = call.shape[-2:]
    upstream = grad_out.to(call.qkv.dtype).reshape(call.shape[0], call.shape[1] * call.shape[2] * heads, head_dim)
    to_qkv = call.qkv.new_empty(call.shape) if of_tokens else None
    to_prompts = torch.empty_like(call.prompts)
    to_bias = call.qkv.new_zeros(heads, call.area, call.area) if of_bias else None
    to_padding = call.qkv.new_zeros(3 * heads, head_dim) if of_padding else None
    grads = None
    for own, scratch, weights in call.chunks():
        if grads is None or len(grads.rows) != len(scratch.rows):
            grads, grad_logits, g = _Scratch(call, own.stop - own.start), torch.empty_like(weights), torch.empty_like(scratch.q)
            padded_queries = scratch.at.padding[scratch.at.padding < len(scratch.queries)]
        g_rows = g.view_as(scratch.queries)
        torch.index_select(upstream[own].flatten(0, 1), 0, scratch.at.gather_out, out=g_rows)
        g_rows.index_fill_(0, padded_queries, 0.0)  # what they give is cut off
        torch.bmm(weights.mT, g, out=grads.v)
        torch.bmm(g, scratch.v.mT, out=grad_logits)
        ds = torch._softmax_backward_data(grad_logits, weights, -1, weights.dtype, grad_input=grad_logits)
        torch.baddbmm(grads.k, ds.mT, scratch.q, beta=0, alpha=call.scale, out=grads.k)
        torch.sum(grads.prompts, 2, out=to_prompts[:, own])
        if to_qkv is not None:
            torch.baddbmm(grads.q, ds, scratch.k, beta=0, alpha=call.scale, out=grads.q)
            torch.index_select(grads.rows, 0, scratch.at.scatter_qkv, out=to_qkv[own].view(-1, head_dim))
        if to_bias is not None:
            to_bias += ds.view(-1, heads, call.area, call.keys)[..., : call.area].sum(0)
        if to_padding is not None:  # queries of padding ask nothing
            places = scratch.at.padding[len(padded_queries) :]
            to_padding.index_add_(0, scratch.at.of_padding[len(padded_queries) :], grads.rows[places])
    prefixes = to_prompts[:, :, :, : sum(call.lengths)].split(call.lengths, dim=3) if call.lengths else ()
    return Gradients(to_qkv, list(prefixes), to_bias, None if to_padding is None else to_padding.view(3, heads, head_dim))
