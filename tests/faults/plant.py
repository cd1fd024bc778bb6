"""Plant each fault of ``faults.py`` in a copy of this checkout and say which test catches it.

    python tests/faults/plant.py [fault ...] [-n COPIES] [--all-tests]

The exit code is 0 if every fault is caught. It is 1 if one is not, if its text isn't in its file any more, or if the tests that are
to catch it don't pass without it.
"""

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
FAILED = 1
"""pytest's exit code for tests that failed; a fault that only breaks an import ends with another one."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS)
"""What ends a test that reads a wrong address."""


class Copy:
    """A checkout of its own, whose code is what its tests import, whatever is installed."""

    def __init__(self, folder: Path):
        self.folder = folder / "checkout"
        self.scratch = folder / "scratch"
        listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():  # not one that was deleted and is still in the index
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.folder / name)
        # else an editable install would answer for this one package, whose folder has another name
        (self.folder / "mope_fast" / "kernels").symlink_to(Path("..", "kernels"), target_is_directory=True)
        code = "import mope_fast.kernels; print(mope_fast.__file__); print(mope_fast.kernels.__file__)"
        for file in self._run(["-c", code], interpreted=False).stdout.splitlines():
            if not Path(file).resolve().is_relative_to(self.folder.resolve()):
                raise SystemExit(f"{file} is imported in place of the copy's: no fault planted there would be seen")

    def test(self, tests: Iterable[str], *, interpreted: bool, more: Sequence[str] = ()) -> subprocess.CompletedProcess:
        """Run pytest on them."""
        return self._run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *more, *tests], interpreted)

    def _run(self, arguments: Sequence[str], interpreted: bool) -> subprocess.CompletedProcess:
        # nothing that an earlier fault has left behind may stand for this one's code
        shutil.rmtree(self.scratch, ignore_errors=True)
        caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {name: str(self.scratch / name.lower()) for name in caches}
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True)

    def plant(self, fault: Fault, all_tests: bool) -> str | None:
        """The test that catches it, None if there is none.

        Raises:
            RuntimeError: the copy doesn't have the fault's text once, or its tests could not be run.
        """
        file = self.folder / fault.file
        sound = file.read_text()
        if (count := sound.count(fault.text)) != 1:
            raise RuntimeError(f"its text is {count} times in {fault.file}")
        # what is run for every push has to catch it
        runs = [(fault.tests, fault.interpreted, ["-m", "not slow"])]
        if all_tests:
            runs.append((["tests"], False, []))
        file.write_text(sound.replace(fault.text, fault.replacement))
        try:
            for tests, interpreted, chosen in runs:
                run = self.test(tests, interpreted=interpreted, more=["-x", "--ignore=tests/faults", *chosen])
                if run.returncode == FAILED:
                    return _first_failed(run.stdout)
                if -run.returncode in CRASHES:
                    return f"{signal.Signals(-run.returncode).name} in {', '.join(tests)}"
                if run.returncode:
                    raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout[-1000:]}{run.stderr[-1000:]}")
        finally:
            file.write_text(sound)
        return None


def _first_failed(output: str) -> str:
    return re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)[1]


def _check_sound(copy: Copy, faults: Sequence[Fault]) -> None:
    """Ends the program unless all tests that are to catch these pass, none of them skipped, in a copy without a fault."""
    for interpreted in (False, True):
        tests = sorted({test for fault in faults if fault.interpreted == interpreted for test in fault.tests})
        if tests and ((run := copy.test(tests, interpreted=interpreted)).returncode or "\nSKIPPED" in run.stdout):
            raise SystemExit(f"without any fault these tests don't all pass:\n{run.stdout[-4000:]}{run.stderr[-2000:]}")


def main() -> int:
    names = [fault.name for fault in FAULTS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("faults", nargs="*", metavar="fault", help="its name; all without one")
    parser.add_argument("-n", type=int, default=1, metavar="COPIES", help="faults planted at a time, each in a copy of its own")
    parser.add_argument("--all-tests", action="store_true", help="run all tests where those that are to catch a fault don't")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.faults if name not in names]:
        parser.error(f"there is no fault {unknown[0]!r} in faults.py")
    if arguments.n < 1:
        parser.error(f"-n must be at least 1, got {arguments.n}")
    faults = [fault for fault in FAULTS if not arguments.faults or fault.name in arguments.faults]

    with tempfile.TemporaryDirectory() as folder:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(min(arguments.n, len(faults))):
            copies.put(Copy(Path(folder, str(number))))
        copy = copies.get()
        print("without a fault ...", flush=True)
        _check_sound(copy, faults)
        copies.put(copy)

        def planted(fault: Fault) -> bool:
            copy, started = copies.get(), time.monotonic()
            try:
                by = copy.plant(fault, arguments.all_tests)
            except RuntimeError as error:
                by, problem = None, f"ERROR: {error}"
            else:
                problem = "NOT CAUGHT"
            finally:
                copies.put(copy)
            print(f"{fault.name:{width}} | {by or problem} | {time.monotonic() - started:.0f}", flush=True)
            return by is not None

        width = max(len(fault.name) for fault in faults)
        print(f"{'fault':{width}} | caught by | seconds", flush=True)
        with ThreadPoolExecutor(arguments.n) as pool:
            caught = sum(pool.map(planted, faults))
    print(f"{caught} of {len(faults)} faults are caught")
    return int(caught < len(faults))


if __name__ == "__main__":
    sys.exit(main())
