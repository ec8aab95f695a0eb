"""Building the index of a tar by reading all of it, whoever wrote it; no visual is ever whole in memory."""

import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from lightning_crosslmm.conversation_members import TEXTS, conversation_of
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_index import (
    Member,
    Probe,
    SampleEntry,
    SampleInfo,
    ShardIndex,
    is_read,
    make_entry,
    split_member,
    too_large,
)
from lightning_crosslmm.shard_tar import Damage, TarMember, Window, walk

_CHUNK = 1 << 20
_log = logging.getLogger(__name__)

Sample = Mapping[str, TarMember]
Report = Callable[[str, str], None]
"""Is told of each defect: the key of the sample, "" where there is none, and a message with the tar's name."""


@dataclass(frozen=True)
class Built:
    """An index; key and reason of each sample that is not in it; how many members of which extension are not read."""

    index: ShardIndex
    skipped: tuple[tuple[str, str], ...]
    left_out: Mapping[str, int]


def build_index(tar_path: str | Path, probe: Probe | None = None) -> ShardIndex:
    """Build the index of a tar, as ``index_tar`` does; members that are not read are told in a warning."""
    built = index_tar(tar_path, probe)
    if built.left_out:
        _log.warning("%s: members of other kinds are left out: %s", tar_path, dict(built.left_out))
    return built.index


def index_tar(tar_path: str | Path, probe: Probe | None = None, skip_bad: bool = False) -> Built:
    """Build the index of a tar.

    Args:
        tar_path: an uncompressed tar with samples laid out as ``conversation_members.py`` tells.
        probe: tells duration, frames and key frames of a video from (file, name), as ``video.probe_video`` does.
            Without it those stay 0 and empty.
        skip_bad: leave out samples whose text or video is damaged or missing, instead of raising.

    Raises:
        UserError: names the tar, and the member or sample where there is one, if the tar is cut off or damaged, or
            holds what is not allowed or understood.
    """
    path = Path(tar_path)
    entries: list[SampleEntry] = []
    skipped: list[tuple[str, str]] = []
    try:
        with open(path, "rb") as file:
            samples, left_out = list_samples(file, path, _refuse)
            for key, members in samples.items():
                try:
                    entries.append(_index_sample(file, path, key, members, probe))
                except UserError as error:
                    if not skip_bad:
                        raise
                    skipped.append((key, str(error)))
            num_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not entries:
        first = f" that can be read; the first: {skipped[0][1]}" if skipped else ""
        raise UserError(f"{path}: holds no sample{first}")
    return Built(ShardIndex(path.name, num_bytes, tuple(entries)), tuple(skipped), left_out)


def _refuse(key: str, message: str) -> None:
    raise UserError(message)


def list_samples(file: BinaryIO, path: Path, report: Report) -> tuple[dict[str, Sample], Counter[str]]:
    """List the samples of a tar by their headers.

    Args:
        file: the tar.
        path: its name.
        report: is told of each defect; where it returns, the listing goes on without that member.

    Returns:
        Key -> extension -> member, in the order of the tar; and how many members there are of extensions not read.
    """
    samples: dict[str, dict[str, TarMember]] = {}
    left_out = Counter[str]()
    last = ""
    for member in walk(file):
        if isinstance(member, Damage):
            after = f" after the sample '{last}'" if last else ""
            report(last, f"{path}: {member.what}{after}, at byte {member.offset}; copy it again")
            continue
        if member.is_folder:
            continue
        try:
            placed = split_member(member.name, str(path))
        except UserError as error:
            report(last, str(error))
            continue
        if placed is None:
            continue
        key, extension = placed
        if member.is_file and not is_read(extension):
            left_out[extension] += 1
        elif what := _what_is_wrong(member, extension, samples.get(key, {}), key == last):
            report(key, f"{path}: sample '{key}': the member '{member.name}' {what}")
        else:
            samples.setdefault(key, {})[extension] = member
            last = key
    return dict(samples), left_out


def _what_is_wrong(member: TarMember, extension: str, others: Sample, is_next: bool) -> str:
    if not member.is_file:
        return "is a link, a device or a file with holes; only plain files are read"
    if extension in others:
        return "stands twice; keys must differ within a shard"
    if others and not is_next:
        return "lies apart from its sample's others; keys must differ within a shard, and a tar be sorted by name"
    return too_large(extension, member.size)


def read_texts(file: BinaryIO, sample: Sample) -> dict[str, bytes]:
    """Read what ``conversation_of`` looks at: the texts, and the visuals' names without their bytes."""
    blobs = dict.fromkeys(sample, b"")
    for extension in TEXTS:
        if extension in sample:
            file.seek(sample[extension].offset)
            blobs[extension] = file.read(sample[extension].size)
    return blobs


def hash_bytes(file: BinaryIO, offset: int, size: int) -> str:
    """Give the sha256 of a part of a file, in hex."""
    file.seek(offset)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, _CHUNK)))
    while size and (count := cast(io.BufferedReader, file).readinto(buffer[: min(size, _CHUNK)])):
        digest.update(buffer[:count])
        size -= count
    return digest.hexdigest()


def _index_sample(file: BinaryIO, path: Path, key: str, sample: Sample, probe: Probe | None) -> SampleEntry:
    conversation = conversation_of(key, read_texts(file, sample), str(path))
    members = {
        extension: Member(member.offset, member.size, hash_bytes(file, member.offset, member.size))
        for extension, member in sample.items()
    }
    info = SampleInfo(0.0, 0, ())
    if probe is not None:
        where = f"{path}: sample '{key}', member"
        info = SampleInfo.of(
            probe(cast(BinaryIO, Window(file, *members[visual.path][:2])), f"{where} '{visual.path}'")
            if visual.kind == "video"
            else None
            for visual in conversation.visuals
        )
    return make_entry(key, members, conversation, info)
