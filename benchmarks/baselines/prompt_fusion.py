"""Other ways of fusing two frozen encoders by prompts: PMF and PromptFuse, each as its paper has it.

On transformers' BERT (text) and DINOv2 (image), called layer by layer.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
"""Tokens (B, S, D) -> (B, S, D); what is appended to a text is never hidden by its mask."""


def text_layers(bert: nn.Module, mask: Tensor) -> list[Layer]:
    """BERT's layers for texts of this mask (B, S), with or without tokens appended."""

    def run(layer: nn.Module, tokens: Tensor) -> Tensor:
        appended = mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])
        return layer(tokens, attention_mask=torch.cat([mask, appended], dim=1).bool()[:, None, None])

    return [functools.partial(run, layer) for layer in bert.encoder.layer]


class PMF(nn.Module):
    """Interactive prompting (PMF, Li et al., CVPR 2023, arXiv 2304.06306): both encoders run, and tell each other of what they saw.

    The last layers run twice. First each with query context prompts and query prompts behind its tokens: a query prompt's output,
    mapped by a bottleneck, is the other side's prompt. Then each with fusion context prompts and what it was told. Outputs at
    prompts are dropped. The logits are the mean of both sides'. In the authors' code fusion context prompts get no gradient, by an
    oversight; here they do.

    Args:
        text, image: frozen BERT and DINOv2, of any widths.
        head: both class tokens side by side -> logits. The paper's mean of a linear head's logits a side is a linear head on both.
        layers: how many of the last layers fuse.
        length: rows of each kind of prompt.
        bottleneck: of the maps between both.
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
        """Logits (B, C)."""
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

        asked = {}
        for side, seen in tokens.items():
            queried = layers[side](torch.cat([seen, prompt(side, "query_context"), prompt(side, "query")], dim=1))
            asked[side] = queried[:, -self.prompts[f"{side}_query"].shape[1] :]
        fused = {}
        for side, other in (("text", "image"), ("image", "text")):
            told = self.told[f"{other}_to_{side}"][index](asked[other])
            length = tokens[side].shape[1]
            fused[side] = layers[side](torch.cat([tokens[side], prompt(side, "fusion_context"), told], dim=1))[:, :length]
        return fused


class PromptFuse(nn.Module):
    """PromptFuse (Liang et al., Findings of ACL 2022): a picture's feature and trained prompts are tokens of a frozen BERT's input.

    Args:
        text: BERT.
        head: the class token -> logits.
        length: number of prompts, which with the head are all that is trained.
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
        """Logits (B, C) of texts and pictures' features (B, n * D), which are n tokens."""
        words = self.text.get_input_embeddings()(text["input_ids"])
        seen = feature.unflatten(-1, (-1, words.shape[-1]))
        added = torch.cat([seen, self.prompts.expand(len(words), -1, -1)], dim=1)
        mask = torch.cat([text["attention_mask"].new_ones(added.shape[:2]), text["attention_mask"]], dim=1)
        output = self.text(inputs_embeds=torch.cat([added, words], dim=1), attention_mask=mask)
        return self.head(output.last_hidden_state[:, added.shape[1]])
