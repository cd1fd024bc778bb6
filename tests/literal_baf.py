"""MoPE-BAF as its specification has it, slowly: one mask for each layer, an expert for each row, a loop over heads.

Groups are letters: u the VL-Prompt, l the L-Prompt, t text, i image, v the V-Prompt. A table says for each group what it sees.
"""

import math

import torch

NAMES = {"u": "unified_prompt", "l": "text_prompt", "t": "text", "i": "image", "v": "image_prompt"}
ORDER = "ultiv"
"""Of the model's sequence; the literal one has another order on purpose."""
CHAIN = {"l": "lt", "t": "lti", "i": "tiv", "v": "iv"}
JOINT = {"u": "uti", "t": "uti", "i": "uti"}
ALL = dict.fromkeys("ultiv", "ultiv")
V4 = {"u": "ultiv", "l": "ult", "t": "ulti", "i": "utiv", "v": "uiv"}
ODD = {"u": "lv", "l": "uiv", "t": "ti", "i": "", "v": "lt"}
ODD_FUSION = {"u": "ut", "l": "", "t": "ui", "i": "tv", "v": "v"}


def words(table: dict[str, str]) -> dict[str, list[str]]:
    """The table as BAFConfig takes it."""
    return {NAMES[group]: [NAMES[other] for other in seen] for group, seen in table.items()}


# settings -> the table of each of five layers, the last two of which are fusion layers
CASES = {
    "default": ({}, [CHAIN] * 3 + [JOINT] * 2),
    "V1": ({"tokens_see_other_prompts": True}, [{"l": "lt", "t": "ltiv", "i": "ltiv", "v": "iv"}] * 3 + [JOINT] * 2),
    "V2": ({"prompts_see_themselves": False}, [{"l": "t", "t": "lti", "i": "tiv", "v": "i"}] * 3 + [JOINT] * 2),
    "V3": ({"modalities_see_each_other": False}, [{"l": "lt", "t": "lt", "i": "iv", "v": "iv"}] * 3 + [JOINT] * 2),
    "V4": ({"unified_from_start": True}, [V4] * 3 + [JOINT] * 2),
    "V4, not seen": (
        {"unified_from_start": True, "unified_visible": False},
        [{"u": "ultiv", **CHAIN}] * 3 + [JOINT] * 2,
    ),
    "V5": ({"keep_modality_prompts": True}, [CHAIN] * 3 + [ALL] * 2),
    "V1 V2": (
        {"tokens_see_other_prompts": True, "prompts_see_themselves": False},
        [{"l": "t", "t": "ltiv", "i": "ltiv", "v": "i"}] * 3 + [JOINT] * 2,
    ),
    "V1 to V5": (
        {
            "tokens_see_other_prompts": True, "prompts_see_themselves": False, "modalities_see_each_other": False,
            "unified_from_start": True, "keep_modality_prompts": True,
        },
        [{"u": "ultiv", "l": "ut", "t": "ultv", "i": "uliv", "v": "ui"}] * 3 + [ALL] * 2,
    ),
    "unrestricted": ({"restricted": False}, [dict.fromkeys("ltiv", "ltiv")] * 3 + [JOINT] * 2),
    "own tables": (
        {"visible": words(ODD), "fusion_visible": words(ODD_FUSION), "unified_from_start": True, "keep_modality_prompts": True},
        [ODD] * 3 + [ODD_FUSION] * 2,
    ),
    "E": ({"fusion_form": "E", "num_blocks": 3}, [CHAIN] + [{**CHAIN, "l": "ltv", "v": "liv"}] * 2 + [JOINT] * 2),
    "E, next layer": (
        {"fusion_form": "E", "boundaries": [1], "widen_next_only": True},
        [CHAIN, {**CHAIN, "l": "ltv", "v": "liv"}, CHAIN] + [JOINT] * 2,
    ),
    "E, to the end": (
        {"fusion_form": "E", "boundaries": [4], "keep_modality_prompts": True, "fusion_visible": words(V4)},
        [CHAIN] * 3 + [V4] + [{**V4, "l": "ultv", "v": "uliv"}],
    ),
}  # fmt: skip


def norm(module, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    return scaled if module.weight is None else scaled * module.weight + module.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def softmax_over(scores, allowed):
    """Rows that may see nothing get zeros."""
    highest = torch.where(allowed, scores, -math.inf).amax(-1, keepdim=True).detach()
    weights = (scores - highest).masked_fill(~allowed, 0.0).exp() * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def heads_of(q, k, v, num_heads, allowed, bias=None):
    outputs, size = [], q.shape[-1] // num_heads
    for head in range(num_heads):
        one = slice(head * size, (head + 1) * size)
        scores = q[..., one] @ k[..., one].mT / math.sqrt(size)
        scores = scores if bias is None else scores + bias[head]
        outputs.append(softmax_over(scores, allowed) @ v[..., one])
    return torch.cat(outputs, dim=-1)


def self_attention(attention, x, allowed, bias):
    wq, wk, wv = attention.qkv.weight.chunk(3)
    q, k, v = x @ wq.T + attention.q_bias, x @ wk.T, x @ wv.T + attention.v_bias
    out = heads_of(q, k, v, attention.num_heads, allowed, bias)
    return out @ attention.proj.weight.T + attention.proj.bias


def cross_attention(attention, query, context):
    """nn.MultiheadAttention."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    rows = [x @ w.T + b for x, w, b in zip((query, context, context), weights, biases, strict=True)]
    allowed = torch.ones(query.shape[1], context.shape[1], dtype=torch.bool)
    out = heads_of(*rows, attention.num_heads, allowed)
    return out @ attention.out_proj.weight.T + attention.out_proj.bias


def take(fusion, own, query, context):
    """own + MHA(LN(query), LN(context)), and a feed-forward layer if there is one."""
    out = own + cross_attention(fusion.attention, norm(fusion.norm_query, query), norm(fusion.norm_context, context))
    if fusion.feed_forward is not None:
        before, up, _, down = fusion.feed_forward
        out = out + gelu(norm(before, out) @ up.weight.T + up.bias) @ down.weight.T + down.bias
    return out


def take_plainly(own, query, context):
    plain = torch.nn.LayerNorm(own.shape[-1], eps=1e-6, elementwise_affine=False)
    query, context = norm(plain, query), norm(plain, context)
    scores = query @ context.mT / math.sqrt(own.shape[-1])
    return own + softmax_over(scores, torch.ones_like(scores, dtype=torch.bool)) @ context


def fuse(fusion, form, text, image, new_text, new_image):
    """Prompts of text and image behind a boundary; the new ones are the next block's own, or the same as in front of it."""
    if form in "ABG":
        return take(fusion.to_text, new_text, new_text, image), take(fusion.to_image, new_image, new_image, text)
    if form == "C":
        return take(fusion.to_text, new_text, image, text), take(fusion.to_image, new_image, text, image)
    if form == "D":
        return (
            take(fusion.to_text, new_text, new_text, torch.cat([text, image], 1)),
            take(fusion.to_image, new_image, new_image, torch.cat([text, image], 1)),
        )
    return take_plainly(new_text, new_text, image), take_plainly(new_image, new_image, text)


def row_of_table(config, query, key):
    """Which row of VLMo's bias table two tokens take; None with a prompt."""
    (kind, i), (other, j) = query, key
    pairs, grid = (2 * config.grid - 1) ** 2 + 3, config.grid
    last = pairs + 2 * 196 + 2
    if not {kind, other} <= {"t", "i"}:
        return None
    if kind != other:
        return pairs if kind == "t" else pairs + 1
    if i == 0 or j == 0:
        end = pairs if kind == "i" else last
        return end - 1 if i == j else end - 3 if i == 0 else end - 2
    if kind == "t":
        return pairs + 2 + 194 + j - i
    (row, column), (other_row, other_column) = divmod(i - 1, grid), divmod(j - 1, grid)
    return (row - other_row + grid - 1) * (2 * grid - 1) + column - other_column + grid - 1


def position_bias(vlmo, layer, tokens):
    """(H, S, S), or None without such biases."""
    table, heads = vlmo.relative_position_bias_table, vlmo.config.num_heads
    if table is None:
        return None
    own, none = table[:, layer * heads : (layer + 1) * heads], table.new_zeros(heads)
    rows = [[row_of_table(vlmo.config, query, key) for key in tokens] for query in tokens]
    return torch.stack([torch.stack([none if row is None else own[row] for row in line]) for line in rows]).permute(2, 0, 1)


def layer_forward(vlmo, layer, groups, table, text_mask):
    """One layer on {letter: (B, rows, D)}."""
    block, fusion = vlmo.transformer.blocks[layer], layer >= vlmo.config.first_fusion_layer
    order = [letter for letter in "vtiul" if letter in table]
    tokens = [(letter, i) for letter in order for i in range(groups[letter].shape[1])]
    x = torch.cat([groups[letter] for letter in order], 1)
    allowed = torch.tensor([[key in table[query] for key, _ in tokens] for query, _ in tokens])
    real = torch.stack([text_mask[:, i] if letter == "t" else text_mask.new_ones(len(x)) for letter, i in tokens], 1)
    allowed = allowed & real[:, None, :]
    gammas = [1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2)]
    x = x + gammas[0] * self_attention(block.attn, norm(block.norm1, x), allowed, position_bias(vlmo, layer, tokens))
    rows = []
    for i, (letter, _) in enumerate(tokens):
        expert = "vl" if fusion else "imag" if letter in "iv" else "text"
        mlp = getattr(block, f"mlp_{expert}")
        hidden = gelu(norm(getattr(block, f"norm2_{expert}"), x[:, i]) @ mlp.fc1.weight.T + mlp.fc1.bias)
        rows.append(x[:, i] + gammas[1] * (hidden @ mlp.fc2.weight.T + mlp.fc2.bias))
    x = torch.stack(rows, 1)
    return dict(zip(order, x.split([groups[letter].shape[1] for letter in order], 1), strict=True))


def embedded(vlmo, input_ids, pixel_values):
    """(B, T, D) and (B, I, D)."""
    parts, transformer, grid = vlmo.text_embeddings, vlmo.transformer, vlmo.config.grid
    text = parts.word_embeddings.weight[input_ids] + parts.token_type_embeddings.weight[0]
    if vlmo.config.absolute_positions:
        text = text + parts.position_embeddings.weight[: input_ids.shape[1]]
    text = norm(parts.LayerNorm, text) + vlmo.token_type_embeddings.weight[0]
    side, filters = vlmo.config.patch_size, transformer.patch_embed.proj
    pixels = pixel_values.unfold(2, side, side).unfold(3, side, side)
    patches = [pixels[:, :, i // grid, i % grid].flatten(1) @ filters.weight.flatten(1).T for i in range(grid**2)]
    image = torch.stack(patches, 1) + filters.bias
    image = torch.cat([transformer.cls_token.expand(len(image), -1, -1), image], 1)
    image = image if transformer.pos_embed is None else image + transformer.pos_embed
    return text, image + vlmo.token_type_embeddings.weight[1]


def prompt(model, letter, block, batch):
    rows = getattr(model, NAMES[letter])
    if rows is None:
        return torch.zeros(batch, 0, model.backbone.config.hidden_size, dtype=torch.float64)
    return rows[min(block, len(rows) - 1)].expand(batch, -1, -1)


def forward(model, tables, starts, inputs):
    """Outputs {letter: (B, rows, D)} behind the last norm; ``starts`` are the first layers of all blocks but the first."""
    vlmo, form, batch = model.backbone, model.config.fusion_form, len(inputs["input_ids"])
    text, image = embedded(vlmo, inputs["input_ids"], inputs["pixel_values"])
    groups = {"t": text, "i": image, **{letter: prompt(model, letter, 0, batch) for letter in "ulv"}}
    for layer, table in enumerate(tables):
        if layer in starts:
            boundary = starts.index(layer)
            own = model.config.per_block_prompts or form == "B"
            new = [prompt(model, letter, boundary + 1, batch) if own else groups[letter] for letter in "lv"]
            if form != "E" and groups["l"].shape[1] and groups["v"].shape[1]:
                fusion = model.fusions[0 if model.config.share_boundaries else boundary]
                new = fuse(fusion, form, groups["l"], groups["v"], *new)
            groups["l"], groups["v"] = new
        if form == "G" and starts and layer == vlmo.config.first_fusion_layer:
            groups["u"] = take(model.unified_fusion, groups["u"], groups["u"], torch.cat([groups["l"], groups["v"]], 1))
        groups |= layer_forward(vlmo, layer, groups, table, inputs["attention_mask"].bool())
    return {letter: norm(vlmo.transformer.norm, groups[letter]) for letter in tables[-1]}
