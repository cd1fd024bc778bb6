"""MoPE as its released implementation runs it (https://github.com/songrise/MoPE): the same numbers with more work.

Kept from the release: Prompts are tokens of every layer and window. Every layer has a router of small eager operations, with its
own projection of the complementary feature. Experts are expanded to the batch, for all layers of a width at once. Noise is drawn on
the host and copied, also in inference. A mask of the largest score is made but not used. The importance loss branches on values,
for which the host waits twice per layer. For attention in windows, biases and masks are looked up and padded by concatenation in
every call, unshifted layers get a mask of zeros, and **most windows get the prompts of another sample**. Attention of transformers'
encoders is not fused, because the release requests attention maps. The mapper's batch norm stays in eval mode; static prompts have
no dropout. Because of the batch norm and the windows, the numbers equal MoPE's only for a batch of one.

Not kept, so that numbers can be compared: In the release, the first layer of each Swin stage isn't routed (4 of 24 in Swin-B) but
takes the previous stage's outputs at its prompts. Routers also see prompts. Prompts are pooled with the image at the end. A second
GELU and dropout follow the mapper. The importance loss is computed in inference too, with its waits; here only in training.

The release has this for Swin only. Its BERT as the main side has another router (one linear map of the complementary feature) and
another order of prompts, and it has no ViT. For these encoders this module does what the release's Swin code would do, with experts
expanded for all layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.encoders import Parts
from benchmarks.baselines.prompt_tokens import PromptTokensInWindows, RoutedTokens


class PaperLiteral(RoutedTokens):
    """For a transformer whose layers attend to the whole sequence."""

    alone = True

    def __init__(self, parts: Parts, mode: str):
        super().__init__(parts, mode)
        self.bank.mapper.eval()
        if hasattr(parts.encoder, "set_attn_implementation"):
            parts.encoder.set_attn_implementation("eager")

    def is_random(self, mode: str) -> bool:
        return True

    def prepare(self, cross: Tensor) -> None:
        bank = self.bank
        self.cross, count = cross, len(bank.dims)
        self.projections = [part.unflatten(0, (count, -1)).unbind(0) for part in (bank.cross_proj.weight, bank.cross_proj.bias)]
        mapped = bank.mapper(cross)
        self.mapped = {width: F.dropout(row, bank.config.dropout, bank.training)[:, None] for width, row in mapped.items()}
        self.experts, self.static = {}, {}
        for width, stack in bank.stacks.items():
            self.experts[int(width)] = stack.experts.transpose(0, 1).expand(len(cross), -1, -1, -1, -1)  # (B, K, layers, L, D)
            self.static[int(width)] = stack.static_prompt.expand(len(cross), -1, -1, -1)
        self.losses = []

    def importance(self) -> Tensor:
        return torch.stack(self.losses).mean()

    def prompts(self, index: int, x: Tensor) -> Tensor:
        bank, config = self.bank, self.bank.config
        width, position = bank.dims[index], self.positions[index]
        stack, (weights, biases) = bank.stacks[str(width)], self.projections
        own = F.linear(self.pool(x).to(stack.inter_weight.dtype), stack.inter_weight[position], stack.inter_bias[position])
        query = torch.cat([own, F.linear(self.cross, weights[index], biases[index])], dim=1)
        logits = query @ bank.keys[index].T
        noise = torch.randn(logits.shape).to(logits.device, logits.dtype) * config.noise_std
        scores = F.softmax(logits / config.temperature + noise, dim=-1)
        torch.zeros(scores.shape).to(scores.device).scatter_(1, scores.topk(1, dim=-1).indices, 1.0)
        dynamic = torch.einsum("bk,bkld->bld", scores, self.experts[width][:, :, position])
        if torch.is_grad_enabled():
            self.losses.append(self._importance(scores))
        return torch.cat([self.static[width][:, position], dynamic, self.mapped[width]], dim=1).to(x.dtype)

    def _importance(self, scores: Tensor) -> Tensor:
        sums = scores.sum(0)
        mean = sums.mean()
        loss = (sums.std() / mean) ** 2 if mean > 0 else torch.zeros_like(mean)
        return loss if loss > self.bank.config.importance_threshold else torch.zeros_like(loss)


class PaperLiteralInWindows(PromptTokensInWindows, PaperLiteral):
    """For a Swin Transformer."""

    def _window_attention(self, attention: nn.Module, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = self.normed.shape
        count, tokens = len(windows) // batch, windows.shape[1]
        # as in the release: here the window index varies slowest, but in ``windows`` the batch index does
        prompts = self.normed[None].expand(count, -1, -1, -1).reshape(-1, length, width)
        sequence = torch.cat([prompts, windows], dim=1)
        q, k, v = attention.qkv(sequence).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * attention.scale) @ k.mT
        weights = weights + _padded(attention._get_rel_pos_bias()[0], length)
        if mask is None:
            mask = torch.zeros(count, tokens, tokens, device=windows.device, dtype=windows.dtype)
        mask = _padded(mask, length, on_host=True)
        weights = (weights.unflatten(0, (batch, count)) + mask[None, :, None]).flatten(0, 1)
        out = attention.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))
        self.attended = out[:, :length].unflatten(0, (count, batch)).mean(0)
        return out[:, length:]


def _padded(square: Tensor, length: int, on_host: bool = False) -> Tensor:
    """Pad (N, T, T) with leading zeros to (N, length + T, length + T); zeros of rows may be made on the host and copied."""
    count, tokens, _ = square.shape
    rows = torch.zeros(count, length, tokens, device="cpu" if on_host else square.device, dtype=square.dtype).to(square.device)
    columns = torch.zeros(count, length + tokens, length, device=square.device, dtype=square.dtype)
    return torch.cat([columns, torch.cat([rows, square], dim=1)], dim=2)
