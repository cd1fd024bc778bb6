"""Forms of ``route_and_mix``: the same function with the same dtype rules (softmax in float32, products in the table's dtype).

None of them concatenates the prompts: that belongs to the prompt assembly, which is the same for all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mope_fast import functional

TEMPERATURE = 0.1
EPS = 1e-5

Provider = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _scores(logits: Tensor) -> Tensor:
    return torch.softmax(logits.float() / TEMPERATURE, dim=-1)


def _normalised(mixed: Tensor, norm_sq: Tensor) -> Tensor:
    return (mixed * torch.rsqrt(norm_sq + EPS)[..., None]).to(mixed.dtype)


def literal(logits: Tensor, experts: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the paper's equations literally: the experts are expanded to (B, K, L, M), weighted and summed over K."""
    scores = _scores(logits)
    table = experts.expand(logits.shape[0], *experts.shape)
    mixed = torch.einsum("bk,bklm->blm", scores.to(experts.dtype), table)
    if gram is not None:
        mixed = _normalised(mixed, torch.einsum("bi,lij,bj->bl", scores, gram, scores))
    return mixed, scores


def matmul(logits: Tensor, experts: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the best eager rewrite: one (B, K) x (K, L M) product, without expanded experts."""
    scores = _scores(logits)
    mixed = (scores.to(experts.dtype) @ experts.flatten(1)).unflatten(1, experts.shape[1:])
    if gram is not None:
        mixed = _normalised(mixed, ((scores @ gram) * scores).sum(-1).T)
    return mixed, scores


def fused(logits: Tensor, experts: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Call the public function with ``impl="auto"``: argument checks and choice of implementation included."""
    return functional.route_and_mix(logits, experts, temperature=TEMPERATURE, gram=gram, eps=EPS)


def _compiled(function: Provider) -> Provider:
    return torch.compile(function, fullgraph=True, dynamic=False)


EAGER = {"literal": literal, "matmul": matmul}
COMPILED = {"literal-compiled": literal, "matmul-compiled": matmul}
OURS = {"mope_fast": fused}
NAMES = [*EAGER, *COMPILED, *OURS]


def build(name: str) -> Provider:
    """Return a provider by name; a compiled one starts from an empty cache and specializes for the sizes that it gets."""
    if name in COMPILED:
        torch.compiler.reset()
        return _compiled(COMPILED[name])
    return (EAGER | OURS)[name]
