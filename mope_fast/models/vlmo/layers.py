"""VLMo's layers: shared attention, and one feed-forward expert for each modality."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...modules.norms import is_plain
from ...receptive_field import ReceptiveField
from .config import VLMoConfig

NORM_EPS = 1e-6


class Visibility(NamedTuple):
    """The masks and the attention bias of one layer."""

    key_padding_mask: Tensor | None = None
    """(B, S) bool, True for real tokens."""
    field: ReceptiveField | None = None
    """The receptive field; None if every query sees all keys."""
    bias: Tensor | None = None
    """(1, H, S, S), added to the attention logits."""


class VLMoAttention(nn.Module):
    """Self-attention shared by all modalities; queries and values have a bias, keys have none.

    Parameters and names are those of timm's BEiT ``Attention``. There is no dropout.
    """

    def __init__(self, config: VLMoConfig, impl: str):
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.impl = config.num_heads, impl
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sees: Visibility) -> Tensor:
        """Apply self-attention, (B, S, D) -> (B, S, D)."""
        q, k, v = self._project(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(self.attend(q, k, v, sees).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sees: Visibility) -> Tensor:
        """Apply attention to q, k and v, (B, H, S, Dh) each -> (B, H, S, Dh)."""
        masking = {"key_padding_mask": sees.key_padding_mask, "bias": sees.bias, "impl": self.impl}
        if sees.field is None:
            return functional.prompt_attention(q, k, v, **masking)
        return functional.receptive_field_attention(q, k, v, sees.field, **masking)

    def _project(self, x: Tensor) -> Tensor:
        qkv, bias = self.qkv, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if type(qkv) is nn.Linear and qkv.bias is None and is_plain(qkv):
            return F.linear(x, qkv.weight, bias)
        return qkv(x) + bias  # a replaced module (with a LoRA, hooks or its own bias) is called instead of reading its weight


class VLMoBlock(nn.Module):
    """A pre-norm transformer layer whose feed-forward expert depends on the modality of the token.

    Args:
        config: the architecture, see :class:`VLMoConfig`.
        drop_path: probability that a sample skips a branch in training mode.
        fusion: whether the layer has a vision-language expert in addition to those of text and image.
        impl: attention implementation.
    """

    def __init__(self, config: VLMoConfig, drop_path: float, fusion: bool, impl: str):
        from timm.layers import DropPath, Mlp

        def expert() -> tuple[nn.Module, nn.Module]:
            return nn.LayerNorm(width, eps=NORM_EPS), Mlp(width, config.mlp_ratio * width)

        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = VLMoAttention(config, impl)
        self.norm2_text, self.mlp_text = expert()
        self.norm2_imag, self.mlp_imag = expert()
        if fusion:
            self.norm2_vl, self.mlp_vl = expert()
        self.fusion = fusion
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        if config.layer_scale is None:
            self.gamma_1 = self.gamma_2 = None
        else:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), config.layer_scale)) for _ in range(2))

    def forward(self, x: Tensor, sees: Visibility, experts: dict[str, int]) -> Tensor:
        """Run one layer, (B, S, D) -> (B, S, D).

        Args:
            x: (B, S, D) hidden states.
            sees: masks and bias of the attention.
            experts: "text", "imag" or "vl" -> number of tokens for this expert, in the order of the sequence; the sum is S.
        """
        x = x + self._scaled(self.attn(self.norm1(x), sees), self.gamma_1)
        parts = zip(experts, x.split(list(experts.values()), dim=1), strict=True)
        out = [part + self._expert(name, part) for name, part in parts]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def _expert(self, name: str, x: Tensor) -> Tensor:
        # drop path is sampled separately for each modality, as in the official code
        return self._scaled(getattr(self, f"mlp_{name}")(getattr(self, f"norm2_{name}")(x)), self.gamma_2)

    def _scaled(self, branch: Tensor, gamma: Tensor | None) -> Tensor:
        return self.drop_path(branch if gamma is None else gamma * branch)


def row_of(embedding: nn.Embedding, index: int, device: torch.device) -> Tensor:
    """Return a row (D,). The module is called rather than its weight read, because the weight may be offloaded until the call."""
    return embedding(torch.full((), index, dtype=torch.int64, device=device))


class TextEmbeddings(nn.Module):
    """BERT's embeddings with optional positions; models with relative positions save the position table but don't add it."""

    def __init__(self, config: VLMoConfig):
        super().__init__()
        width = config.hidden_size
        self.absolute_positions = config.absolute_positions
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_text_length, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.drop_path_rate)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed token ids, (B, T) int64 -> (B, T, D)."""
        x = self.word_embeddings(input_ids) + row_of(self.token_type_embeddings, 0, input_ids.device)
        if self.absolute_positions:
            x = x + self.position_embeddings(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.dropout(self.LayerNorm(x))


class Pooler(nn.Module):
    """The pooler that pre-training applies to the text's class token."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the pooler, (B, D) -> (B, D)."""
        return self.dense(x).tanh()


class MaskedWords(nn.Module):
    """The masked language modelling head of pre-training: BERT's, whose decoder has a separate bias."""

    def __init__(self, config: VLMoConfig):
        super().__init__()
        width = config.hidden_size
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        self.decoder = nn.Linear(width, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return vocabulary logits, (..., D) -> (..., vocabulary)."""
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x)))) + self.bias
