"""Equations 2 to 4 of MoPE (arXiv 2403.10568, version 1), one function each, written as the paper writes them."""

import torch
from torch import Tensor


def prompted_sequence(cls: Tensor, static: Tensor, dynamic: Tensor, mapped: Tensor, tokens: Tensor) -> Tensor:
    """Equation 2: the input of layer i, ``[x_0, P_s, P_d, P_m, T]``.

    Args:
        cls: (B, D), the previous layer's class token.
        static: (L, D), shared by the batch.
        dynamic: (B, L, D), one per sample.
        mapped: (B, D), the complementary feature as one token.
        tokens: (B, T, D), the previous layer's other tokens.

    Returns:
        (B, 1 + L + L + 1 + T, D).
    """
    static = static.expand(len(cls), *static.shape)
    return torch.cat([cls[:, None], static, dynamic, mapped[:, None], tokens], dim=1)


def routing_scores(
    psi_y: Tensor, x_0: Tensor, w_y: Tensor, w_x: Tensor, keys: Tensor, *, temperature: float = 0.1, noise: Tensor | None = None
) -> Tensor:
    """Equation 3: ``r_j = softmax_j(k . v_j / tau + eps)`` with ``k = [psi_y W_y, x_0 W_x]``.

    Args:
        psi_y: (B, d_y), the complementary modality's global feature.
        x_0: (B, d_x), the layer's class token.
        w_y: (d_y, d_c).
        w_x: (d_x, d_i).
        keys: (K, d_c + d_i), the routing embeddings v.
        temperature: tau.
        noise: (B, K), eps; drawn by the caller.

    Returns:
        (B, K), rows add up to one.
    """
    query = torch.cat([psi_y @ w_y, x_0 @ w_x], dim=-1)
    logits = query @ keys.T / temperature
    return torch.softmax(logits if noise is None else logits + noise, dim=-1)


def dynamic_prompt(scores: Tensor, experts: Tensor) -> Tensor:
    """Equation 4: ``P_d = sum_j r_j E_j``; scores (B, K), experts (K, L, D) -> (B, L, D)."""
    return torch.einsum("bk,kld->bld", scores, experts)
