"""The kernels in Triton's interpreter: pytest on their tests in processes of its own.

``-x`` and ``-m`` are passed on. ``-k``, ``--lf`` and ids are not, because they choose among these processes: for one test of theirs
type ``TRITON_INTERPRET=1 pytest tests/kernels -k ...``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

TESTS = Path(__file__).parent
# a process for each, those that take longest first
PATHS = sorted(TESTS.glob("kernels/test_*.py"), key=lambda file: -file.stat().st_size)
PATHS.insert(2, TESTS / "properties")
# pytest-xdist's would make the new process one of its own, the user's options are passed on below
OTHERS = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID")
OLD_TRITON, NEW_NUMPY = triton.__version__.startswith("3.6."), tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter"),
    pytest.mark.skipif(OLD_TRITON and NEW_NUMPY, reason="the interpreter of Triton 3.6 needs NumPy below 2.4"),
    pytest.mark.timeout(1500),
    pytest.mark.kernel,
]
NOTHING_CHOSEN = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize("path", [path.relative_to(TESTS).as_posix() for path in PATHS])
def test_kernels_in_the_interpreter(path, request):
    option = request.config.option
    chosen = f"kernel and ({option.markexpr})" if option.markexpr else "kernel"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-rfEs", "--color=no", "-p", "no:cacheprovider"]
    command += ["-m", chosen, f"--maxfail={option.maxfail or 0}", str(TESTS / path)]
    environment = {name: value for name, value in os.environ.items() if name not in OTHERS} | {"TRITON_INTERPRET": "1"}
    try:
        run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1400)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"TRITON_INTERPRET=1 {' '.join(command)} takes more than 1,400 s\n{error.stdout[-20000:]!s}", pytrace=False)
    if run.returncode == NOTHING_CHOSEN and option.markexpr:
        pytest.skip(f"-m {option.markexpr!r} chooses none of {path}")
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED") and "needs a CUDA GPU" not in line]
    # all of them skipped is an exit code of 0 too
    if run.returncode or skipped or not re.search(r"^\d+ passed", run.stdout, re.MULTILINE):
        pytest.fail(f"TRITON_INTERPRET=1 {' '.join(command)}\n{run.stdout[-20000:]}{run.stderr[-2000:]}", pytrace=False)
