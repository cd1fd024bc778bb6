"""Which tests run where: kernels on a GPU or in Triton's interpreter, ahead-of-time compilation outside of it."""

import os

import pytest
import torch
from hypothesis import settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
# how long an example takes says nothing on a shared machine
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    skips = {
        "gpu": (not CUDA, "needs a CUDA GPU"),
        "kernel": (not (CUDA or INTERPRETED), "needs a CUDA GPU, or TRITON_INTERPRET=1 in a process of its own"),
        "aot": (INTERPRETED, "the interpreter can't compile"),
    }
    for item in items:
        for marker, (skip, reason) in skips.items():
            if skip and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if CUDA and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
