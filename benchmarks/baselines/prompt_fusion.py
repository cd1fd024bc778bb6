"""Other methods that fuse two frozen encoders by prompts: PMF and PromptFuse, each as in its paper.

They use transformers' BERT (text) and DINOv2 (image), called layer by layer.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
"""Maps tokens (B, S, D) to (B, S, D); tokens appended to a text are never masked out."""


def text_layers(bert: nn.Module, mask: Tensor) -> list[Layer]:
    """Return BERT's layers for texts with this mask (B, S); they accept appended tokens."""

    def run(layer: nn.Module, tokens: Tensor) -> Tensor:
        appended = mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])
        return layer(tokens, attention_mask=torch.cat([mask, appended], dim=1).bool()[:, None, None])

    return [functools.partial(run, layer) for layer in bert.encoder.layer]


class PMF(nn.Module):
    """Interactive prompting (PMF, Li et al., CVPR 2023, arXiv 2304.06306): both encoders exchange prompts in their last layers.

    Each of the last layers runs twice. First it runs with query context prompts and query prompts appended to its tokens; the
    outputs at query prompts, mapped by a bottleneck, are prompts of the other side. Then it runs with fusion context prompts and
    the prompts received from the other side. Outputs at prompts are dropped. The logits are the mean of both sides'. In the
    authors' code fusion context prompts get no gradient, by an oversight; here they do.

    Args:
        text, image: frozen BERT and DINOv2, of any widths.
        head: maps both concatenated class tokens to logits. The paper's mean of two linear heads' logits, one per side, equals a
            linear head on both.
        layers: number of last layers that fuse.
        length: number of tokens of each kind of prompt.
        bottleneck: hidden width of the maps between both sides.
    """

    def __init__(self, text: nn.Module, image: nn.Module, head: nn.Module, layers: int = 2, length: int = 4, bottleneck: int = 384):
        super().__init__()
        self.text, self.image = (encoder.requires_grad_(False).eval() for encoder in (text, image))
        self.fused = layers
        widths = {"text": text.config.hidden_size, "image": image.config.hidden_size}
        kinds = ("query", "query_context", "fusion_context")
        self.prompts = nn.ParameterDict(
            {f"{side}_{kind}": torch.randn(layers, length, width) * 0.02 for side, width in widths.items() for kind in kinds}
        )
        pairs = (("text", "image"), ("image", "text"))
        self.told = nn.ModuleDict({
            f"{source}_to_{target}": nn.ModuleList(
                nn.Sequential(nn.Linear(widths[source], bottleneck), nn.GELU(), nn.Linear(bottleneck, widths[target]))
                for _ in range(layers)
            )
            for source, target in pairs
        })  # fmt: skip
        self.head = head

    def train(self, mode: bool = True) -> "PMF":
        super().train(mode)
        self.text.eval()
        self.image.eval()
        return self

    def forward(self, text: dict[str, Tensor], pictures: Tensor) -> Tensor:
        """Return logits (B, C)."""
        layers = {"text": text_layers(self.text, text["attention_mask"]), "image": list(self.image.encoder.layer)}
        tokens = {"text": self.text.embeddings(text["input_ids"]), "image": self.image.embeddings(pictures)}
        with torch.no_grad():
            for side in tokens:
                for layer in layers[side][: -self.fused]:
                    tokens[side] = layer(tokens[side])
        for index in range(self.fused):
            tokens = self._fused(index, {side: layers[side][index - self.fused] for side in tokens}, tokens)
        return self.head(torch.cat([tokens["text"][:, 0], self.image.layernorm(tokens["image"])[:, 0]], dim=-1))

    def _fused(self, index: int, layers: dict[str, Layer], tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        def prompt(side: str, kind: str) -> Tensor:
            return self.prompts[f"{side}_{kind}"][index].expand(len(tokens[side]), -1, -1)

        queries = {}
        for side, own in tokens.items():
            output = layers[side](torch.cat([own, prompt(side, "query_context"), prompt(side, "query")], dim=1))
            queries[side] = output[:, -self.prompts[f"{side}_query"].shape[1] :]
        fused = {}
        for side, other in (("text", "image"), ("image", "text")):
            received = self.told[f"{other}_to_{side}"][index](queries[other])
            length = tokens[side].shape[1]
            fused[side] = layers[side](torch.cat([tokens[side], prompt(side, "fusion_context"), received], dim=1))[:, :length]
        return fused


class PromptFuse(nn.Module):
    """PromptFuse (Liang et al., Findings of ACL 2022): a picture's feature and trained prompts are tokens of a frozen BERT's input.

    Args:
        text: BERT.
        head: maps the class token to logits.
        length: number of prompts; only they and the head are trained.
    """

    def __init__(self, text: nn.Module, head: nn.Module, length: int = 20):
        super().__init__()
        self.text = text.requires_grad_(False).eval()
        self.prompts = nn.Parameter(torch.randn(length, text.config.hidden_size) * 0.02)
        self.head = head

    def train(self, mode: bool = True) -> "PromptFuse":
        super().train(mode)
        self.text.eval()
        return self

    def forward(self, text: dict[str, Tensor], feature: Tensor) -> Tensor:
        """Return logits (B, C) from texts and picture features (B, n * D), which are used as n tokens."""
        words = self.text.get_input_embeddings()(text["input_ids"])
        picture = feature.unflatten(-1, (-1, words.shape[-1]))
        added = torch.cat([picture, self.prompts.expand(len(words), -1, -1)], dim=1)
        mask = torch.cat([text["attention_mask"].new_ones(added.shape[:2]), text["attention_mask"]], dim=1)
        output = self.text(inputs_embeds=torch.cat([added, words], dim=1), attention_mask=mask)
        return self.head(output.last_hidden_state[:, added.shape[1]])
