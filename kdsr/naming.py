"""Which inputs of a listing are wanted, and under which key each result goes. Knows keys only.

A result keeps the relative key of its input. When its format is another, the extension changes:

- an input whose name has the extension already keeps it (`a.png` to PNG is `a.png`);
- others get it in place of their own (`a.jpg` to PNG is `a.png`), unless that is also the result of another
  input; then each of those keeps its full old name before the new extension (`a.jpg.png`, `a.webp.png`).

So no two inputs share a result, and the answer depends on the names alone, not on the order of the listing.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import numpy as np

from kdsr.codecs.formats import SUFFIXES, output_format, suffix

RECORDS = "_kdsr"
"""Folder under an output that holds records, never images."""

_JUNK_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_JUNK_FOLDERS = {"__macosx", "$recycle.bin", "@eadir", "system volume information", RECORDS}


def is_junk(key: str) -> bool:
    """Whether `key` is what systems leave beside pictures: hidden, a cache, or a record of kdsr itself."""
    *folders, name = key.split("/")
    if any(part.startswith(".") for part in [*folders, name]):
        return True
    return name.lower() in _JUNK_NAMES or any(folder.lower() in _JUNK_FOLDERS for folder in folders)


@dataclass(frozen=True)
class Selection:
    """Which keys are wanted. In a pattern `*` stands for anything, slashes too."""

    include: tuple[str, ...] = ()
    """All keys when there is none."""
    exclude: tuple[str, ...] = ()

    def __contains__(self, key: str) -> bool:
        """Whether `key` is wanted; junk never is."""
        if is_junk(key) or any(fnmatchcase(key, pattern) for pattern in self.exclude):
            return False
        return not self.include or any(fnmatchcase(key, pattern) for pattern in self.include)


@dataclass(frozen=True)
class Naming:
    """How results are called."""

    format: str | None = None
    """Of all results; the input's when not set."""
    suffix: str = ""
    """Put between name and extension."""

    def is_native(self, key: str) -> bool:
        """Whether the name has an extension that its result can have: every unknown one can."""
        found = SUFFIXES.get(PurePosixPath(key).suffix.lower())
        if self.format is not None:
            return found == self.format
        return found is None or output_format(found) == found

    def preferred(self, key: str) -> str:
        """The key of the result when nobody else wants it."""
        path = PurePosixPath(key)
        return str(path.with_name(f"{path.stem}{self.suffix}{self._extension(path)}"))

    def full(self, key: str) -> str:
        """The key of the result when others want the preferred one."""
        path = PurePosixPath(key)
        return str(path.with_name(f"{path.name}{self.suffix}{self._extension(path)}"))

    def _extension(self, path: PurePosixPath) -> str:
        if self.is_native(str(path)):
            return path.suffix
        return suffix(self.format or output_format(SUFFIXES[path.suffix.lower()]))


class Targets:
    """The key of each result. `all_keys` lists the wanted inputs once more, and only when names change.

    Holds 16 bytes for each input then, and nothing else.
    """

    def __init__(self, naming: Naming, all_keys: Callable[[], Iterable[str]]) -> None:
        self._naming, self._all_keys = naming, all_keys
        self._preferred: np.ndarray | None = None

    def __getitem__(self, key: str) -> str:
        """Where the result of `key` goes."""
        target = self._naming.preferred(key)
        if self._naming.is_native(key) or self._wanted(target) < 2:
            return target
        target = self._naming.full(key)
        if not self._wanted(target):
            return target
        name, dot, extension = target.rpartition(".")
        return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}{dot}{extension}"

    def _wanted(self, target: str) -> int:
        """How many inputs prefer `target`."""
        if self._preferred is None:
            digests = (_digest(self._naming.preferred(key)) for key in self._all_keys())
            self._preferred = np.sort(np.fromiter(digests, dtype="S16"))
        digest = np.frombuffer(_digest(target), dtype="S16")
        first, end = (int(np.searchsorted(self._preferred, digest, side)[0]) for side in ("left", "right"))
        return end - first


def _digest(key: str) -> bytes:
    # numpy takes zeros at the end of bytes for padding.
    return hashlib.sha256(key.encode()).digest()[:15] + b"\1"
