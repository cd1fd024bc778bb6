"""An on-disk store of rows by key: immutable segment files, each published atomically. Any number of processes read and write them
without locks between processes.

A segment is a safetensors file with a unique name, memory-mapped when read. Two writers never touch the same file, so a row may be
stored twice, but none is lost. At every moment a flushed row is in some durable segment: the sources of a merged segment are
removed only after it is on disk.

File names contain the number of their format. Files of another format are never read, merged or removed, so versions of the library
that share a folder don't interfere.
"""

import contextlib
import hashlib
import json
import os
import re
import uuid
import warnings
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from .._files import remove_leftovers, write_atomically
from .._locks import Guarded
from .fingerprint import KEY_BYTES, raw_bytes

FORMAT = 2
"""Format version of keys and files; it also covers how a key is computed. Files of format 1 are meta.json and features-*."""
META = f"meta.{FORMAT}.json"
FIELDS = {"format": int, "fingerprint": str, "encoder": str, "width": int, "dtype": str}
PREFIX, SUFFIX = f"features.{FORMAT}-", ".safetensors"
SEGMENT = re.compile(r"features(\.[0-9]+)?-[0-9a-f]+\.safetensors")
"""Name of a segment of any format."""
MANY = 16
"""If a store has at least this many small segments when it is opened, they are merged."""
SMALL = 64 << 20
"""Bytes. A segment below this size counts as small, and a merged segment is closed once it reaches this size."""


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}): delete this one file. That is safe: its content is computed or written again when needed, "
        "and all other files of the cache stay valid"
    )


def _check_of(key: bytes, row: memoryview) -> int:
    return zlib.crc32(row, zlib.crc32(key))


def _pack(keys: list[bytes], features: Tensor, meta: dict[str, Any]) -> bytes:
    rows, size = raw_bytes(features), features[0].nbytes
    checks = [_check_of(key, rows[i * size : (i + 1) * size]) for i, key in enumerate(keys)]
    tensors = {
        "features": features,
        "checks": torch.tensor(checks, dtype=torch.int64),
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES),
    }
    return serialize(tensors, {"mope_fast": json.dumps(meta)})


@dataclass(frozen=True, eq=False)
class Segment:
    """A memory-mapped file of features (N, D). Each row has its key and the CRC-32 of key and row, checked when the row is read."""

    path: Path
    meta: dict[str, Any]
    features: Tensor
    checks: Tensor
    key_table: Tensor

    @classmethod
    def open(cls, path: Path) -> "Segment":
        """Map a file.

        Raises:
            FileNotFoundError: the file is gone: another process merged it into another segment.
            ValueError: the file is not a complete segment.
        """
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["mope_fast"])
                segment = cls(path, meta, *(file.get_tensor(name) for name in ("features", "checks", "keys")))
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            if not path.exists():
                raise FileNotFoundError(path) from error
            raise _damaged(path, error) from error
        count = segment.features.shape[:1]
        if segment.checks.shape != count or segment.key_table.shape != (*count, KEY_BYTES) or segment.checks.dtype != torch.int64:
            raise _damaged(path, "its keys and features don't match")
        return segment

    def keys(self) -> list[bytes]:
        table = bytes(raw_bytes(self.key_table))
        return [table[i : i + KEY_BYTES] for i in range(0, len(table), KEY_BYTES)]

    @cached_property
    def _views(self) -> tuple[memoryview, memoryview]:
        return raw_bytes(self.features), raw_bytes(self.checks).cast("q")

    def row(self, key: bytes, index: int) -> Tensor:
        """Return row (D,), a view of the file; ValueError if its checksum doesn't match."""
        rows, checks = self._views
        size = len(rows) // len(checks)
        if _check_of(key, rows[index * size : (index + 1) * size]) != checks[index]:
            raise _damaged(self.path, f"row {index} doesn't match its checksum")
        return self.features[index]


class FeatureStore(Guarded):
    """Maps keys to feature rows (D,), stored in a folder of one encoder.

    If several threads use it, each must hold ``lock`` while it looks up or adds rows; :meth:`flush` takes the lock itself.

    Args:
        folder: created if it doesn't exist.
        fingerprint: of the encoder.
        encoder: the encoder's name, for messages.
        flush_every: maximum number of rows held in memory.
    """

    def __init__(self, folder: Path, fingerprint: str, encoder: str, flush_every: int):
        super().__init__()
        self.folder, self.fingerprint, self.encoder, self.flush_every = folder, fingerprint, encoder, flush_every
        self.width: int | None = None
        self.dtype: torch.dtype | None = None
        self.pending: dict[bytes, Tensor] = {}
        self._segments: dict[str, Segment] = {}
        self._index: dict[bytes, tuple[Segment, int]] = {}
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, expected the folder of a feature cache: give another path")
        folder.mkdir(parents=True, exist_ok=True)
        self._read_meta()
        self.refresh()
        self._warn_of_other_formats()
        # optional cleanup: reading still works from a folder that can't be written or on a full disk
        with contextlib.suppress(OSError):
            self._remove_leftovers()
            self._merge_small_segments()

    def __contains__(self, key: bytes) -> bool:
        return key in self.pending or key in self._index

    def __len__(self) -> int:
        return len(self._index) + sum(key not in self._index for key in self.pending)

    def get(self, key: bytes) -> Tensor:
        """Return the row (D,) of a known key; ValueError if its file is damaged."""
        if key in self.pending:
            return self.pending[key]
        segment, index = self._index[key]
        try:
            return segment.row(key, index)
        except ValueError:
            # forget the segment so that the store works again once the file is deleted
            self._segments.pop(segment.path.name, None)
            self._index = {k: place for k, place in self._index.items() if place[0] is not segment}
            raise

    def add(self, keys: list[bytes], features: Tensor) -> None:
        """Add rows (N, D), contiguous and on the CPU, of new keys; ValueError if D or dtype differ from those of stored rows."""
        if self.width is not None and (features.shape[1], features.dtype) != (self.width, self.dtype):
            raise ValueError(
                f"{self.encoder} gave features of width {features.shape[1]} in {features.dtype}, but {self.folder} holds width "
                f"{self.width} in {self.dtype}: use another folder, or the encoder that the folder was made with"
            )
        self.width, self.dtype = features.shape[1], features.dtype
        self.pending.update(zip(keys, features, strict=True))
        if len(self.pending) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Write all rows durably; if that fails they stay in memory."""
        with self.lock:
            if self.pending:
                self._write_pending()

    def _write_pending(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / META).exists():
            write_atomically(self.folder / META, json.dumps(self._meta(), indent=2).encode(), replace=False)
        self._read_meta()  # another process may have written it first, for another encoder
        name = f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"
        write_atomically(self.folder / name, _pack(list(self.pending), torch.stack(list(self.pending.values())), self._meta()))
        try:
            self._adopt(name, first=True)
        except FileNotFoundError:  # another process has already merged it
            self.refresh()
        self.pending.clear()

    def refresh(self) -> None:
        """Map the segments that other processes have written."""
        previous = None
        # list again after a change: a segment that disappears before it is opened was merged into one that is listed later
        while (names := {n for n in self._files() if n.startswith(PREFIX) and n.endswith(SUFFIX)}) != previous:
            previous = names
            for name in sorted(names - self._segments.keys()):
                with contextlib.suppress(FileNotFoundError):
                    self._adopt(name)

    def _warn_of_other_formats(self) -> None:
        others = sorted(name for name in self._files() if SEGMENT.fullmatch(name) and not name.startswith(PREFIX))
        if others:
            warnings.warn(
                f"{self.folder} also holds {len(others)} files of another version of mope_fast ({others[0]}, ...): their rows are "
                "not used but computed again; delete them if no process of that version needs them",
                stacklevel=5,
            )

    def _files(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def _adopt(self, name: str, *, first: bool = False) -> None:
        """Add a segment; if a key is already known, the known row stays in use unless ``first`` gives this segment priority."""
        segment = Segment.open(self.folder / name)
        self._check(segment.meta, segment.path)
        if (segment.features.shape[1:], segment.features.dtype) != ((self.width,), self.dtype):
            raise _damaged(segment.path, "its features have another shape or dtype than its metadata says")
        self._segments[name] = segment
        for index, key in enumerate(segment.keys()):
            if first or key not in self._index:
                self._index[key] = segment, index

    def _meta(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        values = (FORMAT, self.fingerprint, self.encoder, self.width, dtype)
        return dict(zip(FIELDS, values, strict=True))

    def _read_meta(self) -> None:
        path = self.folder / META
        try:
            meta = json.loads(path.read_bytes())
        except FileNotFoundError:
            return
        except (ValueError, RecursionError) as error:
            raise _damaged(path, error) from None
        self._check(meta, path)

    def _check(self, meta: Any, path: Path) -> None:
        """Check that metadata is complete and of this encoder, then adopt its width and dtype."""
        whole = isinstance(meta, dict) and all(isinstance(meta.get(name), kind) for name, kind in FIELDS.items())
        if not whole or meta["format"] != FORMAT or isinstance(meta["width"], bool) or meta["width"] < 1:
            raise _damaged(path, f"expected {', '.join(FIELDS)}, of format {FORMAT}")
        dtype = getattr(torch, meta["dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise _damaged(path, f"{meta['dtype']!r} is not a floating-point dtype")
        if meta["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{path} is of another encoder: expected {self.encoder} with fingerprint {self.fingerprint}, got "
                f"{meta['encoder']} with {meta['fingerprint']}; use another folder, or the encoder it was made with"
            )
        if self.width is not None and (meta["width"], dtype) != (self.width, self.dtype):
            raise ValueError(
                f"{path} has features of width {meta['width']} in {dtype}, but the rest of the cache, or this process, has width "
                f"{self.width} in {self.dtype}: use another folder"
            )
        self.width, self.dtype = meta["width"], dtype

    def _remove_leftovers(self) -> None:
        names = [name for name in self._files() if name.startswith((f".{PREFIX}", f".{META}")) and name.endswith(".tmp")]
        remove_leftovers(self.folder, (self.folder / name for name in names))

    def _merge_small_segments(self) -> None:
        small = [s for _, s in sorted(self._segments.items()) if s.features.nbytes < SMALL]
        if len(small) < MANY:
            return
        group: list[Segment] = []
        for segment in small:
            group.append(segment)
            if segment is small[-1] or sum(s.features.nbytes for s in group) >= SMALL:
                if len(group) > 1:
                    self._merge(group)
                group = []

    def _merge(self, group: list[Segment]) -> None:
        # keep all rows of every source, even if another segment has them: another process may be removing that segment
        rows: dict[bytes, Tensor] = {}
        for segment in group:
            for index, key in enumerate(segment.keys()):
                row = segment.row(key, index)
                rows.setdefault(key, row)
        # named after its sources, so that processes that merge the same segments write the same file
        digest = hashlib.blake2b(" ".join(s.path.name for s in group).encode(), digest_size=16).hexdigest()
        name = f"{PREFIX}{digest}{SUFFIX}"
        write_atomically(self.folder / name, _pack(list(rows), torch.stack(list(rows.values())), self._meta()))
        with contextlib.suppress(FileNotFoundError):  # already merged again by another process; the sources stay mapped here
            self._adopt(name, first=True)
        for segment in group:
            segment.path.unlink(missing_ok=True)
            self._segments.pop(segment.path.name)
