"""MoPEBAF: VLMo with prompts of text, image and both, restricted receptive fields and block-aware fusion (arXiv 2403.11311)."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders.frozen import Hold
from ...modules.block_fusion import BlockAwareFusion, PromptFusion
from ...receptive_field import ReceptiveField
from .. import checkpoint
from ..output import FusionOutput
from ..task import DENSE, TaskModel, apply_head, check_head, check_is_trained
from ..vlmo import VLMo
from ..vlmo.layers import Visibility
from ..vlmo.model import check_same_batch
from .config import GROUPS, BAFConfig
from .heads import MlpHead, Verbalizer
from .plan import check_fits, make_plan

Groups = dict[str, Tensor]
PROMPTS = tuple(name for name in GROUPS if name.endswith("_prompt"))


class MoPEBAF(TaskModel):
    """A VLMo with three groups of prompts: L- and V-Prompt in the layers before the fusion layers, VL-Prompt in the fusion layers.

    In the layers with an expert for each modality the sequence is [L-Prompt | text | image | V-Prompt]. Every group then sees
    consecutive rows, and attention needs no mask except the text's padding mask. From the first fusion layer on the sequence is
    [VL-Prompt | text | image]. Prompts are carried along as tokens: each layer reads the previous layer's outputs at prompt
    positions. With prompts of length zero and one block this is the plain VLMo.

    Args:
        vlmo: the backbone. It is trained too, unless ``config.freeze_backbone`` is set: then it is kept frozen and in eval mode.
        num_classes: number of outputs of the head; None for no head (``logits`` is None, use ``features``).
        config: see :class:`BAFConfig`; the prompt lengths have no default.
        head: a custom head, (B, D) -> (B, num_classes), used instead of ``config.head``.
        problem_type, label_smoothing: as for :class:`MoPEFusion`.

    Raises:
        TypeError, ValueError: settings are incompatible with each other or with this VLMo.

    Examples:
        >>> config = BAFConfig(text_prompt_length=10, image_prompt_length=10, unified_prompt_length=10)
        >>> model = MoPEBAF(VLMo.from_checkpoint("vlmo_base_plus_patch16_224.pt"), num_classes=2, config=config)
        >>> model(**processor(texts, images), labels=labels).loss.backward()
    """

    def __init__(
        self,
        vlmo: VLMo,
        num_classes: int | None = None,
        config: BAFConfig | None = None,
        *,
        head: nn.Module | None = None,
        problem_type: str = "single_label_classification",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        check_head(num_classes, head, problem_type, label_smoothing)
        if problem_type == DENSE:
            raise ValueError(f"problem_type={DENSE!r} needs feature maps, which a VLMo doesn't have: use MoPEFusion")
        if not isinstance(vlmo, VLMo):
            raise TypeError(f"MoPEBAF needs a VLMo, got {type(vlmo).__name__}: use VLMo.from_checkpoint or VLMo.from_config")
        if not isinstance(config, BAFConfig):
            raise TypeError(
                "MoPEBAF needs config=BAFConfig(text_prompt_length=..., image_prompt_length=..., unified_prompt_length=...), "
                f"got {type(config).__name__}"
            )
        check_fits(config, vlmo.config)
        if config.freeze_backbone:
            check_is_trained(head, vlmo)
        self.config, self.problem_type, self.label_smoothing = config, problem_type, float(label_smoothing)
        self._starts = config.block_starts(vlmo.config.num_layers, vlmo.config.first_fusion_layer)
        # built here once for each text length, because a compiled forward guards on what it reads, and these never change
        self._plans = tuple(make_plan(config, vlmo.config, text) for text in range(1, vlmo.config.max_text_length + 1))
        self._make_prompts(vlmo)
        self._make_fusions(vlmo)
        self._num_classes = num_classes
        self.head = self._make_head(vlmo, num_classes) if head is None else head
        self._hold: Hold | None = None
        self.backbone = vlmo
        if config.freeze_backbone:
            self._hold = Hold(vlmo)

    def _make_prompts(self, vlmo: VLMo) -> None:
        """Create the prompts, (1 or blocks, rows, D) each; None for length zero."""
        config, width = self.config, vlmo.config.hidden_size
        self._blocks_own_prompts = config.per_block_prompts or config.fusion_form == "B"
        for name in PROMPTS:
            length = getattr(config, f"{name}_length")
            sets = 1 + len(self._starts) if self._blocks_own_prompts and name != "unified_prompt" else 1
            start = torch.randn(sets, length, width) * config.prompt_init_std
            self.register_parameter(name, nn.Parameter(start) if length else None)

    def _make_fusions(self, vlmo: VLMo) -> None:
        """Create one fusion for each boundary if there are prompts to fuse, and one more for form G."""
        config, width = self.config, vlmo.config.hidden_size
        heads = vlmo.config.num_heads if config.fusion_heads is None else config.fusion_heads
        lengths = config.text_prompt_length, config.image_prompt_length
        count = len(self._starts) if all(lengths) and config.fusion_form != "E" else 0
        self.fusions = nn.ModuleList(
            BlockAwareFusion(width, heads, config.fusion_form, share_directions=config.share_directions)
            for _ in range(min(count, 1) if config.share_boundaries else count)
        )
        makes_unified = config.fusion_form == "G" and self._starts and any(lengths)
        self.unified_fusion = PromptFusion(width, heads) if makes_unified else None

    def _make_head(self, vlmo: VLMo, num_classes: int | None) -> nn.Module | None:
        config, width = self.config, vlmo.config.hidden_size
        if num_classes is None:
            return None
        if config.head == "verbalizer":
            if vlmo.mlm_score is None:
                raise ValueError("head='verbalizer' uses VLMo's masked language modelling head: create the VLMo with mlm_head=True")
            if len(config.verbalizer) != num_classes:
                raise ValueError(
                    f"BAFConfig.verbalizer has words for {len(config.verbalizer)} classes, but num_classes is {num_classes}"
                )
            size = vlmo.config.vocab_size
            if not 0 <= config.mask_token_id < size:
                raise ValueError(f"BAFConfig.mask_token_id={config.mask_token_id} is outside of the vocabulary, 0 to {size - 1}")
            return Verbalizer(config.verbalizer, size)
        return MlpHead(width, num_classes) if config.head == "mlp" else nn.Linear(width, num_classes)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> FusionOutput:
        """Run one joint pass over text and image.

        Args:
            input_ids: (B, T) int64, T at most VLMo's ``max_text_length``.
            attention_mask: (B, T), 1 or True for real tokens; None if all tokens are real.
            pixel_values: (B, 3, image_size, image_size) float.
            labels: labels as ``problem_type`` defines them; if given, ``loss`` is computed.

        Returns:
            ``loss``, ``logits`` and the pooled ``features`` (B, D).

        Raises:
            TypeError, ValueError: an input has a wrong type or shape, or is missing.
        """
        if pixel_values is None:
            raise ValueError("MoPEBAF got no pixel_values: its passes are joint, of text and image")
        features, read = self.backbone(input_ids, attention_mask, pixel_values, run=self._features)
        logits = apply_head(self.head, read)
        loss = self.task_loss(logits, labels)
        return self._output_type(logits, labels)(loss=loss, logits=logits, task_loss=loss, features=features)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> Groups:
        """Return the outputs of the final norm, (B, rows, D) for each remaining group: "text", "image", "unified_prompt", ...

        Arguments and errors are those of :meth:`forward`.
        """
        return self.backbone(input_ids, attention_mask, pixel_values, run=self._hidden_states)

    def _features(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and the head's input, within the backbone's call."""
        features = self._pooled(self._hidden_states(input_ids, attention_mask, pixel_values), input_ids)
        return features, self.backbone.mlm_score(features) if isinstance(self.head, Verbalizer) else features

    def _hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> Groups:
        """Return the hidden states of each group, within the backbone's call."""
        vlmo = self.backbone
        groups = {"text": vlmo.embed_text(input_ids), "image": vlmo.embed_image(pixel_values)}
        check_same_batch(input_ids, pixel_values)
        groups |= {name: self._prompt(name, 0, groups["text"]) for name in GROUPS if name not in groups}
        for segment in self._plans[input_ids.shape[1] - 1]:
            groups |= self._entered(segment.layers.start, groups)
            before, after = segment.around_tokens()
            image = segment.lengths["image"]
            mask = vlmo.key_padding_mask(attention_mask, input_ids, before=before, after=image + after)
            biases = vlmo.position_biases(input_ids.shape[1], image, before=before, after=after, layers=segment.layers)
            x = torch.cat([groups[name] for name in segment.lengths], dim=1)
            for index, field, bias in zip(segment.layers, segment.fields, biases, strict=True):
                x = vlmo.run_block(vlmo.transformer.blocks[index], x, Visibility(mask, field, bias), segment.experts)
            groups |= _split(x, segment.lengths)
        return _split(vlmo.transformer.norm(x), segment.lengths)

    def receptive_field(self, layer: int) -> ReceptiveField | None:
        """Return which groups see each other in a layer, for a text of full length; None if every group sees every other.

        Raises:
            IndexError: there is no such layer.
        """
        layers = self.backbone.config.num_layers
        if not 0 <= layer < layers:
            raise IndexError(f"layer must be 0 to {layers - 1}, got {layer}")
        return next(segment.fields[layer - segment.layers.start] for segment in self._plans[-1] if layer in segment.layers)

    def _prompt(self, name: str, block: int, like: Tensor) -> Tensor:
        """Return a group of prompts (B, rows, D) as it is at the start of a block."""
        prompt = getattr(self, name)
        if prompt is None:
            return like[:, :0]
        return prompt[block if len(prompt) > 1 else 0].to(like.dtype).expand(len(like), -1, -1)

    def _entered(self, layer: int, groups: Groups) -> Groups:
        """Return the prompts that change before this layer."""
        changed = self._fused(1 + self._starts.index(layer), groups) if layer in self._starts else {}
        if layer == self.backbone.config.first_fusion_layer and self.unified_fusion is not None:
            prompts = [(groups | changed)[name] for name in ("text_prompt", "image_prompt")]
            own = groups["unified_prompt"]
            changed["unified_prompt"] = self.unified_fusion(own, own, torch.cat(prompts, dim=1))
        return changed

    def _fused(self, block: int, groups: Groups) -> Groups:
        """Return the text and image prompts as they are at the start of a block other than the first."""
        names = ("text_prompt", "image_prompt")
        prompts = own = [groups[name] for name in names]
        if self._blocks_own_prompts:
            own = [self._prompt(name, block, groups["text"]) for name in names]
        if self.fusions:
            own = self.fusions[0 if self.config.share_boundaries else block - 1](*prompts, *own)
        return dict(zip(names, own, strict=True))

    def _pooled(self, groups: Groups, input_ids: Tensor) -> Tensor:
        """Return the pooled feature (B, D)."""
        config, text = self.config, groups["text"]
        if isinstance(self.head, Verbalizer):
            masks = input_ids == config.mask_token_id
            feature = text.gather(1, masks.byte().argmax(1)[:, None, None].expand(-1, -1, text.shape[-1]))[:, 0]
            # NaN makes a missing mask token visible without a device synchronisation
            return feature.masked_fill(~masks.any(1, keepdim=True), float("nan"))
        unified = config.pooling == "unified" or (config.pooling == "auto" and config.unified_prompt_length)
        return groups["unified_prompt"].mean(1) if unified else self.backbone.pooler(text[:, 0])

    @torch.no_grad()
    def set_prompt(self, group: str, source: Tensor) -> None:
        """Initialise a prompt from text or embeddings instead of random numbers; rows are repeated or cut to the prompt's length.

        With ``per_block_prompts`` the prompts of all blocks are initialised this way.

        Args:
            group: "text_prompt", "image_prompt" or "unified_prompt".
            source: (n,) int64 token ids, without [CLS] and [SEP], embedded as VLMo embeds a text (with position and modality
                embeddings); or (n, D) float rows.

        Raises:
            TypeError, ValueError: the group is unknown or has length zero, or the source has another type or shape.
        """
        prompt = getattr(self, group, None) if group in PROMPTS else None
        if prompt is None:
            existing = [name for name in PROMPTS if getattr(self, name) is not None]
            raise ValueError(f"set_prompt got {group!r}: expected one of {existing}")
        if not isinstance(source, Tensor):
            raise TypeError(f"source must be a tensor, got {type(source).__name__}")
        rows = source
        if not source.is_floating_point() and source.dim() == 1:
            dropout = self.backbone.text_embeddings.dropout
            training, dropout.training = dropout.training, False
            try:
                ids = source[None].to(prompt.device)
                rows = self.backbone(ids, run=lambda input_ids, *others: self.backbone.embed_text(input_ids))[0]
            finally:
                dropout.training = training
        width = prompt.shape[-1]
        if not rows.is_floating_point() or rows.dim() != 2 or not len(rows) or rows.shape[1] != width:
            got = f"{source.dtype} {tuple(source.shape)}"
            raise ValueError(f"source must be token ids (n,) or float rows (n, {width}), got {got}")
        index = torch.arange(prompt.shape[1], device=rows.device) % len(rows)
        prompt.copy_(rows[index])

    def train(self, mode: bool = True) -> "MoPEBAF":
        """Set the mode; a frozen VLMo stays in eval mode."""
        super().train(mode)
        if self._hold is not None:
            self.backbone.eval()
        return self

    def parameter_groups(self, lr: float, weight_decay: float = 0.01, head_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return the trained parameters as optimiser groups: no decay for biases and norms, and a separate rate for the head.

        Raises:
            ValueError: ``head_lr_multiplier`` isn't 1, but there is no head.
        """
        if self.head is None and head_lr_multiplier != 1:
            raise ValueError(f"head_lr_multiplier is {head_lr_multiplier}, but this MoPEBAF has no head: leave it at 1")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = lr * head_lr_multiplier if name.startswith("head.") else lr
                # VLMo applies no decay to parameters with "bias" in their names, which includes this table
                decays = parameter.dim() > 1 and not name.endswith("relative_position_bias_table")
                groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]

    def _set_gradient_checkpointing(self, value: bool) -> None:
        self.backbone.gradient_checkpointing = value

    def frozen_parts(self) -> list[str]:
        """Return the names of the modules that are kept frozen."""
        return ["backbone"] if self.config.freeze_backbone else []

    def unwrap(self) -> VLMo:
        """Return the VLMo; this model can't be used afterwards.

        A frozen VLMo is restored to its original state once no other model holds it: parameters that were trainable and modules
        that were in training mode are so again. A trained VLMo is returned as it is.
        """
        if self._hold is not None:
            self._hold.release()
            self._hold = None
        return self.backbone

    def description(self) -> dict[str, Any]:
        architecture = self.backbone.config.to_dict()
        del architecture["drop_path_rate"]  # how it is trained, not what it is
        return {
            "model": "MoPEBAF",
            "main": {"family": "VLMo", **architecture},
            "config": self.config.to_dict(),
            **self._head_description(),
            "num_classes": self._num_classes,
        }

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], vlmo: VLMo, *, head: nn.Module | None = None, strict: bool = False
    ) -> "MoPEBAF":
        """Load a folder of :meth:`save_pretrained` onto a VLMo of the same sizes; pass ``head`` only if the save has a custom one.

        A frozen VLMo with other weights causes a warning, or an error with ``strict``; see :meth:`load_pretrained`.

        If the VLMo was trained too, all of its weights were saved, and they replace those of ``vlmo``.

        Raises:
            FileNotFoundError, ValueError: there is no such save, it is damaged, or it doesn't fit; the message says why.
            OSError: a file can't be read.
        """
        known = {field.name for field in dataclasses.fields(BAFConfig)}
        saved = checkpoint.read_description(path, "MoPEBAF", known)
        classes, task = None if head is not None else saved["num_classes"], checkpoint.task_settings(saved)
        with checkpoint.settings_of(path):
            config = BAFConfig(**saved["config"])
            check_head(classes, head, **task)
        model = cls(vlmo, classes, config, head=head, **task)
        model._load(path, saved, strict)
        return model


def _split(x: Tensor, lengths: dict[str, int]) -> Groups:
    return dict(zip(lengths, x.split(list(lengths.values()), dim=1), strict=True))
