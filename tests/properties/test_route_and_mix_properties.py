"""Laws that routing obeys for any input; on whatever implementation ``auto`` takes (the kernels, under the interpreter)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mope_fast.functional import route_and_mix
from mope_fast.ops.route_and_mix import INTERPRETED

# ``auto`` takes the kernels there
pytestmark = [pytest.mark.kernel] if INTERPRETED else []
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
laws = settings(max_examples=10 if INTERPRETED else 50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw, max_batch=6):
    """(logits, experts) of odd sizes and any scale; float32, as the kernels take it."""
    batch, experts, rows, width = (draw(st.integers(1, n)) for n in (max_batch, 20, 3, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    logits = torch.randn(batch, experts, generator=generator) * scale
    table = torch.randn(experts, rows, width, generator=generator)
    return logits.to(DEVICE), table.to(DEVICE)


@laws
@given(problems())
def test_scores_add_up_to_one_and_mixtures_lie_between_the_experts(problem):
    logits, experts = problem
    mixed, scores = route_and_mix(logits, experts)
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[:, 0]), rtol=0, atol=1e-6)
    assert ((scores >= 0) & (scores <= 1)).all()
    slack = 1e-5 * experts.abs().max()
    assert (mixed >= experts.amin(0) - slack).all()
    assert (mixed <= experts.amax(0) + slack).all()


@laws
@given(problems(), st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_nothing(problem, shift):
    logits, experts = problem
    # quarters: the shifted logits are exact
    logits, shift = (logits * 4).round() / 4, round(shift * 4) / 4
    for a, b in zip(route_and_mix(logits, experts), route_and_mix(logits + shift, experts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@laws
@given(problems(), st.randoms(use_true_random=False))
def test_a_permutation_of_experts_permutes_the_scores_only(problem, random):
    logits, experts = problem
    order = list(range(len(experts)))
    random.shuffle(order)
    mixed, scores = route_and_mix(logits, experts)
    permuted_mixed, permuted_scores = route_and_mix(logits[:, order], experts[order])
    torch.testing.assert_close(permuted_scores, scores[:, order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(permuted_mixed, mixed, rtol=1e-5, atol=1e-5)


@laws
@given(problems(), st.data())
def test_one_hot_routing_copies_an_expert(problem, data):
    logits, experts = problem
    chosen = data.draw(st.integers(0, len(experts) - 1))
    logits = torch.zeros_like(logits)
    logits[:, chosen] = 1e3
    mixed, scores = route_and_mix(logits, experts)
    assert torch.equal(mixed, experts[chosen].expand_as(mixed))
    assert torch.equal(scores.argmax(-1), torch.full_like(scores[:, 0], chosen, dtype=torch.long))


@laws
@given(problems(), st.data())
def test_a_gate_keeps_the_k_largest_and_their_scores(problem, data):
    logits, experts = problem
    k = data.draw(st.integers(1, len(experts)))
    _, scores = route_and_mix(logits, experts)
    _, gated = route_and_mix(logits, experts, top_k=k)
    _, renormalized = route_and_mix(logits, experts, top_k=k, renormalize=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)
    torch.testing.assert_close(gated, torch.where(kept, scores, 0.0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(renormalized, gated / gated.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_among_equal_logits_the_lower_index_is_kept():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], device=DEVICE)
    _, scores = route_and_mix(logits, torch.randn(5, 2, 20, device=DEVICE), top_k=2)
    assert (scores > 0).tolist() == [[False, True, True, False, False], [True, True, False, False, False]]


@laws
@given(problems())
def test_one_expert_is_copied(problem):
    logits, experts = problem
    mixed, scores = route_and_mix(logits[:, :1], experts[:1])
    assert torch.equal(mixed, experts[:1].expand_as(mixed))
    assert torch.equal(scores, torch.ones_like(scores))


@laws
@given(problems())
def test_a_sample_does_not_see_its_neighbours(problem):
    logits, experts = problem
    mixed, scores = route_and_mix(logits, experts)
    for b in range(len(logits)):
        alone = route_and_mix(logits[b : b + 1], experts)
        torch.testing.assert_close(alone[0][0], mixed[b], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone[1][0], scores[b], rtol=1e-6, atol=1e-7)


@laws
@given(problems())
def test_the_gram_form_is_a_layer_norm_of_the_mixture(problem):
    logits, experts = problem
    centred = experts - experts.mean(-1, keepdim=True)
    rows = centred.transpose(0, 1)
    gram = rows @ rows.mT / experts.shape[-1]
    normed, _ = route_and_mix(logits, centred, gram=gram, eps=1e-2)
    mixed, _ = route_and_mix(logits, experts)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(mixed, mixed.shape[-1:], eps=1e-2), rtol=1e-4, atol=1e-4)


@laws
@given(st.integers(0, 2**31))
def test_experts_that_cancel_have_finite_results_and_gradients(seed):
    """Where a norm's eps is below what rounding makes of ``r' G r``, some of which is negative."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(2, 2, 24, generator=generator)
    experts = torch.cat([experts, -experts.sum(0, keepdim=True)])
    rows = (experts - experts.mean(-1, keepdim=True)).transpose(0, 1)
    logits, experts, gram = (
        t.to(DEVICE).requires_grad_() for t in (torch.zeros(20, 3), rows.transpose(0, 1).contiguous(), rows @ rows.mT / 24)
    )
    with torch.no_grad():
        # a shift changes no score but its rounding
        logits += torch.randn(20, 1, generator=generator).to(DEVICE)
    mixed, scores = route_and_mix(logits, experts, gram=gram, eps=1e-12)
    grads = torch.autograd.grad(mixed, [logits, experts, gram], torch.randn_like(mixed))
    assert all(tensor.isfinite().all() for tensor in (mixed, scores, *grads))


@laws
@given(problems(), st.sampled_from([1e-12, 1e-5, 1e-2]))
def test_a_squared_norm_below_0_is_0_without_a_gradient(problem, eps):
    logits, experts = problem
    logits, experts = logits.requires_grad_(), experts[:, :1].requires_grad_()
    gram = -torch.eye(len(experts), device=DEVICE)[None].requires_grad_()
    mixed, _ = route_and_mix(logits, experts, gram=gram, eps=eps)
    plain = route_and_mix(logits, experts)[0] * eps**-0.5
    torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=0)
    upstream = torch.randn_like(mixed)
    got, expected = (torch.autograd.grad(out, [logits, experts], upstream, retain_graph=True) for out in (mixed, plain))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * eps**-0.5)
    assert torch.count_nonzero(torch.autograd.grad(mixed, gram, upstream)[0]) == 0
