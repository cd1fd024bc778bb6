"""VLMo written out, one sample, token and pair of positions at a time, on nothing but a state dict with its official names."""

import torch
import torch.nn.functional as F
from timm.models.beit import Attention


class VLMoByHand:
    def __init__(self, config, state):
        self.config, self.state = config, state
        self.grid = config.image_size // config.patch_size
        self.image_pairs = (2 * self.grid - 1) ** 2 + 3

    def __call__(self, input_ids=None, attention_mask=None, pixel_values=None, vl_experts=False):
        """Text, image and pooled states, as the model gives them."""
        samples = []
        for b in range(len(pixel_values if input_ids is None else input_ids)):
            ids = None if input_ids is None else input_ids[b].tolist()
            padding = [False] * (0 if ids is None else len(ids))
            if attention_mask is not None:
                padding = [real == 0 for real in attention_mask[b].tolist()]
            samples.append(self.sample(ids, padding, None if pixel_values is None else pixel_values[b], vl_experts))
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*samples, strict=True)]

    def sample(self, ids, padding, pixels, vl_experts):
        tokens = []
        if ids is not None:
            tokens += [("text", i, self.word(word, i)) for i, word in enumerate(ids)]
        if pixels is not None:
            tokens += [("imag", i, self.patch(pixels, i)) for i in range(self.grid**2 + 1)]
        places = [(modality, i) for modality, i, _ in tokens]
        hidden = padding + [False] * (len(tokens) - len(padding))
        joint = ids is not None and pixels is not None
        x = torch.stack([vector for _, _, vector in tokens])
        for layer in range(self.config.num_layers):
            block = f"transformer.blocks.{layer}."
            mask = self.bias(layer, places).masked_fill(torch.tensor(hidden), float("-inf"))
            normed = self.norm(block + "norm1", x)
            x = x + self.gamma(block + "gamma_1") * self.attention(block + "attn.", normed, mask)
            fused = layer >= self.config.first_fusion_layer and (joint or vl_experts)
            rows = []
            for (modality, _), row in zip(places, x, strict=True):
                expert = "vl" if fused else modality
                rows.append(row + self.gamma(block + "gamma_2") * self.feed_forward(block, expert, row))
            x = torch.stack(rows)
        x = self.norm("transformer.norm", x)
        words = 0 if ids is None else len(ids)
        pooled = torch.tanh(self.linear("pooler.dense", x[0])) if joint else None
        return x[:words] if words else None, x[words:] if pixels is not None else None, pooled

    def word(self, word, i):
        table = "text_embeddings.{}_embeddings.weight".format
        vector = self.state[table("word")][word] + self.state[table("token_type")][0]
        if self.config.absolute_positions:
            vector = vector + self.state[table("position")][i]
        return self.norm("text_embeddings.LayerNorm", vector, 1e-12) + self.state["token_type_embeddings.weight"][0]

    def patch(self, pixels, i):
        """The class token first, then patches row by row."""
        if i == 0:
            vector = self.state["transformer.cls_token"][0, 0]
        else:
            row, column = divmod(i - 1, self.grid)
            side = self.config.patch_size
            part = pixels[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            weight, bias = (self.state[f"transformer.patch_embed.proj.{name}"] for name in ("weight", "bias"))
            vector = torch.stack([(kernel * part).sum() for kernel in weight]) + bias
        if self.config.absolute_positions:
            vector = vector + self.state["transformer.pos_embed"][0, i]
        return vector + self.state["token_type_embeddings.weight"][1]

    def bias(self, layer, places):
        """(1, H, S, S): the layer's chunk of the table, looked up for each pair."""
        heads, size = self.config.num_heads, len(places)
        if self.config.absolute_positions:
            return torch.zeros(1, 1, size, size, dtype=torch.float64)
        table = self.state["relative_position_bias_table"][:, layer * heads : (layer + 1) * heads]
        rows = [torch.stack([table[self.table_row(query, key)] for key in places]) for query in places]
        return torch.stack(rows).permute(2, 0, 1)[None]

    def table_row(self, query, key):
        (of, i), (to, j) = query, key
        first_text = self.image_pairs  # 732 at 224 pixels
        if of != to:
            return first_text if of == "text" else first_text + 1
        if of == "text":
            classes = first_text + 2 * 196 - 1  # 1123
            if i == 0 or j == 0:
                return classes + (2 if i == j else 0 if i == 0 else 1)
            return first_text + 196 + j - i  # 928
        if i == 0 or j == 0:
            return self.image_pairs + (-1 if i == j else -3 if i == 0 else -2)
        (row, column), (key_row, key_column) = divmod(i - 1, self.grid), divmod(j - 1, self.grid)
        return (row - key_row + self.grid - 1) * (2 * self.grid - 1) + column - key_column + self.grid - 1

    def attention(self, prefix, x, mask):
        module = Attention(self.config.hidden_size, self.config.num_heads, qkv_bias=True).double()
        module.fused_attn = False
        state = {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}
        return torch.func.functional_call(module, state, (x[None], mask), strict=False)[0]

    def feed_forward(self, block, expert, x):
        hidden = F.gelu(self.linear(f"{block}mlp_{expert}.fc1", self.norm(f"{block}norm2_{expert}", x)))
        return self.linear(f"{block}mlp_{expert}.fc2", hidden)

    def gamma(self, name):
        return 1.0 if self.config.layer_scale is None else self.state[name]

    def norm(self, name, x, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def linear(self, name, x):
        return self.state[f"{name}.weight"] @ x + self.state[f"{name}.bias"]
