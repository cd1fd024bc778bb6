"""Sums over routing scores, kept on the scores' device, so that a step needs no synchronisation and stores no scores."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class Sums:
    """Statistics of all scores seen, in float64: 8 * N * K * (steps' windows + C + 2 * top + 1) bytes, for any number of samples.

    A sample's scores are divided by their sum in each layer, which makes a difference only with ``top_k`` without ``renormalize``.
    Samples whose scores are negative or not finite, or that were not routed, count only in ``counts``.
    """

    counts: Tensor  # (3,): samples counted, not finite, not routed
    scores: Tensor  # (N, K)
    entropy: Tensor  # (N,), in nats
    top_scores: Tensor  # (N, K, T), not divided by their sum, in descending order; -inf for empty places
    top_ids: Tensor  # (N, K, T), int64
    windows: Tensor  # (W, N, K + 1): scores and entropy of each window of steps
    window_counts: Tensor  # (W,)
    classes: Tensor  # (C + 1, N, K), weighted by multi-label weights; the last row is for labels out of range
    class_counts: Tensor  # (C + 1,)

    @classmethod
    def empty(cls, layers: int, experts: int, windows: int, top: int, device: torch.device | str = "cpu") -> "Sums":
        """Create sums of no samples, without classes."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            counts=zeros(3), scores=zeros(layers, experts), entropy=zeros(layers),
            top_scores=zeros(layers, experts, top) - float("inf"), top_ids=zeros(layers, experts, top).long() - 1,
            windows=zeros(windows, layers, experts + 1), window_counts=zeros(windows),
            classes=zeros(1, layers, experts), class_counts=zeros(1),
        )  # fmt: skip

    def with_classes(self, num_classes: int) -> "Sums":
        """Return these sums with empty sums of classes added."""
        classes = self.classes.new_zeros(num_classes + 1, *self.scores.shape)
        return replace(self, classes=classes, class_counts=classes.new_zeros(num_classes + 1))

    def cpu(self) -> "Sums":
        """Return a copy on the CPU; this waits for the device."""
        return Sums(*(getattr(self, item.name).detach().to("cpu", copy=True) for item in fields(self)))

    def add(self, scores: Tensor, labels: Tensor | None, ids: Tensor, window: int) -> None:
        """Count one batch.

        Args:
            scores: (N, B, K) routing scores.
            labels: (B,) int64 classes or (B, C) weights; samples with classes out of range or non-finite weights have no class.
            ids: (B,) int64 sample ids.
            window: index of the step's window.
        """
        device = self.scores.device
        scores, ids = scores.to(device, torch.float64), ids.to(device, non_blocking=True)
        total = scores.sum(-1, keepdim=True)
        finite = (total.isfinite() & (scores.amin(-1, keepdim=True) >= 0)).all(0).squeeze(-1)
        routed = (total != 0).all(0).squeeze(-1)
        counted = finite & routed
        shares = torch.where(counted[:, None], scores / total, 0)  # (N, B, K)
        total, entropy = shares.sum(1), torch.special.entr(shares).sum((1, 2))
        self.counts += torch.stack([counted.sum(), (~finite).sum(), (finite & ~routed).sum()])
        self.scores += total
        self.entropy += entropy
        self.windows[window].add_(torch.cat([total, entropy[:, None]], dim=1))
        self.window_counts[window].add_(counted.sum())
        if labels is not None:
            self._add_classes(shares, labels.to(device, non_blocking=True), counted)
        self._keep_top(torch.where(counted[:, None], scores, float("-inf")), ids)

    def plus(self, other: "Sums") -> "Sums":
        """Return the sums over both sets of samples, given the same windows and classes; a shared top sample counts once."""
        sums = {item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)}
        total = Sums(**{**sums, "top_scores": self.top_scores, "top_ids": self.top_ids})
        known = (other.top_ids[..., None] == self.top_ids[..., None, :]).any(-1)
        total._merge_top(other.top_scores.masked_fill(known, float("-inf")), other.top_ids)
        return total

    def merge_windows(self) -> None:
        """Merge pairs of windows into one, which frees the second half."""
        half = len(self.windows) // 2
        for sums in (self.windows, self.window_counts):
            sums[:half] = sums[0::2] + sums[1::2]
            sums[half:] = 0

    def _add_classes(self, shares: Tensor, labels: Tensor, counted: Tensor) -> None:
        if labels.dim() == 2:
            known = labels.isfinite().all(1) & counted
            weights = torch.where(known[:, None], labels, 0).to(torch.float64)
            self.classes[:-1] += torch.einsum("bc,nbk->cnk", weights, shares)
            self.class_counts[:-1] += weights.sum(0)
            self.class_counts[-1] += (counted & ~known).sum()
            return
        none = len(self.classes) - 1
        rows = torch.where((labels >= 0) & (labels < none), labels, none).long()
        self.classes.index_add_(0, rows, shares.transpose(0, 1))
        self.class_counts.index_add_(0, rows, counted.to(torch.float64))

    def _keep_top(self, scores: Tensor, ids: Tensor) -> None:
        # a repeated sample counts with its last score, also within a batch
        order = ids.argsort(stable=True)
        comes_again = torch.zeros_like(ids, dtype=torch.bool)
        comes_again[order[:-1]] = ids[order[1:]] == ids[order[:-1]]
        scores = torch.where(comes_again[:, None], float("-inf"), scores)
        again = (self.top_ids[..., None] == ids).any(-1)
        kept = torch.where(again, float("-inf"), self.top_scores)
        self.top_scores = kept
        self._merge_top(scores.transpose(1, 2), ids.expand(*kept.shape[:2], -1))

    def _merge_top(self, scores: Tensor, ids: Tensor) -> None:
        """Keep the best of the current top samples and these, (N, K, M) each."""
        top = self.top_scores.shape[2]
        # a stable sort keeps the first one seen among equal scores, however samples are batched
        best, index = torch.cat([self.top_scores, scores], dim=2).sort(dim=2, descending=True, stable=True)
        self.top_scores = best[..., :top]
        self.top_ids = torch.cat([self.top_ids, ids], dim=2).gather(2, index[..., :top])
