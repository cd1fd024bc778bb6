"""How right is right: errors against a float64 truth, bounded by those of the eager reference in the same dtype."""

import os

import torch
from torch import Tensor

_TRUNCATES = os.environ.get("TRITON_INTERPRET") == "1"


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


def assert_as_good_as_eager(name: str, got: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """RMS and largest error at most twice eager's, plus one unit in the last place of the largest value.

    Triton's interpreter cuts bfloat16 off where hardware rounds it: twice the error of each rounding, of operands and result.
    """
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, expected {eager.dtype}"
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    factor = 6 if _TRUNCATES and dtype == torch.bfloat16 else 2
    slack = torch.finfo(dtype).eps * largest(truth)
    error, eager_error = got.double() - truth, eager.double() - truth
    assert not error.isnan().any(), f"{name}: NaN"
    assert rms(error) <= factor * rms(eager_error) + slack, f"{name}: RMS error {rms(error):.2e}, eager's {rms(eager_error):.2e}"
    assert largest(error) <= factor * largest(eager_error) + slack, (
        f"{name}: largest error {largest(error):.2e}, eager's {largest(eager_error):.2e}"
    )
