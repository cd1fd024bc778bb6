"""Block-aware fusion: attention between the prompts of two modalities where one block of layers ends (MoPE-BAF)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._settings import checked

_EPS = 1e-6
_INIT_STD = 0.02
FORMS = {
    "A": "each modality's prompt queries the other's",
    "B": "as A, but the query, and what the result is added to, is a new prompt that the next block owns",
    "C": "the other modality's prompt queries the own one, then a feed-forward layer; both prompts have one length",
    "D": "each prompt queries both prompts together",
    "E": "no attention of its own: prompts see each other in the layers behind the boundary",
    "F": "as A, but without parameters",
    "G": "as A, and the unified prompt queries both prompts where the fusion layers begin",
}
"""Readings of "cross-modal prompt attention between adjacent blocks" (arXiv 2403.11311, whose equations were not at hand)."""


class PromptFusion(nn.Module):
    """``own + MHA(LN(query), LN(context))``: one prompt takes from another.

    Args:
        width: D.
        num_heads: H, a divisor of D.
        feed_forward: a feed-forward layer with a residual behind it, as in a transformer layer.

    Raises:
        ValueError: D is no multiple of H.
    """

    @checked
    def __init__(self, width: int, num_heads: int, *, feed_forward: bool = False):
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"the width {width} must be a multiple of num_heads={num_heads}")
        self.norm_query, self.norm_context = (nn.LayerNorm(width, eps=_EPS) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.feed_forward = None
        if feed_forward:
            hidden = 4 * width
            layers = nn.LayerNorm(width, eps=_EPS), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
            self.feed_forward = nn.Sequential(*layers)
        nn.init.trunc_normal_(self.attention.in_proj_weight, std=_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, own: Tensor, query: Tensor, context: Tensor) -> Tensor:
        """(B, P, D), (B, P, D), (B, Q, D) -> (B, P, D)."""
        dtype, given = self.norm_query.weight.dtype, own.dtype  # of a float32 one on a bfloat16 encoder
        context = self.norm_context(context.to(dtype))
        out = own.to(dtype) + self.attention(self.norm_query(query.to(dtype)), context, context, need_weights=False)[0]
        out = out if self.feed_forward is None else out + self.feed_forward(out)
        return out.to(given)


class PlainPromptFusion(nn.Module):
    """The same with ``softmax(q k' / sqrt(D)) v`` of normed rows: nothing in it is trained."""

    def forward(self, own: Tensor, query: Tensor, context: Tensor) -> Tensor:
        """(B, P, D), (B, P, D), (B, Q, D) -> (B, P, D)."""
        query, context = (F.layer_norm(rows, rows.shape[-1:], eps=_EPS) for rows in (query, context))
        weights = torch.softmax(query @ context.mT / math.sqrt(query.shape[-1]), dim=-1)
        return own + weights @ context


class BlockAwareFusion(nn.Module):
    """Exchange between the text's and the image's prompt at the boundary of two blocks; other tokens stay as they are.

    Both directions start from the states in front of the boundary. arXiv 2403.11311 says that there is "cross-modal prompt
    attention" between adjacent blocks; which is a reading, see :data:`FORMS`.

    Args:
        width: D.
        num_heads: H, a divisor of D.
        form: "A" to "D" or "F" of :data:`FORMS`; "B" is A with own rows passed to ``forward``. "G" is A here.
        share_directions: one set of weights for both directions.

    Raises:
        ValueError: another form, or D is no multiple of H.
    """

    @checked
    def __init__(self, width: int, num_heads: int, form: str = "A", *, share_directions: bool = False):
        super().__init__()
        if form not in FORMS or form == "E":
            raise ValueError(f"form must be one of {[name for name in FORMS if name != 'E']}, got {form!r}")
        self.form = form

        def direction() -> nn.Module:
            return PlainPromptFusion() if form == "F" else PromptFusion(width, num_heads, feed_forward=form == "C")

        self.to_text = direction()
        self.to_image = self.to_text if share_directions else direction()

    def forward(
        self, text: Tensor, image: Tensor, own_text: Tensor | None = None, own_image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One boundary.

        Args:
            text, image: (B, P, D) and (B, Q, D), what the block in front of it made of the prompts.
            own_text, own_image: of the same shapes: what queries and is added to; None for ``text`` and ``image``.

        Returns:
            The prompts of text and image that the next block takes.

        Raises:
            ValueError: with form "C", prompts of different lengths.
        """
        if self.form == "C" and text.shape[1] != image.shape[1]:
            raise ValueError(f"form 'C' takes prompts of one length, got {text.shape[1]} and {image.shape[1]} rows")
        own_text, own_image = text if own_text is None else own_text, image if own_image is None else own_image
        return (
            self._exchange(self.to_text, own_text, text, image),
            self._exchange(self.to_image, own_image, image, text),
        )

    def _exchange(self, direction: nn.Module, own: Tensor, carried: Tensor, other: Tensor) -> Tensor:
        if self.form == "C":
            return direction(own, other, carried)
        return direction(own, own, torch.cat([carried, other], dim=1) if self.form == "D" else other)

    def extra_repr(self) -> str:
        return f"form={self.form!r}: {FORMS[self.form]}"
