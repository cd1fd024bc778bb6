import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mope_fast import PromptMapper


@pytest.mark.parametrize(("cross_dim", "bottleneck"), [(20, 10), (21, 11), (1, 1)])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_mapper_has_one_bottleneck_and_one_up_projection_for_each_width(cross_dim, bottleneck, norm):
    mapper = PromptMapper(cross_dim, [32, 48, 32], norm).eval()
    assert mapper.down.weight.shape == (bottleneck, cross_dim)
    assert {name: tuple(up.weight.shape) for name, up in mapper.up.items()} == {"32": (32, bottleneck), "48": (48, bottleneck)}
    mapped = mapper(torch.randn(3, cross_dim))
    assert {width: tuple(rows.shape) for width, rows in mapped.items()} == {32: (3, 32), 48: (3, 48)}


def test_mapper_is_linear_norm_gelu_linear():
    torch.manual_seed(0)
    mapper = PromptMapper(20, [32], "layer").double()
    cross = torch.randn(4, 20, dtype=torch.float64)
    hidden = F.gelu(F.layer_norm(mapper.down(cross), (10,), mapper.norm.weight, mapper.norm.bias))
    torch.testing.assert_close(mapper(cross)[32], mapper.up["32"](hidden), rtol=1e-12, atol=1e-12)


def test_batch_norm_learns_statistics_in_training():
    mapper = PromptMapper(20, [32], "batch")
    assert isinstance(mapper.norm, nn.BatchNorm1d)
    mapper(torch.randn(8, 20) + 3)
    assert mapper.norm.running_mean.abs().sum() > 0


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sync", [False, True])
def test_batches_that_are_finite_change_a_batch_norm_as_torchs_own(momentum, sync):
    mapper = PromptMapper(20, [32])
    mapper.norm.momentum = momentum
    torchs = copy.deepcopy(mapper.norm)
    if sync:
        mapper = nn.SyncBatchNorm.convert_sync_batchnorm(mapper)
    for _ in range(3):
        cross = torch.randn(8, 20)
        expected = mapper.up["32"](F.gelu(torchs(mapper.down(cross))))
        assert torch.equal(mapper(cross)[32], expected)
    assert mapper.norm.state_dict().keys() == torchs.state_dict().keys()
    for name, buffer in torchs.named_buffers():
        assert torch.equal(mapper.norm.get_buffer(name), buffer), name


@pytest.mark.parametrize("bad", [float("-inf"), float("nan"), 1e30])
def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_statistics_and_shows_in_the_result(bad):
    mapper = PromptMapper(20, [32])
    mapper.norm.momentum = None  # a mean over batches: it must not count this one
    cross = torch.randn(8, 20)
    mapper(cross)
    before = copy.deepcopy(mapper.norm.state_dict())
    spoilt = cross.clone()
    spoilt[3, 7] = bad
    result = mapper(spoilt)[32]
    assert bad == 1e30 or not result.isfinite().all()
    for name, buffer in mapper.norm.state_dict().items():
        assert torch.equal(buffer, before[name]), name
    mapper(cross).popitem()[1].sum().backward()
    assert mapper.norm.num_batches_tracked == 2


def test_an_overflow_under_autocast_leaves_float32_statistics_as_they_were():
    mapper = PromptMapper(20, [32])
    with torch.autocast("cpu", torch.float16):
        hidden = mapper.down(cross := torch.randn(8, 20))
        mapper(cross)
        torchs = nn.BatchNorm1d(10)
        torchs(hidden.float())
        assert mapper.norm.running_var.dtype == torch.float32
        torch.testing.assert_close(mapper.norm.running_var, torchs.running_var, rtol=1e-6, atol=0)
        mapper(cross * 1e6)
    torch.testing.assert_close(mapper.norm.running_var, torchs.running_var, rtol=1e-6, atol=0)


def test_the_guard_of_the_statistics_compiles_and_backward_finds_what_it_kept():
    mapper, cross = PromptMapper(20, [32]), torch.randn(8, 20)
    eager = copy.deepcopy(mapper)
    compiled = torch.compile(mapper, fullgraph=True, backend="aot_eager")
    for x in (cross, torch.full_like(cross, float("inf")), cross + 1):
        compiled(x), eager(x)
    torch.testing.assert_close(mapper.norm.running_mean, eager.norm.running_mean, rtol=1e-6, atol=1e-7)
    (eager(cross)[32] + eager(cross + 1)[32]).sum().backward()
    assert eager.norm.num_batches_tracked == 4


def test_unknown_norm_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"norm must be one of \('batch', 'layer', 'none'\), got 'group'"):
        PromptMapper(20, [32], "group")
