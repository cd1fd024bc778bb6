"""Find a data set's files by name: with the spelling on disk, and never outside of the data set's folder."""

import errno
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


class Folder:
    """Finds files that a data set names.

    Each folder is listed once, because checking thousands of files one by one is slow on a network disk. Links are resolved to
    check their targets. A name may be composed (NFC) in a file and decomposed (NFD) on disk, or the other way round.

    Args:
        root: folder that files must be in.
        outside: other folders that they may be in.

    Raises:
        TypeError: ``outside`` is not a list of folders.
    """

    def __init__(self, root: Path, outside: Iterable[str | os.PathLike[str]] = ()):
        if isinstance(outside, (str, bytes, os.PathLike)):
            raise TypeError(f"outside must be a list of folders, got {outside!r}: give [{str(outside)!r}]")
        self.root = root
        self._allowed = [os.path.realpath(folder) for folder in (root, *outside)]
        self._listings: dict[Path, _Listing] = {}

    def allow(self, folder: Path) -> None:
        """Allow files of one more folder, which the caller has named explicitly."""
        self._allowed.append(os.path.realpath(folder))

    def find(self, path: Path) -> Path | None:
        """Return a file's path as spelled on disk; None if it doesn't exist.

        Raises:
            ValueError: it is outside the allowed folders, or several files have that name.
            OSError: a folder can't be listed.
        """
        if path == self.root or "\0" in str(path):
            return None
        listing = self._list(path.parent)
        if listing.refusal:
            raise ValueError(listing.refusal)
        name = listing.files.spelled(path.name) or listing.files.in_other_case(path.name, listing.folder)
        if name is None:
            return None
        found = listing.folder / name
        if listing.files[name]:
            if refusal := self._refusal(found):
                raise ValueError(refusal)
            if not found.is_file():
                return None
        return found

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the files and the folders in a folder, sorted by name; both empty if it doesn't exist.

        A link is in both lists; :meth:`find` follows it.

        Raises:
            ValueError: the folder is outside the allowed folders.
            OSError: the folder can't be listed.
        """
        listing = self._list(folder)
        if listing.refusal:
            raise ValueError(listing.refusal)
        files, folders = ([listing.folder / name for name in sorted(names)] for names in (listing.files, listing.folders))
        return files, folders

    def _list(self, folder: Path) -> "_Listing":
        if folder not in self._listings:
            self._listings[folder] = self._look_into(folder)
        return self._listings[folder]

    def _look_into(self, folder: Path) -> "_Listing":
        if refusal := self._refusal(folder):
            return _Listing(folder, refusal=refusal)
        files, folders = _Names(), _Names()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_file, is_link = entry.is_file(follow_symlinks=False), entry.is_symlink()
                    if is_file or is_link:
                        files[entry.name] = is_link
                    if not is_file:
                        folders[entry.name] = is_link
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            spelled = self._spelled(folder)
            if spelled not in (None, folder):
                return self._look_into(spelled)
        return _Listing(folder, files, folders)

    def _spelled(self, folder: Path) -> Path | None:
        """Return a folder below the root with each part as spelled on disk; None if it doesn't exist."""
        if not folder.is_relative_to(self.root):
            return None
        found = self.root
        for part in folder.relative_to(self.root).parts:
            name = part if part == ".." else self._list(found).folders.spelled(part)
            if name is None:
                return None
            found /= name
        return found

    def _refusal(self, path: Path) -> str | None:
        """Return why this file or folder may not be read, and what to do; None if it may be."""
        if self._allows(path):
            return None
        real = Path(os.path.realpath(path))
        # name the first folder on the path that is outside: for images -> /data/images that is /data/images, not /data/images/a
        way = [each for each in reversed((path / "_").parents) if each.is_relative_to(self.root) and each.name != ".."]
        first = next((each for each in way if os.path.isdir(each) and not self._allows(each)), None)
        first = first or (real.parent if os.path.islink(path) else path)
        return f"{path} is {real}, outside of {self.root}: if it belongs to the data, pass outside=[{os.path.realpath(first)!r}]"

    def _allows(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(folder) for folder in self._allowed)


class _Names(dict[str, bool]):
    """Maps each name in a folder to True if it is a link."""

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        groups = defaultdict(list)
        for name in self:
            groups[_composed(name).casefold()].append(name)
        return groups

    def spelled(self, name: str) -> str | None:
        """Return the name as spelled in this folder: the identical one, else one that is equal after NFC normalization; or None."""
        if name in self:
            return name
        same = [each for each in self._alike.get(_composed(name).casefold(), ()) if _composed(each) == _composed(name)]
        if len(same) > 1:
            raise ValueError(f"{name} may be any of {same}, which differ in how accents are written: rename one of them")
        return same[0] if same else None

    def in_other_case(self, name: str, folder: Path) -> str | None:
        """Return the file that a case-insensitive disk opens under this name, or None."""
        alike = self._alike.get(_composed(name).casefold(), ())
        return alike[0] if len(alike) == 1 and os.path.isfile(folder / name) else None


@dataclass(frozen=True)
class _Listing:
    folder: Path
    """The folder's path as spelled on disk."""
    files: _Names = field(default_factory=_Names)
    folders: _Names = field(default_factory=_Names)
    refusal: str | None = None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
