"""A folder of whole files on a local disk, no larger than it may be, that the processes of a machine share.

A file grows as ``NAME.partial`` and is renamed when all of it is there. Whoever fetches it holds a lock on that file,
so that another process waits instead of fetching it, too; a lock ends with its process, so that what a killed one left
is known for what it is. Room is taken under the lock of the folder, for the whole file, before its first byte comes.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PIECE = 32 << 20
"""Bytes fetched at a time."""

_TRIES = 3

Fetch = Callable[[int, int], bytes]


class BoundedFolder:
    """The files of one kind in a folder, ``KIND-DIGEST.ENDING``; no file of another name is ever touched.

    Args:
        folder: made if need be; on a disk of this machine, as locks on network file systems are not to be relied on.
        num_bytes: all of them together never take more, those included that are being fetched.
        kind: first word of their names.
        ending: last word of their names.
    """

    def __init__(self, folder: Path, num_bytes: int, kind: str, ending: str) -> None:
        self._folder, self._num_bytes, self._kind, self._ending = folder, num_bytes, kind, ending
        self._ours = re.compile(rf"{kind}-[0-9a-f]{{32}}\.({ending}|partial)")

    def open(self, digest: str, num_bytes: int, fetch: Fetch) -> BinaryIO | None:
        """Open a file, fetched first if it is not there.

        Args:
            digest: 32 hexadecimal digits that name it.
            num_bytes: its size.
            fetch: gives its bytes from one offset to another, or raises.

        Returns:
            The file, readable for as long as it is open even when the shard is evicted; None where there is no room.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self._path(digest)
        for _ in range(_TRIES):  # what was fetched may be evicted before it is opened
            if (file := self.find(digest)) is not None:
                return file
            if num_bytes > self._num_bytes or not self._fetch(path, num_bytes, fetch):
                return None
        return None

    def find(self, digest: str) -> BinaryIO | None:
        """Open a file if it is there, and count it as used now; otherwise as ``open`` does."""
        with suppress(FileNotFoundError):
            file = open(self._path(digest), "rb")  # noqa: SIM115 (the caller's)
            os.utime(file.fileno())  # the time of its last use
            return file
        return None

    def fetch_ahead(self, digest: str, num_bytes: int, fetch: Fetch) -> None:
        """Fetch a file, unless it is there or being fetched; arguments and errors as for ``open``."""
        path = self._path(digest)
        if num_bytes <= self._num_bytes and not path.exists():
            with suppress(BlockingIOError):
                self._fetch(path, num_bytes, fetch, waits=False)

    def touch(self, digests: Iterable[str]) -> None:
        """Count those files that are there as used now."""
        for digest in digests:
            with suppress(OSError):
                os.utime(self._path(digest))

    def _path(self, digest: str) -> Path:
        return self._folder / f"{self._kind}-{digest}.{self._ending}"

    def _fetch(self, path: Path, num_bytes: int, fetch: Fetch, waits: bool = True) -> bool:
        """Fetch a file, or wait until another process has; False where there is no room."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with _locked(partial, waits) as file:
            if not _is_at(file, partial):
                return True  # another has fetched it, or given up: look again
            try:
                is_there = path.exists()  # since this process looked last
                is_whole = not is_there and self._make_room(partial, num_bytes) and _fill(partial, num_bytes, fetch)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            if is_whole:  # once renamed, its old name may be that of another process's file
                with self._counting():  # under either name, it is counted
                    os.rename(partial, path)
            else:
                partial.unlink(missing_ok=True)
            return is_whole or is_there

    def _counting(self) -> AbstractContextManager[BinaryIO]:
        return _locked(self._folder / "lock")

    def _make_room(self, partial: Path, num_bytes: int) -> bool:
        with self._counting():
            os.truncate(partial, 0)
            whole: list[tuple[int, int, str]] = []  # last used, bytes, path
            taken = num_bytes
            for entry in os.scandir(self._folder):
                kind = self._ours.fullmatch(entry.name)
                if kind is None or (kind[1] == "partial" and _remove_abandoned(entry.path)):
                    continue
                with suppress(FileNotFoundError):  # discarded meanwhile
                    stat = entry.stat()
                    taken += stat.st_size
                    if kind[1] == self._ending:
                        whole.append((stat.st_mtime_ns, stat.st_size, entry.path))
            in_use = taken - sum(size for _, size, _ in whole)
            if in_use > self._num_bytes:
                return False
            for _, size, evicted in sorted(whole):
                if taken <= self._num_bytes:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(evicted)
                taken -= size
            os.truncate(partial, num_bytes)  # takes the room before another process counts
            return True


@contextmanager
def _locked(path: Path, waits: bool = True) -> Iterator[BinaryIO]:
    with open(path, "ab") as file:  # "ab" cuts nothing off the file of another
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has the file open, too


def _fill(partial: Path, num_bytes: int, fetch: Fetch) -> bool:
    with open(partial, "r+b") as file:
        for start in reversed(range(0, num_bytes, PIECE)):  # a file that was cut off shows with the first request
            file.seek(start)
            file.write(fetch(start, min(start + PIECE, num_bytes)))
    return True


def _is_at(file: BinaryIO, path: str | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(partial: str) -> bool:
    """Remove a file that grows no more, because its process was killed; one that grows is locked."""
    try:
        with open(partial, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, partial):
                os.unlink(partial)
                return True
            return False
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
