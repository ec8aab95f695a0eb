"""Reading where a location says: plain files as they are, objects of a store again and again until they are right.

A store may be slow, cut an answer short or give a page that says why it gives nothing, and do better the next time. So
whoever reads says how to tell that what came is right, and reads anew where it is not, but not for ever.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import BinaryIO, NamedTuple, TypeVar

from lightning_crosslmm.bounded_folder import BoundedFolder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.location import Location, Url, without_credentials
from lightning_crosslmm.store import EndsEarlyError, StorageError, list_folder, read_parts, request

T = TypeVar("T")
_LONGEST_WAIT_S = 30.0
_LONGEST_REASON = 200
_jitter = random.Random()  # one of its own: waiting must not move the run's random state
_ahead = Lock()  # one list after the other


class Version(NamedTuple):
    """Tells a shard from another one at the same address: its size in bytes, the sha256 of its index."""

    num_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Storage:
    """How objects of a store are read; local files are opened as they are, and none of it matters to them.

    Args:
        cache_dir: a folder on a local disk into which whole shards are fetched; None reads each sample's own bytes.
        cache_bytes: the folder holds no more than this, what is being fetched included; the shards that were not used
            for longest make room. A shard that finds none is read without the cache.
        retries: how often a request is repeated after it failed, 0 or more.
        backoff_s: seconds before the first repetition; doubled for each further one, up to 30, and shortened at random
            by up to half, so that many readers do not come back at once.
        timeout_s: longest wait for one request, in seconds up to 300. ``hf`` keeps a limit of its own.
    """

    cache_dir: str | Path | None = None
    cache_bytes: int = 64 << 30
    retries: int = 5
    backoff_s: float = 0.5
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, is_right, right in (
            ("cache_bytes", self.cache_bytes >= 1, "at least 1"),
            ("retries", self.retries >= 0, "at least 0"),
            ("backoff_s", self.backoff_s >= 0, "at least 0"),
            ("timeout_s", 0 < self.timeout_s <= 300, "above 0 and at most 300"),
        ):
            if not is_right:
                raise UserError(f"data.storage.{name}: must be {right}, got {getattr(self, name)}")

    def read_file(self, location: Location, parse: Callable[[bytes], T], where: str | None = None) -> T:
        """Read a small file whole.

        Args:
            location: of the file.
            parse: makes of its bytes what is wanted; what it refuses from a store is read again.
            where: names what is read, for errors; the location without.

        Raises:
            StorageError: names ``where``, the attempts and the last reason. UserError: what ``parse`` said.
        """
        where = where or str(location)
        if isinstance(location, Url):
            return self._insist(where, lambda: parse(request(location, None, self.timeout_s)))
        try:
            data = location.read_bytes()
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        return parse(data)

    def find_file(self, location: Location, parse: Callable[[bytes], T]) -> T | None:
        """Read a small file as ``read_file`` does, or give None where there is none."""
        if isinstance(location, Path):
            return self.read_file(location, parse) if location.exists() else None

        def once() -> T | None:
            with suppress(FileNotFoundError):
                return parse(request(location, None, self.timeout_s))
            return None

        return self._insist(str(location), once)

    def read_ranges(
        self,
        location: Location,
        ranges: Sequence[tuple[int, int]],
        check: Callable[[list[bytes]], T],
        where: str,
        version: Version | None = None,
    ) -> T:
        """Read parts of a shard.

        Args:
            location: of the shard.
            ranges: offset and size of each part, in bytes.
            check: makes of the parts what is wanted; what it refuses from a store is read again.
            where: names what is read, for errors.
            version: of the shard; without it the cache is not used.

        Raises:
            StorageError: names ``where``, the attempts and the last reason.
            UserError: what ``check`` said; or the shard ends before a part.
        """
        if isinstance(location, Path):
            try:
                with open(location, "rb") as file:
                    parts = _cut(file, ranges)
            except OSError as error:
                raise UserError(f"{where} cannot be read ({error.strerror})") from error
            return check(parts)

        def once() -> T:
            cached = self._open_cached(location, version) if version is not None else None
            if cached is None:
                return check(read_parts(location, ranges, self.timeout_s))
            with cached:
                try:
                    return check(_cut(cached, ranges))
                except UserError:  # the store gave something else, or the disk lost it
                    Path(cached.name).unlink(missing_ok=True)
                    raise

        return self._insist(where, once)

    def list_names(self, folder: Url) -> list[str] | None:
        """List a folder's names; None where the store has no listings (http).

        Raises:
            StorageError: names the URL, the attempts and the last reason.
        """
        if folder.scheme in ("http", "https"):
            return None

        def once() -> list[str]:
            with suppress(FileNotFoundError):
                return sorted(str(path).rstrip("/").rpartition("/")[2] for path in list_folder(folder, self.timeout_s))
            return []

        return self._insist(str(folder), once)

    def prefetch(self, shards: Sequence[tuple[Url, Version]]) -> None:
        """Fetch shards into the cache, in a thread and in this order, as many of them as it can hold together.

        Nothing is said of those that cannot be had: who reads them will be told.
        """
        if self.cache_dir is not None and shards:
            cache = BoundedFolder(Path(self.cache_dir), self.cache_bytes, "shard", "tar")
            Thread(target=self._fetch_ahead, args=(cache, shards), daemon=True).start()

    def _fetch_ahead(self, cache: BoundedFolder, shards: Sequence[tuple[Url, Version]]) -> None:
        with _ahead:
            room, wanted = self.cache_bytes, []
            for url, version in shards:
                if version.num_bytes <= self.cache_bytes:  # a larger one is never cached
                    room -= version.num_bytes
                    if room < 0:
                        break
                    wanted.append((url, version))
            cache.touch(_digest(*shard) for shard in wanted)  # so that none of them makes room for another
            for url, version in wanted:
                with suppress(UserError, OSError):
                    cache.fetch_ahead(_digest(url, version), version.num_bytes, partial(self._fetch, url))

    def _fetch(self, url: Url, start: int, end: int) -> bytes:
        return self._insist(str(url), partial(request, url, (start, end), self.timeout_s), EndsEarlyError)

    def _open_cached(self, url: Url, version: Version) -> BinaryIO | None:
        if self.cache_dir is None:
            return None
        try:
            cache = BoundedFolder(Path(self.cache_dir), self.cache_bytes, "shard", "tar")
            return cache.open(_digest(url, version), version.num_bytes, partial(self._fetch, url))
        except EndsEarlyError:  # it was cut off: some of its samples may be there
            return None
        except OSError as error:
            raise StorageError(
                f"data.storage.cache_dir: {self.cache_dir} cannot take {url} ({error.strerror}); name a folder on a "
                f"local disk with room for data.storage.cache_bytes ({self.cache_bytes})"
            ) from error

    def _insist(self, where: str, action: Callable[[], T], *at_once: type[Exception]) -> T:
        """Do it until it succeeds, and give up in the end; errors ``at_once`` are not waited for to pass."""
        attempts = 1 + self.retries
        final: tuple[type[Exception], ...] = (StorageError, *at_once)  # those that were tried often enough already
        for attempt in range(attempts):
            if attempt:
                wait_s = min(self.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
                time.sleep(wait_s * _jitter.uniform(0.5, 1))
            try:
                return action()
            except final:
                raise
            except Exception as error:  # drivers raise what their libraries do
                last = error
        if isinstance(last, UserError):
            raise UserError(f"{last} (so in each of {attempts} attempts)")
        if isinstance(last, EndsEarlyError):
            raise UserError(
                f"{where}: lies past the end of the shard ({last}, in each of {attempts} attempts); it was cut off or "
                "rewritten: copy it again together with its index"
            )
        reason = f"no answer within {self.timeout_s} s" if isinstance(last, TimeoutError) else _reason(last)
        raise StorageError(
            f"{where}: could not be read in {attempts} attempts, the last failed with: {reason}; check the address, "
            f"your access and the store, or raise data.storage.retries ({self.retries})"
        )


LOCAL = Storage()
"""For those who have no settings: what it is for stores, nobody chose."""


def _reason(error: Exception) -> str:
    text = without_credentials(" ".join(str(error).split()))[:_LONGEST_REASON]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _digest(url: Url, version: Version) -> str:
    return hashlib.sha256(f"{url}\n{version.num_bytes}\n{version.index_sha256}".encode()).hexdigest()[:32]


def _cut(file: BinaryIO, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    parts = []
    for offset, size in ranges:
        file.seek(offset)
        parts.append(file.read(size))
    return parts
