"""Which tests run where, and how long one may take: kernels on a GPU or in Triton's interpreter, compilers outside of it."""

import os
from pathlib import Path

import mope_fast.kernels
import numpy as np
import pytest
import torch
from hypothesis import settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TESTS = Path(__file__).parent
ROOT = TESTS.parent
CUDA = torch.cuda.is_available()
SKIPS = {
    "gpu": (not CUDA, "needs a CUDA GPU"),
    "kernel": (not (CUDA or INTERPRETED), "needs a CUDA GPU, or the interpreter: tests/test_in_the_interpreter.py"),
    "aot": (INTERPRETED, "the interpreter can't compile"),
}
SECONDS = 300
"""What a test may take where pytest-timeout is installed, if its own mark doesn't say otherwise."""
# how long an example takes says nothing on a shared machine
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config):
    # an editable install of another checkout would give its kernels to this one's package
    found = [Path(module.__file__).resolve() for module in (mope_fast, mope_fast.kernels)]
    if found[0].is_relative_to(ROOT.resolve()) and not found[1].is_relative_to(ROOT.resolve()):
        raise pytest.UsageError(f"{found[0]} is tested with the kernels of {found[1].parent}: pip install -e . in this checkout")
    # pytest-xdist: a process is given one test after another, so that none is left with the long ones
    if getattr(config.option, "maxschedchunk", 0) is None:
        config.option.maxschedchunk = 1


def _is_interpreter(item):
    return item.path.name == "test_in_the_interpreter.py"


def pytest_itemcollected(item):
    expression = item.config.option.markexpr
    if _is_interpreter(item) and "slow" in expression and "not slow" not in expression:
        item.add_marker("slow")  # some of those within are


@pytest.hookimpl(trylast=True)  # when -k and -m have chosen
def pytest_collection_modifyitems(config, items):
    interpreted = [item for item in items if _is_interpreter(item)]
    others = [item for item in items if item not in interpreted]
    covered = [TESTS / item.callspec.params["path"] for item in interpreted if not (CUDA or INTERPRETED)]
    elsewhere = [
        item for item in others if item.get_closest_marker("kernel") and any(item.path.is_relative_to(path) for path in covered)
    ]
    # another process runs them, so they are not skipped
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [*interpreted, *(item for item in others if item not in elsewhere)]

    limited = config.pluginmanager.hasplugin("timeout") and config.getoption("timeout") is None
    for item in items:
        if limited and item.path.is_relative_to(TESTS) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SECONDS))


def pytest_runtest_setup(item):
    # skipped from here, all with one reason are one line of the summary
    for marker, (skip, reason) in SKIPS.items():
        if skip and item.get_closest_marker(marker) and not _is_interpreter(item):
            pytest.skip(reason)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if CUDA and not INTERPRETED else "cpu")


@pytest.fixture
def rowwise_products(monkeypatch):
    """Make a row's bits independent of its place in a tile, as on a GPU.

    In the interpreter a tile's product is NumPy's, whose rounding in float32 depends on that with some CPUs.
    """
    if INTERPRETED:
        matmul = np.matmul
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: matmul(a, b, dtype=np.float64).astype(dtype))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
