"""Shards: plain tar files that any WebDataset reader reads, written whole or not at all, opened by folder or pattern.

The layout of a tar and its index stand in ``shard_index.py``. A folder of shards has one more file, ``shards.json``:
the size, the number of samples and the index's sha256 of each shard, so that opening 10,000 of them reads one file.
While a folder is being written, ``shards.json.partial`` stands there, and the folder does not open.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Self

from braceexpand import braceexpand
from webdataset import TarWriter

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_files import (
    MANIFEST,
    ShardRecord,
    build_index,
    clear_folder,
    find_index,
    folder_shards,
    read_index,
    read_manifest,
    read_sample,
    remove_shards,
    write_manifest,
)
from lightning_crosslmm.shard_index import (
    Keyed,
    Member,
    Probe,
    SampleEntry,
    SampleInfo,
    ShardIndex,
    index_path,
    make_entry,
    padded,
    read_text,
    split_member,
)

__all__ = ["Member", "Probe", "SampleEntry", "SampleInfo", "ShardIndex", "ShardSet", "ShardWriter"]
__all__ += ["build_index", "open_shards", "read_index", "read_sample"]

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

    def write(self, conversation: Keyed, members: Mapping[str, bytes], info: SampleInfo) -> None:
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
        text = read_text(blobs, where)
        size = sum(map(len, blobs.values()))
        with self._room(size):
            full = len(self._entries) == self.samples_per_shard or self._tell() + size > self.shard_bytes
            if self._entries and full:
                self._close_shard()
            if key in self._entries:
                raise UserError(f"{where}: stands twice in {self._name}; keys must differ")
            offsets = {ext: self._put(key, ext, blob) for ext, blob in blobs.items()}
        self._entries[key] = make_entry(key, blobs, offsets, text, info)
        self._kinds.update(filter(None, text.answer_kinds))
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


@dataclass(frozen=True)
class ShardSet:
    """An opened set of shards; holds no sample, only what each shard is.

    Args:
        paths: the tar files, in order.
        num_samples: how many samples each holds.
        fingerprint: sha256 over names, sizes and indexes, in hex; equal for the same data wherever it lies.
        answer_kinds: all question types that the data names, sorted; without "".
        records: what the index of each shard must be.
        probe: used on shards that have no index.
    """

    paths: tuple[Path, ...]
    num_samples: tuple[int, ...]
    fingerprint: str
    answer_kinds: tuple[str, ...]
    records: tuple[ShardRecord, ...]
    probe: Probe | None = None

    def index(self, i: int) -> ShardIndex:
        """Give the index of shard i; the last 64 read in this process are kept.

        Raises:
            UserError: names the shard where the index is not the one the set was opened with.
        """
        return _load_index(self.paths[i], self.records[i], self.probe)


@lru_cache(maxsize=64)
def _load_index(path: Path, record: ShardRecord, probe: Probe | None) -> ShardIndex:
    index = find_index(path, probe)
    if index.digest != record.index_sha256:
        raise UserError(
            f"{index_path(path)}: missing, or not the index of {path} that {MANIFEST} names or that was there when the "
            f"shards were opened; copy the folder again, or delete its {MANIFEST} to open the shards one by one"
        )
    return index


def open_shards(spec: str | Path, probe: Probe | None = None) -> ShardSet:
    """Open a folder of shards, one tar, or a brace pattern of tars.

    Args:
        spec: ``shards/``, ``shards/shard-000000.tar`` or ``shards/shard-{000000..000003}.tar``; local files only.
        probe: as in ``build_index``, for shards that have no index: those are read whole at the start, with a warning.

    Raises:
        UserError: names spec, folder or shard where something is missing, unfinished or of another kind.
    """
    paths = _expand(str(spec))
    manifests = {folder: read_manifest(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    records, kinds = [], set[str]()
    for path in paths:
        known, known_kinds = manifests[path.parent]
        record = known.get(path.name)
        if record is None and known:
            raise UserError(f"{path.parent / MANIFEST}: lacks {path.name}; delete it to open the shards one by one")
        if record is None:
            index = find_index(path, probe)
            record = ShardRecord.of(index)
            kinds.update(kind for entry in index.entries for kind in entry.answer_kinds if kind)
        records.append(record)
        kinds.update(known_kinds)
    fingerprint = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    sizes = tuple(record.num_samples for record in records)
    return ShardSet(tuple(paths), sizes, fingerprint, tuple(sorted(kinds)), tuple(records), probe)


def _expand(spec: str) -> list[Path]:
    if Path(spec).is_dir():
        return folder_shards(Path(spec))
    paths: dict[Path, None] = {}
    try:
        for one in braceexpand(spec) if "{" in spec else [spec]:
            if re.match(r"[A-Za-z][\w+.-]+:", one) or "::" in one:
                raise UserError(f"{spec}: shards are local files, no pipes or URLs; name a folder or a .tar file")
            if not one.endswith(".tar") or not Path(one).is_file():
                raise UserError(
                    f"{spec}: there is no shard {one}; name a folder, a .tar or a/shard-{{000000..000003}}.tar"
                )
            if Path(one) in paths:
                raise UserError(f"{spec}: names {one} twice; name each shard once")
            paths[Path(one)] = None
    except ValueError as error:
        raise UserError(f"{spec}: its braces do not close; write them as in a/shard-{{000000..000003}}.tar") from error
    return list(paths)
