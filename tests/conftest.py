"""Which tests run where, and how long one may take: kernels on a GPU or in Triton's interpreter, compilers outside of it."""

import os

import pytest
import torch
from hypothesis import settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
SECONDS = 300
"""What a test may take where pytest-timeout is installed, if its own mark doesn't say otherwise."""
# how long an example takes says nothing on a shared machine
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config):
    # pytest-xdist: a process is given one test after another, so that none is left with the long ones
    if getattr(config.option, "maxschedchunk", 0) is None:
        config.option.maxschedchunk = 1


@pytest.hookimpl(trylast=True)  # when -k and -m have chosen
def pytest_collection_modifyitems(config, items):
    interpreted = [item for item in items if item.path.name == "test_in_the_interpreter.py"]
    others = [item for item in items if item not in interpreted]
    covered = {item.callspec.params["file"] for item in interpreted} if not (CUDA or INTERPRETED) else set()
    elsewhere = [
        item for item in others if item.get_closest_marker("kernel") and f"{item.path.parent.name}/{item.path.name}" in covered
    ]
    # they are no skips of ours: another process runs them
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [*interpreted, *(item for item in others if item not in elsewhere)]

    skips = {
        "gpu": (not CUDA, "needs a CUDA GPU"),
        "kernel": (not (CUDA or INTERPRETED), "needs a CUDA GPU, or the interpreter: tests/test_in_the_interpreter.py"),
        "aot": (INTERPRETED, "the interpreter can't compile"),
    }
    limited = config.pluginmanager.hasplugin("timeout") and config.getoption("timeout") is None
    for item in items:
        for marker, (skip, reason) in skips.items():
            if skip and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        if limited and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if CUDA and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
