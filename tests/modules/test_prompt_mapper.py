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


def test_unknown_norm_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"norm must be one of \('batch', 'layer', 'none'\), got 'group'"):
        PromptMapper(20, [32], "group")
