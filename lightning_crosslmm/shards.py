"""Shards: plain tar files that any WebDataset reader reads, written whole or not at all.

The layout of a tar and its index stand in ``shard_index.py``. A folder of shards has one more file, ``shards.json``:
the size, the number of samples and the index's sha256 of each shard, so that opening 10,000 of them reads one file.
While a folder is being written, ``shards.json.partial`` stands there, and the folder does not open.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Self

from webdataset import TarWriter

from lightning_crosslmm.conversation import Conversation
from lightning_crosslmm.conversation_members import conversation_of
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_build import build_index
from lightning_crosslmm.shard_files import (
    MANIFEST,
    ShardRecord,
    clear_folder,
    read_index,
    read_sample,
    remove_shards,
    write_manifest,
)
from lightning_crosslmm.shard_index import (
    Member,
    Probe,
    SampleEntry,
    SampleInfo,
    ShardIndex,
    make_entry,
    split_member,
    too_large,
)
from lightning_crosslmm.shard_set import ShardSet, open_shards, prefetch
from lightning_crosslmm.shard_tar import padded

__all__ = ["Member", "Probe", "SampleEntry", "SampleInfo", "ShardIndex", "ShardSet", "ShardWriter"]
__all__ += ["build_index", "open_shards", "prefetch", "read_index", "read_sample"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardWriter:
    """Writes samples into numbered shards, as a context manager.

    A shard grows under the name ``NAME.tar.partial``; once it is on disk, its index is renamed into place first and the
    tar second, so that whoever sees a tar sees its index. The manifest comes last. If anything is raised inside the
    context, or the disk is full, everything this writer wrote is removed.

    Args:
        out_dir: the folder, made if need be.
        samples_per_shard: a shard is closed after this many samples, at least 1.
        shard_bytes: a shard is closed before it would grow past this many bytes (a larger sample gets one to itself).
        overwrite: remove the shards that already lie in the folder; without it they are an error.
    """

    def __init__(
        self, out_dir: str | Path, samples_per_shard: int = 256, shard_bytes: int = 1 << 30, overwrite: bool = False
    ) -> None:
        for name, value in (("samples_per_shard", samples_per_shard), ("shard_bytes", shard_bytes)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.out_dir = Path(out_dir)
        self.samples_per_shard, self.shard_bytes, self.overwrite = samples_per_shard, shard_bytes, overwrite
        self.num_samples, self.num_bytes = 0, 0
        self._shards: list[ShardRecord] = []
        self._kinds: set[str] = set()
        self._duration_s = 0.0
        self._failed = False
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._entries: dict[str, SampleEntry] = {}

    @property
    def num_shards(self) -> int:
        """How many shards are complete."""
        return len(self._shards)

    def __enter__(self) -> Self:
        """Make the folder ready."""
        try:
            clear_folder(self.out_dir, self.overwrite)
        except OSError as error:
            raise UserError(f"{self.out_dir}: shards cannot be written here ({error.strerror})") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Finish the last shard and the manifest, or remove all that was written."""
        try:
            if kind is None:
                with self._room(0):
                    self._finish()
        finally:
            if not (self.out_dir / MANIFEST).exists():
                self._discard()

    def write(self, conversation: Conversation, members: Mapping[str, bytes], info: SampleInfo) -> None:
        """Add one sample.

        Args:
            conversation: gives the key and the JSON.
            members: the visuals' files by their names in the conversation's JSON: ``{"0.mp4": ...}``.
            info: what probing told of the visuals.

        Raises:
            UserError: names the sample if its members are not those of the conversation, or its key is none or stands
                twice in the shard; names the folder, the free and the needed bytes if the disk is full.
        """
        key, blobs = conversation.key, {"json": conversation.to_json(), **members}
        where = f"{self.out_dir}: sample '{key}'"
        if "/" in key or any(split_member(f"{key}.{ext}", where) != (key, ext) for ext in blobs):
            raise UserError(f"{where}: a key must have neither '.' nor '/'")
        for ext, blob in blobs.items():
            if what := too_large(ext, len(blob)):
                raise UserError(f"{where}: the member '{ext}' {what}")
        read = conversation_of(key, blobs, str(self.out_dir))  # what is written can be read
        size = sum(map(len, blobs.values()))
        with self._room(size):
            full = len(self._entries) == self.samples_per_shard or self._tell() + size > self.shard_bytes
            if self._entries and full:
                self._close_shard()
            if key in self._entries:
                raise UserError(f"{where}: stands twice in {self._name}; keys must differ")
            placed = {
                ext: Member(self._put(key, ext, blob), len(blob), hashlib.sha256(blob).hexdigest())
                for ext, blob in blobs.items()
            }
        self._entries[key] = make_entry(key, placed, read, info)
        self._kinds.update(filter(None, read.answer_kinds))
        self._duration_s += info.duration_s
        self.num_samples += 1

    @property
    def _name(self) -> str:
        return f"shard-{self.num_shards:06d}.tar"

    @property
    def _partial(self) -> Path:
        return self.out_dir / f"{self._name}.partial"

    def _tell(self) -> int:
        return self._tar.tarstream.offset if self._tar else 0

    def _put(self, key: str, extension: str, blob: bytes) -> int:
        if self._tar is None:
            self._file = open(self._partial, "wb")  # noqa: SIM115 (lives as long as the shard; _discard closes it too)
            # GNU's format has no limit on name and size; all else is fixed, so that equal samples give equal bytes.
            self._tar = TarWriter(self._file, "root", "root", 0o444, encoder=False, mtime=0, format="GNU_FORMAT")
        self._tar.write({"__key__": key, extension: blob})
        return self._tell() - padded(len(blob))

    def _close_shard(self) -> None:
        assert self._tar is not None and self._file is not None, "a shard is closed once it holds a sample"
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        tar_path = self.out_dir / self._name
        index = ShardIndex(self._name, self._partial.stat().st_size, tuple(self._entries.values()))
        index.save(tar_path)
        os.replace(self._partial, tar_path)
        self._shards.append(ShardRecord.of(index))
        self.num_bytes += index.num_bytes
        self._tar, self._entries = None, {}

    def _finish(self) -> None:
        if self._entries:
            self._close_shard()
        if not self._shards:
            raise UserError(f"{self.out_dir}: no sample was written; a folder of shards needs at least one")
        write_manifest(self.out_dir, self._shards, self._kinds, self._duration_s)

    def _discard(self) -> None:
        for file in (self._tar, self._file):
            with contextlib.suppress(OSError, ValueError):  # closing writes once more, onto a disk that may be full
                if file is not None:
                    file.close()
        remove_shards(self.out_dir)

    @contextlib.contextmanager
    def _room(self, needed: int) -> Iterator[None]:
        if self._failed:
            raise ValueError(f"{self.out_dir}: nothing can be written after a write that failed")
        self._failed = True
        try:
            yield
            self._failed = False
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            free = shutil.disk_usage(self.out_dir).free
            raise UserError(
                f"{self.out_dir}: no room for {self._name} ({error.strerror}): {free} bytes are free, this shard needs "
                f"{self._tell() + needed} or more; free some, choose another folder or raise the limit"
            ) from error
