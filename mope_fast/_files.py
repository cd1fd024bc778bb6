"""Files that are there whole or not at all, whenever a process is killed."""

import os
import time
import uuid
from pathlib import Path

LEFTOVER_AGE = 3600.0
"""Seconds; no process takes so long to write one file: an older temporary one is of a killed process."""


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Publish a whole, durable file; with ``replace`` False an existing one stays."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            publish_first(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name too must outlast a power cut
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


def is_leftover(path: Path) -> bool:
    """Whether it is older than any file that is still being written; False for one that is gone."""
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_AGE
    except FileNotFoundError:
        return False
