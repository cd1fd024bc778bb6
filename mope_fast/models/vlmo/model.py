"""VLMo: one transformer for text, images and both, with a feed-forward expert for each (arXiv 2111.02358)."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...encoders.families import check_text
from .checkpoint import load_into, read_state_dict, recognised
from .config import VLMoConfig
from .layers import NORM_EPS, MaskedWords, Pooler, TextEmbeddings, Visibility, VLMoBlock, row_of
from .positions import position_index, table_rows

_INIT_STD = 0.02


class VLMoOutput(NamedTuple):
    """Hidden states after the final norm; None for a modality that wasn't given."""

    text: Tensor | None
    """(B, T, D), class token first."""
    image: Tensor | None
    """(B, I, D), class token first, then patches in row order."""
    pooled: Tensor | None
    """(B, D), the pooler on the text's class token; only for a joint pass."""


class VLMo(nn.Module):
    """A VLMo encoder whose state dict uses the official checkpoints' names, so that these load unchanged.

    Attention comes from :mod:`mope_fast.functional`. The encoder is trained like any module; drop path and the dropout of text
    embeddings are active in training mode.

    Args:
        config: the architecture, see :meth:`from_config`.
        impl: attention implementation: "auto", or one of :func:`mope_fast.functional.prompt_attention`.

    Example:
        >>> vlmo = VLMo.from_checkpoint("vlmo_base_plus_patch16_224.pt")        # or VLMo.from_config("base_plus")
        >>> inputs = VLMoProcessor(tokenizer)(texts, images)
        >>> vlmo(**inputs).pooled                                               # (B, 544)
    """

    def __init__(self, config: VLMoConfig, *, impl: str = "auto"):
        if not isinstance(config, VLMoConfig):
            raise TypeError(f"config must be a VLMoConfig, got {config!r}: use VLMo.from_config for names")
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.transformer = _Transformer(config, impl)
        self.text_embeddings = TextEmbeddings(config)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.pooler = Pooler(width)
        self.mlm_score = MaskedWords(config) if config.mlm_head else None
        self.relative_position_bias_table = None
        if not config.absolute_positions:
            columns = config.num_heads * config.num_layers
            self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(config), columns))
            self.register_buffer("position_index", position_index(config), persistent=False)
        self.gradient_checkpointing = False
        """Store each layer's input instead of its activations, and recompute the layer in the backward pass."""
        self.apply(_initialize)

    @classmethod
    def from_config(cls, name: str, *, impl: str = "auto", **overrides: Any) -> "VLMo":
        """Create a randomly initialised VLMo of a known size.

        Args:
            name: "base" (175 M parameters), "base_plus" (167 M) or "large" (562 M).
            impl: attention implementation, as for the class.
            overrides: values for fields of :class:`VLMoConfig`.

        Raises:
            ValueError: the name is unknown, or values are incompatible.
        """
        return cls(VLMoConfig.named(name, **overrides), impl=impl)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        config: VLMoConfig | None = None,
        *,
        impl: str = "auto",
        strict: bool = True,
        **overrides: Any,
    ) -> "VLMo":
        """Load an official checkpoint, or a pre-trained or fine-tuned BEiT checkpoint for the image side (``strict=False``).

        Position embeddings are interpolated to another image size, and those of text are cut to ``max_text_length``. Pre-training
        heads are left out, except ``mlm_score`` with ``mlm_head=True``. Only tensors are read from the file, never code.

        Args:
            path: a ``torch.save`` or safetensors file, with tensors at the top level or under "state_dict", "module" or "model".
            config: the architecture; None to infer it from the width and number of layers in the file.
            impl: attention implementation, as for the class.
            strict: refuse a file with missing or unknown entries; otherwise warn, and leave missing parameters random.
            overrides: values for fields of :class:`VLMoConfig` that differ from those of the known size, such as ``image_size``.

        Raises:
            FileNotFoundError: there is no such file.
            PermissionError: the file may not be read.
            TypeError: ``config`` is not a VLMoConfig.
            ValueError: the file is damaged, contains more than tensors, is not a VLMo checkpoint, or doesn't fit; the message
                lists every difference.
        """

        state = read_state_dict(path)
        model = cls(recognised(state, path, config, overrides), impl=impl)
        load_into(model, model.config, state, path, strict=strict)
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        vl_experts: bool = False,
        run: Callable[[Tensor | None, Tensor | None, Tensor | None], Any] | None = None,
    ) -> Any:
        """Run a joint pass over both modalities, or a pass over the one that is given.

        Args:
            input_ids: (B, T) int64, T at most ``max_text_length``.
            attention_mask: (B, T), 1 or True for real tokens; None if all tokens are real.
            pixel_values: (B, 3, image_size, image_size) float.
            vl_experts: for a pass over one modality: layers that have a vision-language expert use it (the second path of the
                pre-training) instead of the modality's own expert. A joint pass always does.
            run: a custom pass built from this model's parts, used instead of its own. It is called with the three inputs, and its
                result is returned. Hooks, FSDP and offloading of this model apply to it.

        Returns:
            A :class:`VLMoOutput`, or the result of ``run``.

        Raises:
            TypeError, ValueError: inputs have wrong types or shapes, or none are given.
        """
        if run is not None:
            return run(input_ids, attention_mask, pixel_values)
        parts = []
        if input_ids is not None:
            parts.append(("text", self.embed_text(input_ids)))
        if pixel_values is not None:
            parts.append(("imag", self.embed_image(pixel_values)))
        if not parts:
            raise ValueError("VLMo got neither input_ids nor pixel_values: give one of them, or both for a joint pass")
        text = 0 if input_ids is None else input_ids.shape[1]
        image = 0 if pixel_values is None else self.config.image_tokens
        check_same_batch(input_ids, pixel_values)
        mask = self.key_padding_mask(attention_mask, input_ids, after=image)
        biases = self.position_biases(text, image)
        x = torch.cat([part for _, part in parts], dim=1)
        joint = len(parts) == 2
        own, fused = {name: part.shape[1] for name, part in parts}, {"vl": x.shape[1]}
        for block, bias in zip(self.transformer.blocks, biases, strict=True):
            x = self.run_block(block, x, Visibility(mask, bias=bias), fused if block.fusion and (joint or vl_experts) else own)
        x = self.transformer.norm(x)
        return VLMoOutput(
            text=x[:, :text] if text else None,
            image=x[:, text:] if image else None,
            pooled=self.pooler(x[:, 0]) if joint else None,
        )

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embed token ids (B, T) int64 -> (B, T, D), the input of the first layer."""
        _check_text(input_ids, self.config)
        return self.text_embeddings(input_ids) + row_of(self.token_type_embeddings, 0, input_ids.device)

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Embed images (B, 3, image_size, image_size) -> (B, I, D), the input of the first layer."""
        _check_image(pixel_values, self.config)
        return self.transformer(pixel_values) + row_of(self.token_type_embeddings, 1, pixel_values.device)

    def key_padding_mask(
        self, attention_mask: Tensor | None, input_ids: Tensor | None, *, before: int = 0, after: int
    ) -> Tensor | None:
        """Return a bool mask (B, before + T + after), the text's mask padded with True; None if all keys are real."""
        if attention_mask is None:
            return None
        if input_ids is None:
            raise ValueError("attention_mask belongs to the text: give input_ids with it, or leave it out")
        check_text({"input_ids": input_ids, "attention_mask": attention_mask})
        return F.pad(attention_mask.bool(), (before, after), value=True)

    def position_biases(
        self, text: int, image: int, *, before: int = 0, after: int = 0, layers: range | None = None
    ) -> Sequence[Tensor | None]:
        """Return each layer's position bias (1, H, S, S) for ``text`` and ``image`` tokens; it is zero for tokens before and after.

        Entries are None for a model with absolute positions. ``layers`` is a range of consecutive layers; None for all.
        """
        table, config = self.relative_position_bias_table, self.config
        layers = range(config.num_layers) if layers is None else layers
        if table is None:
            return [None] * len(layers)
        table = table[:, layers.start * config.num_heads : layers.stop * config.num_heads]
        parts = slice(text), slice(config.max_text_length, config.max_text_length + image)
        index = torch.cat([torch.cat([self.position_index[rows, columns] for columns in parts], dim=1) for rows in parts])
        # the table has no entries for prompts, so their rows and columns index a zero row appended to it
        index = F.pad(index, (before, after, before, after), value=len(table))
        bias = F.embedding(index, F.pad(table, (0, 0, 0, 1))).permute(2, 0, 1).contiguous()
        return bias.unflatten(0, (len(layers), 1, config.num_heads)).unbind()

    def run_block(self, block: VLMoBlock, x: Tensor, sees: Visibility, experts: dict[str, int]) -> Tensor:
        """Run a layer, storing its activations or, with gradient checkpointing, only its input."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, sees, experts, use_reentrant=False)
        return block(x, sees, experts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VLMo":
        super()._apply(fn, recurse)
        if not self.config.absolute_positions:  # to_empty leaves this buffer uninitialised, and it is not in the state dict
            self.position_index = position_index(self.config).to(self.position_index.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())


class _Transformer(nn.Module):
    """Patch embedding, layers and final norm, under their names in official checkpoints."""

    def __init__(self, config: VLMoConfig, impl: str):
        from timm.layers import PatchEmbed

        super().__init__()
        width, layers = config.hidden_size, config.num_layers
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, embed_dim=width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, config.image_tokens, width)) if config.absolute_positions else None
        rates = [config.drop_path_rate * index / max(1, layers - 1) for index in range(layers)]
        self.blocks = nn.ModuleList(
            VLMoBlock(config, rate, index >= config.first_fusion_layer, impl) for index, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.normal_(parameter, std=_INIT_STD)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed patches only; the layers are called one by one elsewhere."""
        patches = self.patch_embed(pixel_values)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed


def _initialize(module: nn.Module) -> None:
    """Initialise as VLMo does; its truncation at +-2 is a hundred standard deviations, so a plain normal is used."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def check_same_batch(input_ids: Tensor | None, pixel_values: Tensor | None) -> None:
    """Raise ValueError if the two modalities have different numbers of samples."""
    if input_ids is not None and pixel_values is not None and len(input_ids) != len(pixel_values):
        raise ValueError(f"text and image must have the same number of samples, got {len(input_ids)} and {len(pixel_values)}")


def _check_text(input_ids: Tensor, config: VLMoConfig) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 tensor (B, T), got {got}: VLMoProcessor creates it from text")
    if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= config.max_text_length:
        raise ValueError(
            f"input_ids must be (B, T) with 1 to {config.max_text_length} tokens, got {tuple(input_ids.shape)}: truncate them "
            "(VLMoProcessor.of(vlmo, tokenizer) does)"
        )


def _check_image(pixel_values: Tensor, config: VLMoConfig) -> None:
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values must be a float tensor (B, 3, H, W), got {got}: VLMoProcessor creates it from images")
    side = config.image_size
    if pixel_values.dim() != 4 or pixel_values.shape[1:] != (3, side, side):
        raise ValueError(
            f"pixel_values must be (B, 3, {side}, {side}), got {tuple(pixel_values.shape)}: resize the images, or load the "
            "checkpoint with image_size=..."
        )
