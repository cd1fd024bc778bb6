"""vit-pytorch's ViT: its attention, on its own parameters, also attends to prompts."""

import functools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .._dispatch import prompt_attention
from .attachment import prefixes_of
from .families import EncoderFamily, Inputs, PromptedLayer, keys_and_values, register_encoder
from .pooling import Pool, first_token, patch_mean, token_mean
from .replaced import forward_problem, replace_methods


def _attentions(encoder: nn.Module) -> list[nn.Module]:
    return [attention for attention, _ in encoder.transformer.layers]


def _layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            attention, attention, attention.norm.normalized_shape[-1], attention.norm,
            functools.partial(keys_and_values, attention.to_qkv), None, attention.heads,
        )
        for attention in _attentions(encoder)
    ]  # fmt: skip


def _problem(encoder: nn.Module) -> str | None:
    for index, attention in enumerate(_attentions(encoder)):
        if f"{type(attention).__module__}.{type(attention).__qualname__}" != "vit_pytorch.vit.Attention":
            return f"the attention of its layer {index} is a {type(attention).__name__}; vit_pytorch.vit's own is supported"
        if problem := forward_problem(f"layer {index}", attention):
            return problem
    if encoder.mlp_head is not None:
        return "its classifier hides its tokens: set mlp_head = None on it, and give the fused model num_classes or head"
    return None


def _attention(attention: nn.Module, x: Tensor) -> Tensor:
    """Compute vit-pytorch's ``Attention.forward`` with prompts; a wrapped encoder is in eval mode, so there is no dropout."""
    prefixes = prefixes_of(attention)
    if not prefixes:
        return type(attention).forward(attention, x)
    q, k, v = attention.to_qkv(attention.norm(x)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    out = prompt_attention(q, k, v, prefixes, scale=attention.scale)
    return attention.to_out(out.transpose(1, 2).flatten(2))


def _attach(encoder: nn.Module) -> Callable[[nn.Module], None]:
    return replace_methods((attention, _attention) for attention in _attentions(encoder))


def _pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean if encoder.pool == "mean" else first_token


def _feature(encoder: nn.Module, output: Tensor, inputs: Inputs) -> Tensor:
    if output.dim() != 3:
        raise RuntimeError("this ViT was given an mlp_head after it was wrapped, which hides its tokens: set it to None")
    return _pool(encoder, inputs)(output)


def _by_class_token(encoder: nn.Module, inputs: Inputs) -> Pool:
    if not len(encoder.cls_token):
        raise ValueError("pooling is 'cls', but this ViT has no class token: use 'mean' or None")
    return first_token


def _by_patch_mean(encoder: nn.Module, inputs: Inputs) -> Pool:
    return patch_mean(len(encoder.cls_token))


register_encoder(
    EncoderFamily(
        name="vit_pytorch",
        models=("vit_pytorch.vit.ViT",),
        input_name="img",
        layers=_layers,
        pool=_pool,
        feature=_feature,
        feature_width=lambda encoder: encoder.pos_embedding.shape[-1],
        attach=_attach,
        problem=_problem,
        pools={"cls": _by_class_token, "mean": _by_patch_mean},
        tokens=lambda encoder, output, inputs: output,
    )
)
