"""Files of a data set's folder, found by name: as the disk spells it, and never outside of the folder."""

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

    Each folder is listed once: a look at each of thousands of files takes long on a network disk. Links are followed to see where
    they lead. A name may be composed (NFC) in a file and decomposed (NFD) on disk, or the other way round.

    Args:
        root: what files have to be in.
        outside: other folders that they may be in.

    Raises:
        TypeError: ``outside`` is no list of folders.
    """

    def __init__(self, root: Path, outside: Iterable[str | os.PathLike[str]] = ()):
        if isinstance(outside, (str, bytes, os.PathLike)):
            raise TypeError(f"outside must be a list of folders, got {outside!r}: give [{str(outside)!r}]")
        self.root = root
        self._allowed = [os.path.realpath(folder) for folder in (root, *outside)]
        self._listings: dict[Path, _Listing] = {}

    def allow(self, folder: Path) -> None:
        """Let in files of one more folder, which somebody has named."""
        self._allowed.append(os.path.realpath(folder))

    def find(self, path: Path) -> Path | None:
        """A file by its path, as the disk spells it; None if there is none.

        Raises:
            ValueError: it is outside, or several files have that name.
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
        """Files and folders in a folder, sorted by name; none where it isn't there. A link is in both: :meth:`find` follows it.

        Raises:
            ValueError: it is outside.
            OSError: it can't be listed.
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
        """A folder below the root as the disk spells each part of it; None if it isn't there."""
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
        """Why this file or folder may not be read, and what to do; None if it may be."""
        if self._allows(path):
            return None
        real = Path(os.path.realpath(path))
        # the first folder on the way that is outside: of images -> /data/images that one, not /data/images/a
        way = [each for each in reversed((path / "_").parents) if each.is_relative_to(self.root) and each.name != ".."]
        first = next((each for each in way if os.path.isdir(each) and not self._allows(each)), None)
        first = first or (real.parent if os.path.islink(path) else path)
        return (
            f"{path} is {real}, outside of {self.root}: if it belongs to the data, outside=[{os.path.realpath(first)!r}] lets it in"
        )

    def _allows(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(folder) for folder in self._allowed)


class _Names(dict[str, bool]):
    """Names in a folder -> whether it is a link."""

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        groups = defaultdict(list)
        for name in self:
            groups[_composed(name).casefold()].append(name)
        return groups

    def spelled(self, name: str) -> str | None:
        """The same name as it is here: the very same one, else one of the same characters."""
        if name in self:
            return name
        same = [each for each in self._alike.get(_composed(name).casefold(), ()) if _composed(each) == _composed(name)]
        if len(same) > 1:
            raise ValueError(f"{name} may be any of {same}, which differ in how accents are written: rename one of them")
        return same[0] if same else None

    def in_other_case(self, name: str, folder: Path) -> str | None:
        """The file that a disk which ignores case opens by this name."""
        alike = self._alike.get(_composed(name).casefold(), ())
        return alike[0] if len(alike) == 1 and os.path.isfile(folder / name) else None


@dataclass(frozen=True)
class _Listing:
    folder: Path
    """As the disk spells it."""
    files: _Names = field(default_factory=_Names)
    folders: _Names = field(default_factory=_Names)
    refusal: str | None = None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
