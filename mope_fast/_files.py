"""Write files atomically: even if the process is killed, a file is either complete or absent."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LEFTOVER_AGE = 3600.0
"""Seconds. No process takes this long to write one file, so an older temporary file comes from a killed process."""


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a whole, durable file; with ``replace`` False an existing file is kept."""
    with published(path, replace=replace) as file:
        file.write(data)


@contextmanager
def published(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file for the block; after it the file is made durable and gets its name; if it raises, it is removed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            publish_first(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    make_names_durable(path)


def make_names_durable(path: Path) -> None:
    """Wait until the names in the file's folder would survive a power failure."""
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish_first(temporary: Path, path: Path) -> None:
    """Rename the temporary file, unless the name is taken; it is removed in either case."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(temporary, path)
        return
    temporary.unlink()


def remove_leftovers(folder: Path, files: Iterable[Path]) -> None:
    """Remove those of ``files`` (files or folders in ``folder``) that are too old to be still in use by a writer."""
    if not (files := list(files)):
        return
    # time by the file system's clock: another machine's, or this one's a moment ago, may be hours away from ours
    with tempfile.TemporaryFile(dir=folder) as file:
        now = os.fstat(file.fileno()).st_mtime
    for path in files:
        try:
            if now - path.stat().st_mtime <= LEFTOVER_AGE:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            pass
