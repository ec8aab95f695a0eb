"""Files of shards: reading a tar, its index and its samples; the manifest of a folder; clearing a folder.

What is read may lie in a store, what is written is local. Nothing in these files is executed or unpickled.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.location import Location, Url
from lightning_crosslmm.shard_build import build_index
from lightning_crosslmm.shard_index import (
    INDEX,
    VERSION,
    Probe,
    SampleEntry,
    ShardIndex,
    index_path,
    write_atomic,
)
from lightning_crosslmm.storage import LOCAL, Storage, Version

MANIFEST = "shards.json"
UNFINISHED = f"{MANIFEST}.partial"  # there from the first to the last moment of writing a folder
_OURS = re.compile(r"(shard-\d{6}\.(tar|index\.json)|shards\.json)(\.partial|\.new)?")
_log = logging.getLogger(__name__)


class ShardRecord(NamedTuple):
    """What a manifest says of one shard: file name of the tar, samples, bytes, sha256 of the index."""

    name: str
    num_samples: int
    bytes: int
    index_sha256: str

    @classmethod
    def of(cls, index: ShardIndex) -> Self:
        """Take them from the shard's index."""
        return cls(index.shard, len(index.entries), index.num_bytes, index.digest)


def read_index(tar_path: str | Path) -> ShardIndex:
    """Read the index that lies beside a tar and check that it belongs to it.

    Raises:
        UserError: names both files where one is missing or the tar has another size than the index says.
    """
    path, beside = Path(tar_path), index_path(tar_path)
    try:
        index = ShardIndex.from_json(beside.read_bytes(), str(beside))
        num_bytes = path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); {path} and {beside} are needed"
        ) from error
    if (index.shard, index.num_bytes) != (path.name, num_bytes):
        raise UserError(
            f"{beside}: was written for '{index.shard}' with {index.num_bytes} bytes, but {path} has {num_bytes}; "
            "the tar was cut off or written later: copy it again, or delete the index"
        )
    return index


def find_index(tar_path: Location, probe: Probe | None = None, storage: Storage = LOCAL) -> ShardIndex:
    """Read the index beside a tar. With a warning, one of a local tar is built in memory where there is none.

    Raises:
        UserError: as ``read_index`` and ``build_index``; names the URL of an index that is missing or another tar's.
    """
    if isinstance(tar_path, Url):
        return _fetch_index(tar_path, storage)
    if index_path(tar_path).exists():
        return read_index(tar_path)
    _log.warning("%s has no index: reading all of it; `crosslmm index` writes one", tar_path)
    return build_index(tar_path, probe)


def _fetch_index(tar_url: Url, storage: Storage) -> ShardIndex:
    beside = tar_url.with_suffix(INDEX)

    def parse(data: bytes) -> ShardIndex:
        index = ShardIndex.from_json(data, str(beside))
        if index.shard != tar_url.name:
            raise UserError(f"{beside}: was written for '{index.shard}'; copy it again together with {tar_url.name}")
        return index

    return storage.read_file(beside, parse, f"{beside}: the index that a shard at a URL needs beside it")


def read_sample(
    tar_path: str | Location, entry: SampleEntry, storage: Storage = LOCAL, version: Version | None = None
) -> dict[str, bytes]:
    """Read a sample's members by their offsets and check each against its sha256.

    Args:
        tar_path: the shard.
        entry: the sample, of the shard's index.
        storage: how a store is read.
        version: of the shard, for the storage's cache.

    Returns:
        Extension (``json``, ``0.mp4``) -> bytes.

    Raises:
        UserError: names shard, key and member where the bytes are not those of the index.
        StorageError: names shard, key, attempts and reason where the store gave none.
    """
    where = f"{tar_path}: sample '{entry.key}'"

    def check(blobs: list[bytes]) -> dict[str, bytes]:
        for (extension, member), blob in zip(entry.members.items(), blobs, strict=True):
            if hashlib.sha256(blob).hexdigest() != member.sha256:
                raise UserError(
                    f"{where}, member '{extension}': its {member.size} bytes do not have the sha256 of the index; "
                    "the shard is damaged or was rewritten: copy it again, or delete the index"
                )
        return dict(zip(entry.members, blobs, strict=True))

    location = Path(tar_path) if isinstance(tar_path, str) else tar_path
    ranges = [(member.offset, member.size) for member in entry.members.values()]
    return storage.read_ranges(location, ranges, check, where, version)


def read_manifest(folder: Location, storage: Storage = LOCAL) -> tuple[dict[str, ShardRecord], frozenset[str]]:
    """Read a folder's ``shards.json``: its shards by name, and the question types; both empty where there is none.

    Raises:
        UserError: names the file where it is none of this version.
    """
    path = folder / MANIFEST

    def parse(data: bytes) -> tuple[dict[str, ShardRecord], frozenset[str]]:
        try:
            manifest = json.loads(data)
            if manifest["version"] != VERSION:
                raise ValueError(f"version {manifest['version']!r}, not {VERSION}")
            rows = [
                ShardRecord(str(s["name"]), int(s["num_samples"]), int(s["bytes"]), str(s["index_sha256"]))
                for s in manifest["shards"]
            ]
            if wrong := [row.name for row in rows if "/" in row.name or not row.name.endswith(".tar")]:
                raise ValueError(f"{wrong[0]!r} is no name of a tar")
            return {row.name: row for row in rows}, frozenset(map(str, manifest["answer_kinds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: not a list of shards ({error!r}); delete it to open the shards one by one"
            ) from error

    return storage.find_file(path, parse) or ({}, frozenset())


def write_manifest(folder: Path, shards: Sequence[ShardRecord], kinds: Iterable[str], duration_s: float) -> None:
    """Write ``shards.json``, whole or not at all; with it the folder is no longer unfinished."""
    manifest = {
        "version": VERSION,
        "shards": [shard._asdict() for shard in shards],
        "answer_kinds": sorted(kinds),
        "num_samples": sum(shard.num_samples for shard in shards),
        "duration_s": duration_s,
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    (folder / UNFINISHED).unlink(missing_ok=True)


def clear_folder(folder: Path, overwrite: bool) -> None:
    """Make a folder for new shards, and mark it unfinished.

    Raises:
        UserError: names the folder where it holds shards that may not be replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.endswith(".tar") and not _OURS.fullmatch(name)]
    ours = [name for name in names if _OURS.fullmatch(name)]
    if others or (ours and not overwrite):
        mend = "choose another folder" + ("" if others else ", or overwrite=true to replace them")
        raise UserError(f"{folder}: already holds shards ({(others or ours)[0]}); {mend}")
    (folder / UNFINISHED).touch()
    remove_shards(folder, keep=UNFINISHED)


def remove_shards(folder: Path, keep: str = "") -> None:
    """Remove what a writer of shards wrote, finished or not, and nothing else."""
    for path in list(folder.iterdir()):
        if _OURS.fullmatch(path.name) and path.name != keep:
            path.unlink()
