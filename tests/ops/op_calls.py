"""What the tests of the ops share: recorded calls, and an output whose gradient never comes."""

from types import ModuleType
from typing import Any

import pytest
import torch


def record_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[tuple[tuple, Any]]:
    """Arguments and results of the calls to come of a module's function."""
    calls = []
    original = getattr(module, name)

    def recording(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, recording)
    return calls


class Silent(torch.autograd.Function):
    """Hands no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None
