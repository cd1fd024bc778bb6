"""Every transformers family as a tiny encoder with weights large enough to matter, inputs, and what an oracle has to know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from mope_fast import MoPEConfig, MoPEFusion

WIDTH, HEADS, VOCABULARY, END_OF_TEXT, CROSS = 32, 4, 51, 49, 20
SETTINGS = {"num_experts": 4, "prompt_length": 3, "cross_routing_dim": 3, "cross_dim": CROSS}
KERNELS, STRIDES = (4, 3), (3, 2)
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One kind of encoder.

    Args:
        family: as registered.
        model, config: its classes; settings: of the config; depth: the config's name for the number of layers.
        inputs: number of samples -> keyword arguments, ragged where the model has a mask.
        layers: encoder -> its layers.
        pool: (inputs, tokens) -> what the router is to see of a layer's input.
        finish: (encoder, inputs, tokens behind the last layer) -> feature.
        seen: inputs -> which tokens are real; None for all.
        causal: tokens don't see later ones.
    """

    family: str
    model: type[nn.Module]
    config: type
    settings: dict[str, Any]
    inputs: Callable[[int], Inputs]
    layers: Callable[[nn.Module], nn.ModuleList]
    pool: Callable[[Inputs, Tensor], Tensor]
    finish: Callable[[nn.Module, Inputs, Tensor], Tensor]
    seen: Callable[[Inputs], Tensor | None] = lambda inputs: inputs.get("attention_mask")
    causal: bool = False
    depth: str = "num_hidden_layers"

    def make(self, layers: int = 2, **settings) -> nn.Module:
        """float64, eval mode."""
        encoder = self.model(self.config(**{**self.settings, self.depth: layers, **settings}))
        for parameter in encoder.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return encoder.double().eval()


def make_fusion(encoder: nn.Module, num_classes: int | None = None, **settings) -> MoPEFusion:
    """Features of width CROSS as the other side; in the encoder's dtype, eval mode."""
    dtype = next(encoder.parameters()).dtype
    return MoPEFusion(encoder, None, num_classes, MoPEConfig(**{**SETTINGS, **settings})).to(dtype).eval()


def make_cross(batch: int) -> Tensor:
    return torch.randn(batch, CROSS, dtype=torch.float64)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """float64 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def each(pick: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
    """One sample after the other, with nothing clever."""
    return torch.stack([pick(i, sample) for i, sample in enumerate(x)])


def class_token(inputs: Inputs, x: Tensor) -> Tensor:
    return x[:, 0]


def mean(inputs: Inputs, x: Tensor) -> Tensor:
    return x.mean(1)


def masked_mean(mask: Tensor, x: Tensor) -> Tensor:
    return each(lambda i, sample: sample[mask[i].bool()].mean(0), x)


def mean_of_real_tokens(inputs: Inputs, x: Tensor) -> Tensor:
    return masked_mean(inputs["attention_mask"], x)


def last_real_token(inputs: Inputs, x: Tensor) -> Tensor:
    return each(lambda i, sample: sample[inputs["attention_mask"][i].bool()][-1], x)


def end_of_text(inputs: Inputs, x: Tensor) -> Tensor:
    return each(lambda i, sample: sample[inputs["input_ids"][i].tolist().index(END_OF_TEXT)], x)


def without_norm(pool: Callable[[Inputs, Tensor], Tensor]) -> Callable[[nn.Module, Inputs, Tensor], Tensor]:
    return lambda encoder, inputs, x: pool(inputs, x)


# Text


def make_ids(batch: int, tokens: int) -> Tensor:
    """No special token of any family."""
    return torch.randint(5, END_OF_TEXT, (batch, tokens))


def make_mask(batch: int, tokens: int, *, left: bool) -> Tensor:
    """Padded at the end; in the middle of sample 0; with ``left`` at the beginning of sample 1, else behind its first token."""
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (batch, 1))
    mask[:2] = True
    mask[0, 3:5] = False
    if batch > 1:
        mask[1, slice(0, 3) if left else slice(1, 4)] = False
    return mask.long()


def make_text(batch: int, tokens: int = 9, *, left: bool = False) -> Inputs:
    return {"input_ids": make_ids(batch, tokens), "attention_mask": make_mask(batch, tokens, left=left)}


def make_ended_text(batch: int, tokens: int = 9, *, added: bool = False) -> Inputs:
    """The last real token is the end of the text; with ``added`` another has a larger id, as one added to a tokenizer."""
    inputs = make_text(batch, tokens, left=True)
    positions = torch.where(inputs["attention_mask"].bool(), torch.arange(tokens), 0).amax(1)
    inputs["input_ids"][torch.arange(batch), positions] = END_OF_TEXT
    if added:
        inputs["input_ids"][:, 1] = END_OF_TEXT + 1
    return inputs


_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": WIDTH, "n_heads": HEADS, "hidden_dim": 40, "max_position_embeddings": 24}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "decoder_layers": 1,
    "max_position_embeddings": 24,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_positions": 24, "bos_token_id": 2, "eos_token_id": 2}


def _text_cases() -> dict[str, Case]:
    bert = {"inputs": make_text, "layers": lambda e: e.encoder.layer, "pool": class_token, "finish": without_norm(class_token)}
    clip = {
        "inputs": make_ended_text,
        "layers": lambda e: e.encoder.layers,
        "pool": end_of_text,
        "finish": lambda e, inputs, x: end_of_text(inputs, e.final_layer_norm(x)),
        "causal": True,
    }
    gpt2 = {
        "inputs": partial(make_text, left=True),
        "layers": lambda e: e.h,
        "pool": last_real_token,
        "finish": lambda e, inputs, x: e.ln_f(last_real_token(inputs, x)),
        "causal": True,
        "depth": "n_layer",
    }
    bart = {"pool": mean_of_real_tokens, "finish": without_norm(mean_of_real_tokens), "depth": "encoder_layers"}
    return {
        "bert": Case("bert", hf.BertModel, hf.BertConfig, _BERT, **bert),
        "roberta": Case("roberta", hf.RobertaModel, hf.RobertaConfig, _BERT, **bert),
        "distilbert": Case(
            "distilbert", hf.DistilBertModel, hf.DistilBertConfig, _DISTILBERT,
            **{**bert, "layers": lambda e: e.transformer.layer, "depth": "n_layers"},
        ),
        "clip_text": Case(
            "clip_text", hf.CLIPTextModel, hf.CLIPTextConfig, {**_BERT, "eos_token_id": END_OF_TEXT},
            **{**clip, "inputs": partial(make_ended_text, added=True)},
        ),
        "clip_text, old end of text": Case("clip_text", hf.CLIPTextModel, hf.CLIPTextConfig, {**_BERT, "eos_token_id": 2}, **clip),
        "bart": Case(
            "bart", hf.models.bart.modeling_bart.BartEncoder, hf.BartConfig, _BART,
            inputs=partial(make_text, left=True), layers=lambda e: e.layers, **bart,
        ),
        "gpt2": Case("gpt2", hf.GPT2Model, hf.GPT2Config, _GPT2, **gpt2),
        "gpt2, scaled by layer": Case(
            "gpt2", hf.GPT2Model, hf.GPT2Config, {**_GPT2, "scale_attn_by_inverse_layer_idx": True}, **gpt2
        ),
    }  # fmt: skip


# Images


def make_images(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 12, 12, dtype=torch.float64)}


def make_masked_images(batch: int) -> Inputs:
    """Class token and nine patches, some of them hidden."""
    return {**make_images(batch), "attention_mask": make_mask(batch, 10, left=False)}


_VIT = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 40, "image_size": 12, "patch_size": 4}


def _image_cases() -> dict[str, Case]:
    vit = {
        "inputs": make_images,
        "layers": lambda e: e.layers,
        "pool": class_token,
        "finish": lambda e, inputs, x: e.layernorm(x[:, 0]),
    }
    clip = {"inputs": make_images, "layers": lambda e: e.encoder.layers}
    masked = {**vit, "inputs": make_masked_images}
    return {
        "vit": Case("vit", hf.ViTModel, hf.ViTConfig, _VIT, **vit),
        "vit, masked": Case("vit", hf.ViTModel, hf.ViTConfig, {**_VIT, "qkv_bias": False}, **masked),
        "deit": Case("deit", hf.DeiTModel, hf.DeiTConfig, _VIT, **vit),
        "dinov2": Case("dinov2", hf.Dinov2Model, hf.Dinov2Config, _VIT, **{**vit, "layers": lambda e: e.encoder.layer}),
        "clip_vision": Case(
            "clip_vision", hf.CLIPVisionModel, hf.CLIPVisionConfig, _VIT,
            **clip, pool=class_token, finish=lambda e, inputs, x: e.post_layernorm(x[:, 0]),
        ),
        "siglip_vision": Case(
            "siglip_vision", hf.SiglipVisionModel, hf.SiglipVisionConfig, {**_VIT, "vision_use_head": True},
            **clip, pool=mean, finish=lambda e, inputs, x: e.head(e.post_layernorm(x)),
        ),
        "siglip_vision, no head": Case(
            "siglip_vision", hf.SiglipVisionModel, hf.SiglipVisionConfig, {**_VIT, "vision_use_head": False},
            **clip, pool=mean, finish=lambda e, inputs, x: e.post_layernorm(x).mean(1),
        ),
    }  # fmt: skip


# Audio


def make_waveform(batch: int, samples: int = 60) -> Inputs:
    """Padded at the end, which is all that the models' own masks can say; even the longest sample has a frame of padding."""
    lengths = torch.randint(16, samples - 12, (batch, 1))
    lengths[0] = samples - 12
    mask = torch.arange(samples) < lengths
    return {"input_values": torch.randn(batch, samples, dtype=torch.float64), "attention_mask": mask.long()}


def frames(samples: int) -> int:
    """Behind the convolutions."""
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def real_frames(inputs: Inputs, *, shortened: bool = False) -> Tensor:
    """Frames that see real samples only; ``shortened`` by the adapter's one layer of stride 2."""
    counts = [frames(length) for length in inputs["attention_mask"].sum(1).tolist()]
    total = frames(inputs["input_values"].shape[1])
    if shortened:
        counts, total = [(count - 1) // 2 + 1 for count in counts], (total - 1) // 2 + 1
    return torch.arange(total) < torch.tensor(counts)[:, None]


def make_mel(batch: int) -> Inputs:
    return {"input_features": torch.randn(batch, 8, 12, dtype=torch.float64)}


def _finish_waveform(encoder: nn.Module, inputs: Inputs, x: Tensor) -> Tensor:
    if encoder.config.do_stable_layer_norm:
        x = encoder.encoder.layer_norm(x)
    adapter = getattr(encoder, "adapter", None)
    return masked_mean(real_frames(inputs), x) if adapter is None else masked_mean(real_frames(inputs, shortened=True), adapter(x))


def _audio_cases() -> dict[str, Case]:
    settings = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 40,
        "conv_dim": (16, 16),
        "conv_kernel": KERNELS,
        "conv_stride": STRIDES,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    adapter = {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 24}
    whisper = {
        "num_mel_bins": 8,
        "max_source_positions": 6,
        "max_target_positions": 24,
        "decoder_layers": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    # what published models have: the base ones a group norm in the convolutions, the large ones layer norms throughout
    norms = {False: {"feat_extract_norm": "group"}, True: {"feat_extract_norm": "layer", "conv_bias": True}}

    def waveform(family: str, model: type, config: type, stable: bool, **more) -> Case:
        return Case(
            family, model, config, {**settings, "do_stable_layer_norm": stable, **norms[stable], **more},
            inputs=make_waveform, layers=lambda e: e.encoder.layers, seen=real_frames, finish=_finish_waveform,
            pool=lambda inputs, x: masked_mean(real_frames(inputs), x),
        )  # fmt: skip

    wav2vec2, hubert = (hf.Wav2Vec2Model, hf.Wav2Vec2Config), (hf.HubertModel, hf.HubertConfig)
    return {
        "whisper": Case(
            "whisper", hf.models.whisper.modeling_whisper.WhisperEncoder, hf.WhisperConfig,
            {**{name: value for name, value in _BART.items() if name != "max_position_embeddings"}, **whisper},
            inputs=make_mel, layers=lambda e: e.layers, pool=mean,
            finish=lambda e, inputs, x: e.layer_norm(x).mean(1), depth="encoder_layers",
        ),
        "wav2vec2": waveform("wav2vec2", *wav2vec2, False),
        "wav2vec2, stable": waveform("wav2vec2", *wav2vec2, True),
        "wav2vec2, adapter": waveform("wav2vec2", *wav2vec2, False, **adapter),
        "wav2vec2, stable, adapter": waveform("wav2vec2", *wav2vec2, True, **adapter),
        "hubert": waveform("hubert", *hubert, False),
        "hubert, stable": waveform("hubert", *hubert, True),
    }  # fmt: skip


CASES = {**_text_cases(), **_image_cases(), **_audio_cases()}
ONE_OF_EACH = [name for name in CASES if "," not in name]
"""One case of each family."""
FORWARDS = [name for name in ONE_OF_EACH if name not in ("roberta", "deit", "hubert")]
"""For compilers: those three run the code of BERT, ViT and wav2vec 2.0."""
