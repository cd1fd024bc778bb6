"""The content of official VLMo files: names and shapes, written down from the specification, and random tensors under them."""

import torch


def official_shapes(width, layers, first_fusion, *, words=30522, text=40, patch=16, image_tokens=197, mlp=4, relative=None):
    """Without heads; ``relative`` is the shape of the table of Base and Large."""
    shapes = {
        "transformer.cls_token": (1, 1, width),
        "transformer.pos_embed": (1, image_tokens, width),
        "transformer.patch_embed.proj.weight": (width, 3, patch, patch),
        "transformer.patch_embed.proj.bias": (width,),
        "transformer.norm.weight": (width,),
        "transformer.norm.bias": (width,),
        "text_embeddings.word_embeddings.weight": (words, width),
        "text_embeddings.position_embeddings.weight": (text, width),
        "text_embeddings.token_type_embeddings.weight": (2, width),
        "text_embeddings.LayerNorm.weight": (width,),
        "text_embeddings.LayerNorm.bias": (width,),
        "token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    if relative is not None:
        del shapes["transformer.pos_embed"]
        shapes["relative_position_bias_table"] = relative
    for layer in range(layers):
        block = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
        }
        if relative is not None:
            block |= {"gamma_1": (width,), "gamma_2": (width,)}
        for expert in ("text", "imag", "vl") if layer >= first_fusion else ("text", "imag"):
            block |= {
                f"norm2_{expert}.weight": (width,),
                f"norm2_{expert}.bias": (width,),
                f"mlp_{expert}.fc1.weight": (mlp * width, width),
                f"mlp_{expert}.fc1.bias": (mlp * width,),
                f"mlp_{expert}.fc2.weight": (width, mlp * width),
                f"mlp_{expert}.fc2.bias": (width,),
            }
        shapes |= {f"transformer.blocks.{layer}.{key}": shape for key, shape in block.items()}
    return shapes


def mlm_shapes(width, words=30522):
    return {
        "mlm_score.bias": (words,),
        "mlm_score.transform.dense.weight": (width, width),
        "mlm_score.transform.dense.bias": (width,),
        "mlm_score.transform.LayerNorm.weight": (width,),
        "mlm_score.transform.LayerNorm.bias": (width,),
        "mlm_score.decoder.weight": (words, width),
    }


def other_heads(width):
    projections = {f"itc_{of}_proj.fc.weight": (width, width) for of in ("text", "image", "vl_text", "vl_image")}
    classifiers = {
        f"{task}_classifier.{i}.{kind}": (2,) for task in ("vqa", "nlvr2") for i in (0, 1, 3) for kind in ("weight", "bias")
    }
    scales = {"logit_scale": (), "logit_vl_scale": ()}
    return {"itm_score.fc.weight": (2, width), "itm_score.fc.bias": (2,), **projections, **classifiers, **scales}


def tiny_shapes(config):
    """Those of a configuration of ``tiny_vlmo``."""
    relative = None if config.absolute_positions else ((2 * config.grid - 1) ** 2 + 397, config.num_heads * config.num_layers)
    return official_shapes(
        config.hidden_size,
        config.num_layers,
        config.first_fusion_layer,
        words=config.vocab_size,
        text=config.max_text_length,
        patch=config.patch_size,
        image_tokens=config.image_tokens,
        mlp=config.mlp_ratio,
        relative=relative,
    )


def random_state(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}
