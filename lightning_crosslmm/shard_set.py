"""Opening shards by folder, tar or brace pattern, on this machine or in a store.

A folder with a manifest opens by reading that one file. The indexes are read when they are needed, shard by shard.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from braceexpand import braceexpand

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.location import Location, Url, locate, without_credentials
from lightning_crosslmm.shard_files import (
    MANIFEST,
    UNFINISHED,
    ShardRecord,
    find_index,
    read_manifest,
    read_sample,
)
from lightning_crosslmm.shard_index import INDEX, Probe, SampleEntry, ShardIndex
from lightning_crosslmm.storage import LOCAL, Storage, Version


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
        storage: how shards at a URL are read.
    """

    paths: tuple[Location, ...]
    num_samples: tuple[int, ...]
    fingerprint: str
    answer_kinds: tuple[str, ...]
    records: tuple[ShardRecord, ...]
    probe: Probe | None = None
    storage: Storage = LOCAL

    def index(self, i: int) -> ShardIndex:
        """Give the index of shard i; the last 64 read in this process are kept.

        Raises:
            UserError: names the shard where the index is not the one the set was opened with.
        """
        return _load_index(self.paths[i], self.records[i], self.probe, self.storage)

    def read(self, i: int, entry: SampleEntry) -> dict[str, bytes]:
        """Read a sample of shard i as ``read_sample`` does, from wherever it lies."""
        return read_sample(self.paths[i], entry, self.storage, _version(self.records[i]))

    def cached_bytes(self, num_shards: int) -> int:
        """Give the most bytes that so many of its shards take in the cache; 0 where none is cached."""
        sizes = (record.bytes for path, record in zip(self.paths, self.records, strict=True) if isinstance(path, Url))
        cached = (size for size in sizes if size <= self.storage.cache_bytes and self.storage.cache_dir is not None)
        return sum(sorted(cached, reverse=True)[:num_shards])


def prefetch(shards: Iterable[tuple[ShardSet, int]]) -> None:
    """Fetch shards of a store into its cache, behind the caller's back.

    Args:
        shards: set and number, those first that are needed first: the ones in use now, then the next ones. Those that
            do not fit into the cache together with all before them are left.
    """
    wanted: dict[Storage, list[tuple[Url, Version]]] = {}
    for data, i in shards:
        path = data.paths[i]
        if isinstance(path, Url):
            wanted.setdefault(data.storage, []).append((path, _version(data.records[i])))
    for storage, there in wanted.items():
        storage.prefetch(there)


def _version(record: ShardRecord) -> Version:
    return Version(record.bytes, record.index_sha256)


@lru_cache(maxsize=64)
def _load_index(path: Location, record: ShardRecord, probe: Probe | None, storage: Storage) -> ShardIndex:
    index = find_index(path, probe, storage)
    if index.digest != record.index_sha256:
        raise UserError(
            f"{path.with_suffix(INDEX)}: missing, or not the index of {path} that {MANIFEST} names or that was "
            f"there when the shards were opened; copy the folder again, or delete its {MANIFEST} to open the shards "
            "one by one"
        )
    return index


def open_shards(spec: str | Path, probe: Probe | None = None, storage: Storage = LOCAL) -> ShardSet:
    """Open a folder of shards, one tar, or a brace pattern of tars.

    Args:
        spec: ``shards/``, ``shards/shard-000000.tar`` or ``shards/shard-{000000..000003}.tar``, or a URL of such.
        probe: as in ``build_index``, for shards that have no index: those are read whole at the start, with a warning.
        storage: how shards at a URL are read.

    Raises:
        UserError: names spec, folder or shard where something is missing, unfinished or of another kind.
        StorageError: names the URL that a store did not give.
    """
    paths = _expand(str(spec), storage)
    manifests = {folder: read_manifest(folder, storage) for folder in dict.fromkeys(path.parent for path in paths)}
    records, kinds = [], set[str]()
    for path in paths:
        known, known_kinds = manifests[path.parent]
        record = known.get(path.name)
        if record is None and known:
            raise UserError(f"{path.parent / MANIFEST}: lacks {path.name}; delete it to open the shards one by one")
        if record is None:
            index = find_index(path, probe, storage)
            record = ShardRecord.of(index)
            kinds.update(kind for entry in index.entries for kind in entry.answer_kinds if kind)
        records.append(record)
        kinds.update(known_kinds)
    fingerprint = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    sizes = tuple(record.num_samples for record in records)
    return ShardSet(tuple(paths), sizes, fingerprint, tuple(sorted(kinds)), tuple(records), probe, storage)


def local_tars(spec: str | Path) -> list[Path]:
    """List the tars of a folder, or those of a name or pattern, on this machine, whatever a manifest says of them.

    Raises:
        UserError: names spec or tar where there is none, or it lies in a store.
    """
    if Path(spec).is_dir():
        paths = sorted(Path(spec).glob("*.tar"))
        if not paths:
            raise UserError(f"{spec}: holds no .tar file; name a folder of shards")
        return paths
    found = _expand(str(spec), LOCAL)
    paths = [path for path in found if isinstance(path, Path)]
    if len(paths) < len(found):
        raise UserError(f"{spec}: lies in a store; this is done where the tars are local files")
    return paths


def _expand(spec: str, storage: Storage) -> list[Location]:
    if "{" not in spec or Path(spec).is_dir():
        place = Path(spec) if "{" in spec else locate(spec)
        if place.is_dir() if isinstance(place, Path) else place.name[-4:] != ".tar":
            return _folder_shards(place, storage)
    paths: dict[Location, None] = {}
    shown = without_credentials(spec)
    try:
        for one in braceexpand(spec) if "{" in spec else [spec]:
            path = locate(one)
            if not one.endswith(".tar") or (isinstance(path, Path) and not path.is_file()):
                raise UserError(
                    f"{shown}: there is no shard {one}; name a folder, a .tar or a/shard-{{000000..000003}}.tar"
                )
            if path in paths:
                raise UserError(f"{shown}: names {one} twice; name each shard once")
            paths[path] = None
    except ValueError as error:
        raise UserError(f"{shown}: its braces do not close; write them as in a/shard-{{000000..000003}}.tar") from error
    return list(paths)


def _folder_shards(folder: Location, storage: Storage) -> list[Location]:
    """List the shards of a folder by name; a folder at a URL that has a manifest is taken at its word."""
    known = set(read_manifest(folder, storage)[0])
    names = known if known and isinstance(folder, Url) else _list_names(folder, storage)
    if UNFINISHED in names:
        raise UserError(f"{folder}: its writing did not finish ({UNFINISHED} is there); write it again with overwrite")
    names = {name for name in names if name.endswith(".tar")}
    if missing := sorted(known - names):
        raise UserError(f"{folder}: lacks {len(missing)} shard(s) of its {MANIFEST}, {missing[0]} first; copy it again")
    if not names:
        raise UserError(f"{folder}: holds no .tar file; name a folder of shards")
    return [folder / name for name in sorted(names)]


def _list_names(folder: Location, storage: Storage) -> set[str]:
    if isinstance(folder, Path):
        return {path.name for path in folder.iterdir()}
    names = storage.list_names(folder)
    if names is None:
        raise UserError(
            f"{folder / MANIFEST}: is not there, and {folder.scheme} has no listing of folders; name the shards, as in "
            f"{folder / 'shard-{000000..000003}.tar'}"
        )
    return set(names)
