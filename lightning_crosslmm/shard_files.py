"""Files of shards: reading a tar, its index and its samples; the manifest of a folder; clearing a folder.

Only local files are opened, and nothing in them is executed or unpickled.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_index import (
    BLOCK,
    VERSION,
    Probe,
    SampleEntry,
    SampleInfo,
    ShardIndex,
    index_path,
    make_entry,
    padded,
    read_text,
    split_member,
    write_atomic,
)

MANIFEST = "shards.json"
UNFINISHED = f"{MANIFEST}.partial"  # there from the first to the last moment of writing a folder
_OURS = re.compile(r"(shard-\d{6}\.(tar|index\.json)|shards\.json)(\.partial)?")
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


def build_index(tar_path: str | Path, probe: Probe | None = None) -> ShardIndex:
    """Build the index of a tar by reading all of it.

    Args:
        tar_path: an uncompressed tar, whoever wrote it, with samples laid out as above.
        probe: tells duration, frames and key frames of a video from (bytes, name), as ``video.probe_video`` does.
            Without it those stay 0 and empty.

    Raises:
        UserError: names the tar, and the member where there is one, if it is cut off, damaged, or holds anything else.
    """
    path = Path(tar_path)
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            samples = _scan(tar, file, path)
            entries = tuple(_index_sample(file, path, key, members, probe) for key, members in samples.items())
            return ShardIndex(path.name, os.fstat(file.fileno()).st_size, entries)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as an uncompressed tar ({error})") from error


def _scan(tar: tarfile.TarFile, file: BinaryIO, path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    last, end = None, 0
    for info in tar:
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise UserError(f"{path}: the member '{info.name}' is a link or a device; only plain files are read")
        key, extension = split_member(info.name, str(path))
        if extension in samples.get(key, {}) or (key in samples and key != last):
            raise UserError(f"{path}: the sample '{key}' stands twice ('{info.name}'); keys must differ within a shard")
        samples.setdefault(key, {})[extension] = (info.offset_data, info.size)
        last, end = key, info.offset_data + padded(info.size)
    # A tar ends in two blocks of zeros. tarfile takes a cut or damaged header for that end and says nothing: look.
    file.seek(end)
    rest = iter(lambda: file.read(1 << 20), b"")
    if file.read(2 * BLOCK) != bytes(2 * BLOCK) or any(chunk.strip(b"\0") for chunk in rest):
        raise UserError(f"{path}: cut off or damaged after the sample '{last}', at byte {end}; copy it again")
    if not samples:
        raise UserError(f"{path}: holds no sample")
    return samples


def _index_sample(
    file: BinaryIO, path: Path, key: str, members: Mapping[str, tuple[int, int]], probe: Probe | None
) -> SampleEntry:
    where = f"{path}: sample '{key}'"
    blobs = {}
    for extension, (offset, size) in members.items():
        file.seek(offset)
        blobs[extension] = file.read(size)
    text = read_text(blobs, where)
    info = SampleInfo(0.0, 0, ())
    if probe is not None:
        info = SampleInfo.of(
            probe(blobs[member], f"{where}, member '{member}'") if kind == "video" else None
            for kind, member in text.visuals
        )
    return make_entry(key, blobs, {extension: offset for extension, (offset, _) in members.items()}, text, info)


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


def find_index(tar_path: Path, probe: Probe | None = None) -> ShardIndex:
    """Read the index beside a tar or, with a warning, build one in memory where there is none."""
    if index_path(tar_path).exists():
        return read_index(tar_path)
    _log.warning("%s has no index: reading all of it; build_index(...).save(...) writes one", tar_path)
    return build_index(tar_path, probe)


def read_sample(tar_path: str | Path, entry: SampleEntry) -> dict[str, bytes]:
    """Read a sample's members by their offsets and check each against its sha256.

    Returns:
        Extension (``json``, ``0.mp4``) -> bytes.

    Raises:
        UserError: names shard, key and member where the bytes are not those of the index.
    """
    blobs = {}
    try:
        with open(tar_path, "rb") as file:
            for extension, (offset, size, sha256) in entry.members.items():
                file.seek(offset)
                blobs[extension] = file.read(size)
                if hashlib.sha256(blobs[extension]).hexdigest() != sha256:
                    raise UserError(
                        f"{tar_path}: sample '{entry.key}', member '{extension}': its {size} bytes do not have the "
                        "sha256 of the index; the shard is damaged or was rewritten: copy it again, or delete the index"
                    )
    except OSError as error:
        raise UserError(f"{tar_path}: sample '{entry.key}' cannot be read ({error.strerror})") from error
    return blobs


def read_manifest(folder: Path) -> tuple[dict[str, ShardRecord], frozenset[str]]:
    """Read a folder's ``shards.json``: its shards by name, and the question types; both empty where there is none.

    Raises:
        UserError: names the file where it is none of this version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["version"] != VERSION:
            raise ValueError(f"version {manifest['version']!r}, not {VERSION}")
        rows = (
            ShardRecord(str(s["name"]), int(s["num_samples"]), int(s["bytes"]), str(s["index_sha256"]))
            for s in manifest["shards"]
        )
        return {row.name: row for row in rows}, frozenset(map(str, manifest["answer_kinds"]))
    except FileNotFoundError:
        return {}, frozenset()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a list of shards ({error!r}); delete it to open the shards one by one") from error


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


def folder_shards(folder: Path) -> list[Path]:
    """List the shards of a folder by name.

    Raises:
        UserError: names the folder where it holds none, lacks one of its manifest, or its writing did not finish.
    """
    if (folder / UNFINISHED).exists():
        raise UserError(f"{folder}: its writing did not finish ({UNFINISHED} is there); write it again with overwrite")
    names = {path.name for path in folder.glob("*.tar")}
    if missing := sorted(set(read_manifest(folder)[0]) - names):
        raise UserError(f"{folder}: lacks {len(missing)} shard(s) of its {MANIFEST}, {missing[0]} first; copy it again")
    if not names:
        raise UserError(f"{folder}: holds no .tar file; name a folder of shards")
    return [folder / name for name in sorted(names)]


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
