import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mope_fast.functional import importance_loss

RANKS = 2
# float64 on both sides: only the order of sums differs
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


def random_scores(*shape, sharpness=3.0):
    return torch.softmax(sharpness * torch.randn(*shape, dtype=torch.float64), dim=-1).requires_grad_()


@pytest.mark.parametrize("num_experts", [2, 5, 16])
@pytest.mark.parametrize("batch", [1, 7])
def test_even_use_costs_nothing_and_one_expert_for_all_costs_k(batch, num_experts):
    uniform = torch.full((batch, num_experts), 1 / num_experts, dtype=torch.float64)
    assert importance_loss(uniform, threshold=0.0) < 1e-25
    # Imp = (B, 0, ..., 0) has mean B/K and unbiased variance B^2 (1 - 1/K) / (K - 1) = B^2 / K: their ratio is K
    one_hot = torch.eye(num_experts, dtype=torch.float64)[:1].expand(batch, -1)
    torch.testing.assert_close(importance_loss(one_hot), torch.tensor(float(num_experts), dtype=torch.float64), **TOLERANCE)


def test_loss_is_the_squared_variation_of_the_summed_scores():
    torch.manual_seed(0)
    scores = random_scores(6, 5)
    importance = [sum(row) for row in scores.T.tolist()]
    mean = sum(importance) / 5
    variance = sum((x - mean) ** 2 for x in importance) / 4
    assert importance_loss(scores, threshold=0.0).item() == pytest.approx(variance / mean**2, rel=1e-12)


def test_gradient_is_that_of_the_closed_form():
    torch.manual_seed(1)
    assert torch.autograd.gradcheck(lambda s: importance_loss(s, threshold=0.0), (random_scores(3, 4),))


def test_layers_are_averaged_after_their_own_thresholds():
    torch.manual_seed(2)
    scores = random_scores(4, 6, 5, sharpness=1.0)
    alone = torch.stack([importance_loss(layer, threshold=0.0) for layer in scores])
    threshold = alone.sort().values[1:3].mean().item()
    expected = torch.where(alone > threshold, alone, 0.0).mean()
    assert 0 < expected < alone.mean()
    loss = importance_loss(scores, threshold=threshold)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    assert torch.equal(scores.grad.flatten(1).abs().amax(-1) > 0, alone > threshold)


def test_below_the_threshold_value_and_gradient_are_zero():
    torch.manual_seed(3)
    scores = random_scores(6, 5)
    free = importance_loss(scores, threshold=0.0)
    loss = importance_loss(scores, threshold=free.item())
    loss.backward()
    assert loss == 0
    assert torch.count_nonzero(scores.grad) == 0
    assert importance_loss(scores, threshold=free.item() * 0.999) == free


def test_the_threshold_is_a_tenth_by_default():
    # Imp = (1 + d, 1 - d): unbiased variance 2 d^2, mean 1
    for d, kept in ((0.22, False), (0.23, True)):
        loss = importance_loss(torch.tensor([[(1 + d) / 2, (1 - d) / 2]] * 2, dtype=torch.float64))
        assert loss.item() == pytest.approx(2 * d * d if kept else 0.0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e15])
def test_scores_of_any_size_count_by_their_variation(scale):
    scores = torch.rand(6, 5)
    loss = importance_loss((scores * scale).requires_grad_(), threshold=0.0)
    torch.testing.assert_close(loss, importance_loss(scores, threshold=0.0), rtol=1e-2 if scale < 1e-38 else 1e-5, atol=0)


@pytest.mark.parametrize("shape", [(6, 1), (0, 5), (0, 1), (3, 6, 1), (3, 0, 5)])
def test_one_expert_or_an_empty_batch_gives_zero_with_finite_gradients(shape):
    scores = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    loss = importance_loss(scores, threshold=0.0)
    loss.backward()
    assert loss.shape == ()
    assert loss == 0
    assert torch.count_nonzero(scores.grad) == 0


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_sums_are_taken_in_at_least_float32(dtype, expected):
    # in bfloat16 a sum of ones stops at 256
    scores = torch.cat([torch.tensor([[1.0, 0.0]]).expand(600, -1), torch.tensor([[0.0, 1.0]]).expand(400, -1)]).to(dtype)
    loss = importance_loss(scores, threshold=0.0)
    assert loss.dtype == expected
    assert loss.item() == pytest.approx(2 * 0.2**2, rel=1e-5)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_loss_and_gradient_never_wait_for_the_host():
    scores = random_scores(3, 6, 5)
    with Names() as mode:
        importance_loss(scores).backward()
    assert "var" in mode.names
    assert not {"_local_scalar_dense", "item", "is_nonzero", "nonzero"} & mode.names


@pytest.mark.parametrize(
    ("scores", "settings", "error", "message"),
    [
        (torch.ones(5), {}, ValueError, r"scores must be \(B, K\) or \(N, B, K\), got \(5\)"),
        (torch.ones(1, 2, 3, 4), {}, ValueError, r"got \(1, 2, 3, 4\)"),
        (torch.ones(2, 0), {}, ValueError, r"at least one layer and one expert, got \(2, 0\)"),
        (torch.ones(0, 2, 3), {}, ValueError, r"at least one layer and one expert, got \(0, 2, 3\)"),
        (torch.ones(2, 3), {"threshold": -0.1}, ValueError, "threshold must be >= 0 and finite in float32, got -0.1"),
        (torch.ones(2, 3, dtype=torch.int32), {}, TypeError, r"floating-point dtype, got torch.int32"),
        ([[1.0]], {}, TypeError, r"scores must be a torch.Tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(scores, settings, error, message):
    with pytest.raises(error, match=message):
        importance_loss(scores, **settings)


def whole_batch():
    torch.manual_seed(4)
    return nn.Linear(6, 2 * 5).double(), torch.randn(8, 6, dtype=torch.float64)


def scores_of(router, x):
    """(2 layers, B, 5 experts)."""
    return torch.softmax(router(x).unflatten(-1, (2, 5)), dim=-1).transpose(0, 1)


def train_on_a_shard(rank, folder, sizes):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    router, x = whole_batch()
    model = DistributedDataParallel(router)
    start = sum(sizes[:rank])
    loss = importance_loss(scores_of(model, x[start : start + sizes[rank]]), threshold=0.0, process_group=dist.group.WORLD)
    loss.backward()
    torch.save([loss.detach(), *(p.grad for p in router.parameters())], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_together_give_the_loss_and_ddps_gradients_of_the_whole_batch(tmp_path):
    # uneven shards: an average of the ranks' own losses would not do
    mp.spawn(train_on_a_shard, (str(tmp_path), (6, 2)), nprocs=RANKS)
    router, x = whole_batch()
    loss = importance_loss(scores_of(router, x), threshold=0.0)
    loss.backward()
    for rank in range(RANKS):
        got = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(got, [loss.detach(), *(p.grad for p in router.parameters())], **TOLERANCE)
