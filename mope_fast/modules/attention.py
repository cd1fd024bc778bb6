"""Self-attention with packed weights whose queries also see prompts, or a restricted receptive field."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._autocast import cast
from .._checks import MAX_HEAD_DIM, check_window
from .._settings import checked
from ..receptive_field import ReceptiveField
from .tables import Prefix

_CHILDREN = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
"""Of timm's Attention; ``norm`` and ``gate`` are younger than the others."""


class PromptAttention(nn.Module):
    """Multi-head self-attention on :func:`mope_fast.functional.prompt_attention`, a drop-in for timm's ``Attention``.

    It has the parameters, the names in the state dict and the constructor of ``timm.layers.Attention``, so it can be a timm
    model's ``attn_layer`` or replace the attention of a loaded one (:meth:`from_attention`). On top it takes key/value prefixes,
    a padding mask, a bias and a receptive field. There is no dropout, in training mode neither: frozen encoders are in eval mode.

    Args:
        dim: D, width of the input.
        num_heads: H.
        attn_head_dim: Dh, at most 256; default D / H.
        dim_out: width of the output, default D.
        qkv_bias: of ``qkv`` and ``gate``.
        qk_norm: norm queries and keys, over Dh.
        scale_norm: norm the attended values, over H * Dh, before ``proj``.
        proj_bias: of ``proj``.
        gated: multiply the attended values by a sigmoid gate that is linear in the input.
        attn_drop, proj_drop: 0 only. They are here because timm's blocks pass them.
        norm_layer: width -> norm, for ``qk_norm`` and ``scale_norm``.
        device, dtype: of the parameters.
        impl: "auto", or an implementation of :func:`mope_fast.functional.prompt_attention`.
        num_kv_heads: Hkv, heads of keys and values, a divisor of H; default H. ``qkv`` gives H heads of queries, then Hkv of keys
            and Hkv of values.
        window: (left, right), how many tokens before and behind it each token sees, None for no limit; None sees all.

    Raises:
        TypeError: ``window`` is no pair of integers or None.
        ValueError: D is no multiple of H or H none of Hkv, Dh is above 256, a norm is asked for without ``norm_layer``, a dropout
            is not 0, or a limit of the window is below 0.

    Examples:
        >>> for block in vit.blocks:                                          # a timm VisionTransformer
        ...     block.attn = PromptAttention.from_attention(block.attn)       # same parameters, same output
        >>> attention, norm = vit.blocks[0].attn, vit.blocks[0].norm1
        >>> y = attention(norm(x), [attention.prefix(norm(prompts))])         # x (B, S, D), prompts (1 or B, P, D)
        >>> prefixes = out.key_value(norm, attention.k_proj, attention.v_proj, attention.num_kv_heads, key_norm=attention.key_norm)
        >>> y = attention(norm(x), prefixes)                                  # out is a MoPEOutput
    """

    @checked
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
        num_kv_heads: int | None = None,
        window: tuple[int | None, int | None] | None = None,
    ):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be >= 1, got {num_heads}")
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}, or attn_head_dim be given")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer, nn.LayerNorm for example")
        if attn_drop or proj_drop:
            raise ValueError(
                f"PromptAttention has no dropout, got attn_drop={attn_drop} and proj_drop={proj_drop}: leave them at 0"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must be a divisor of num_heads={num_heads}, got {num_kv_heads}")
        check_window(window)
        self.window = None if window is None else tuple(window)
        self.head_dim = _checked_head_dim(dim // num_heads if attn_head_dim is None else attn_head_dim)
        self.impl = impl
        factory = {"device": device, "dtype": dtype}
        width = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, width + 2 * self.num_kv_heads * self.head_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.norm = norm_layer(width, **factory) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, width, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(width, dim_out or dim, bias=proj_bias, **factory)

    @classmethod
    def from_attention(cls, attention: nn.Module, *, impl: str = "auto", ignore_dropout: bool = False) -> "PromptAttention":
        """The same attention on the parameters of a timm ``Attention``: shared, not copied.

        Args:
            attention: a timm ``Attention``, or a module with its attributes num_heads, head_dim, qkv, q_norm, k_norm and proj.
            impl: see the class.
            ignore_dropout: take one with dropout probabilities, which this module never applies: right for eval mode only.

        Raises:
            TypeError: it lacks one of these, has parts, arguments or hooks that this module does not know (rotary embeddings, ...),
                or overrides timm's ``forward``.
            ValueError: it has a dropout probability above 0, another scale than ``Dh ** -0.5``, or heads wider than 256.
        """
        name = type(attention).__name__
        required = ("num_heads", "head_dim", "qkv", "q_norm", "k_norm", "proj")
        if missing := [attribute for attribute in required if getattr(attention, attribute, None) is None]:
            raise TypeError(f"{name} has no {', '.join(missing)}: expected timm's Attention, or a module with its attributes")
        unknown = [child for child, _ in attention.named_children() if child not in _CHILDREN]
        unknown += [tensor for tensor, _ in (*attention.named_parameters(recurse=False), *attention.named_buffers(recurse=False))]
        if unknown:
            raise TypeError(f"{name} has {', '.join(unknown)}, which PromptAttention does not reproduce")
        from_timm = any(base.__module__.startswith("timm.") for base in type(attention).__mro__)
        if from_timm and not type(attention).forward.__module__.startswith("timm."):
            raise TypeError(f"{name} overrides the forward of timm's Attention, which PromptAttention can't be known to reproduce")
        if attention._forward_hooks or attention._forward_pre_hooks or attention._backward_hooks:
            raise TypeError(
                f"{name} has hooks, which PromptAttention would not run: remove them, and register them on the new module"
            )
        _, *arguments = inspect.signature(attention.forward).parameters
        if unknown := [argument for argument in arguments if argument not in inspect.signature(cls.forward).parameters]:
            raise TypeError(f"{name}.forward takes {', '.join(unknown)}, which PromptAttention does not reproduce")
        for drop in ("attn_drop", "proj_drop"):
            if not ignore_dropout and (probability := getattr(getattr(attention, drop, None), "p", 0.0)):
                raise ValueError(f"PromptAttention has no dropout, {name}.{drop}.p is {probability}: set it to 0 (as in eval mode)")
        head_dim = _checked_head_dim(attention.head_dim)
        if not math.isclose(scale := getattr(attention, "scale", head_dim**-0.5), head_dim**-0.5):
            raise ValueError(f"{name}.scale is {scale}, PromptAttention scales by head_dim ** -0.5 = {head_dim**-0.5}")

        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.num_heads, module.head_dim, module.impl = attention.num_heads, head_dim, impl
        ours = isinstance(attention, PromptAttention)
        module.num_kv_heads, module.window = (attention.num_kv_heads, attention.window) if ours else (attention.num_heads, None)
        module.qkv, module.q_norm, module.k_norm = attention.qkv, attention.q_norm, attention.k_norm
        module.norm = getattr(attention, "norm", nn.Identity())
        module.gate = getattr(attention, "gate", None)
        module.proj = attention.proj
        module.training = attention.training
        return module

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle from before windows and shared keys, too."""
        super().__setstate__({"num_kv_heads": state["num_heads"], "window": None, **state})

    @property
    def key_norm(self) -> nn.Module | None:
        """``k_norm``, None where it is the identity: for ``MoPEOutput.key_value``, which can mix keys only if no norm follows."""
        return None if isinstance(self.k_norm, nn.Identity) else self.k_norm

    def k_proj(self, rows: Tensor) -> Tensor:
        """Keys (..., Hkv * Dh) of rows (..., D), before ``k_norm``. Like ``v_proj``, all of ``qkv``: that may be any module."""
        return self._split(rows)[1]

    def v_proj(self, rows: Tensor) -> Tensor:
        """Values (..., Hkv * Dh) of rows (..., D)."""
        return self._split(rows)[2]

    def prefix(self, prompts: Tensor) -> Prefix:
        """Prompts as a prefix of this attention: their key and value, (B or 1, Hkv, P, Dh) each.

        Args:
            prompts: (B or 1, P, D), through the norm before the attention, as its input is.
        """
        _, key, value = self._heads("prompts", prompts)
        return self.k_norm(key).to(value.dtype), value

    def forward(
        self,
        x: Tensor,
        prefixes: Sequence[Prefix] = (),
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        bias: Tensor | None = None,
        field: ReceptiveField | None = None,
    ) -> Tensor:
        """Attention of the tokens to prefixes and tokens; masks and bias are about tokens.

        Args:
            x: (B, S, D).
            prefixes: up to two (key, value) pairs (B or 1, Hkv, P, Dh), see :meth:`prefix`.
            attn_mask: as torch's ``scaled_dot_product_attention`` takes it, in place of ``key_padding_mask`` and ``bias``:
                whatever broadcasts to (B, H, S, S), bool with True = visible, or float to be added. Timm's blocks pass it.
            is_causal: query i sees the tokens up to i, of those that masks leave visible.
            key_padding_mask: (B, S) bool, True = a real token.
            bias: (B or 1, H or 1, S, S), added to the scaled products.
            field: which tokens see which; not with prefixes, ``is_causal`` or a window.

        Returns:
            (B, S, dim_out). A token that sees nothing attends to zeros.
        """
        if field is not None and (is_causal or len(prefixes) or self.window is not None):
            raise ValueError(
                "field takes no prefixes, is_causal or window: put the prompts into the sequence as groups of the field"
            )
        q, k, v = self.queries_keys_values(x)
        if attn_mask is not None:
            if key_padding_mask is not None or bias is not None:
                raise ValueError("attn_mask stands for key_padding_mask or bias: pass them, or attn_mask alone")
            key_padding_mask, bias = split_attn_mask(attn_mask, q)
        masking = {"key_padding_mask": key_padding_mask, "bias": bias, "impl": self.impl}
        if field is None:
            out = functional.prompt_attention(q, k, v, prefixes, is_causal=is_causal, window=self.window, **masking)
        else:
            out = functional.receptive_field_attention(q, k, v, field, **masking)
        return self.output(out, x)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> what attention takes, q (B, H, S, Dh), k and v (B, Hkv, S, Dh), normed."""
        q, k, v = self._heads("x", x)
        # under autocast a norm may answer in float32
        return cast(self.q_norm(q), v.dtype), cast(self.k_norm(k), v.dtype), v

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        """What attention gave (B, H, S, Dh) for x (B, S, D) -> (B, S, dim_out)."""
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())

    def _heads(self, name: str, rows: Tensor) -> tuple[Tensor, ...]:
        """(B, S, D) -> query (B, H, S, Dh), key and value (B, Hkv, S, Dh), before their norms."""
        if rows.dim() != 3:
            raise ValueError(f"{name} must be (B, {'P' if name == 'prompts' else 'S'}, D), got {tuple(rows.shape)}")
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self._split(rows))

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        key_width = self.num_kv_heads * self.head_dim
        return self.qkv(rows).split([self.num_heads * self.head_dim, key_width, key_width], dim=-1)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}" + f", num_kv_heads={self.num_kv_heads}" * (self.num_kv_heads != self.num_heads)
        window = "" if self.window is None else f", window={self.window}"
        return f"{heads}, head_dim={self.head_dim}, impl={self.impl!r}{window}"


def _checked_head_dim(head_dim: int) -> int:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension must be 1 to {MAX_HEAD_DIM}, got {head_dim}")
    return head_dim


def split_attn_mask(attn_mask: Tensor, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask that broadcasts to (B, H, S, S) -> key_padding_mask where it is one, else bias."""
    batch, heads, tokens, _ = q.shape
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        kind = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise TypeError(f"attn_mask must be a bool or float tensor, got {kind}")
    full = (batch, heads, tokens, tokens)
    sizes = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(sizes) > 4 or any(size not in (1, of_all) for size, of_all in zip(sizes, full, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to (B, H, S, S) = {full}, got {tuple(attn_mask.shape)}; a mask (B, S) is key_padding_mask"
        )
    mask = attn_mask.reshape(sizes)
    if mask.dtype == torch.bool:
        if sizes[1] == sizes[2] == 1:
            return mask[:, 0, 0].expand(batch, tokens), None
        mask = torch.where(mask, 0.0, float("-inf")).to(q.dtype)
    return None, mask.expand(-1, -1, tokens, tokens)
