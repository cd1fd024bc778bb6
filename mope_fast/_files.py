"""Files that are there whole or not at all, whenever a process is killed."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LEFTOVER_AGE = 3600.0
"""Seconds; no process takes so long to write one file: an older temporary one is of a killed process."""


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Publish a whole, durable file; with ``replace`` False an existing one stays."""
    with published(path, replace=replace) as file:
        file.write(data)


@contextmanager
def published(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write to in the block, which has its name when that has ended, whole and durable, and is gone if it raises."""
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
    """Wait until the names in a file's folder would outlast a power cut."""
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish_first(temporary: Path, path: Path) -> None:
    """Rename, unless the name is taken; the temporary file is gone in either case."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(temporary, path)
        return
    temporary.unlink()


def remove_leftovers(folder: Path, files: Iterable[Path]) -> None:
    """Remove those files, and folders, of a folder that are older than any that is still being written."""
    if not (files := list(files)):
        return
    # the file system's own clock: another machine's, or this one's a moment ago, may be hours away from ours
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
