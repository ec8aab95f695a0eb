"""The index of a shard: where each member lies, its checksum, and what the sample holds.

A sample is ``KEY.json`` (a conversation) and a member per visual, ``KEY.0.mp4``, ``KEY.1.jpg``, next to each other in a
plain tar. The index lies beside the tar: ``shard-000000.tar`` has ``shard-000000.index.json``.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from lightning_crosslmm.errors import UserError

VERSION = 1
BLOCK = 512
MEDIA = ("mp4", "mkv", "webm", "avi", "mov", "gif", "jpg", "jpeg", "png", "webp")
_EXTENSION = re.compile(rf"json|(0|[1-9]\d*)\.({'|'.join(MEDIA)})")


class Member(NamedTuple):
    """Where a member's bytes lie in the tar (offset and size in bytes), and their sha256 in hex."""

    offset: int
    size: int
    sha256: str


class VideoFacts(Protocol):
    """What an index keeps of a probed video; ``video.VideoInfo`` has it."""

    @property
    def duration_s(self) -> float:
        """Length in seconds."""

    @property
    def num_frames(self) -> int:
        """How many frames it holds."""

    @property
    def keyframe_times_s(self) -> Iterable[float]:
        """Key frames, in seconds from its start."""


class Keyed(Protocol):
    """What the writer asks of a conversation; ``conversation.Conversation`` has it."""

    @property
    def key(self) -> str:
        """Name of the sample."""

    def to_json(self) -> bytes:
        """Write what lies in the shard as ``KEY.json``."""


Probe = Callable[[bytes, str], VideoFacts]


@dataclass(frozen=True)
class SampleInfo:
    """What probing told of a sample's visuals.

    Args:
        duration_s: of all its videos together, in seconds.
        num_frames: of all its visuals together; an image is one frame.
        keyframe_times_s: per visual, in seconds from the start of the video; empty for an image.
    """

    duration_s: float
    num_frames: int
    keyframe_times_s: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, visuals: Iterable[VideoFacts | None]) -> Self:
        """Sum up a sample's visuals in order, None for an image."""
        facts = list(visuals)
        return cls(
            duration_s=float(sum(video.duration_s for video in facts if video)),
            num_frames=sum(video.num_frames if video else 1 for video in facts),
            keyframe_times_s=tuple(tuple(float(t) for t in video.keyframe_times_s) if video else () for video in facts),
        )


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a shard.

    Args:
        key: the sample's name.
        members: extension (``json``, ``0.mp4``) -> where its bytes lie.
        duration_s, num_frames, keyframe_times_s: as in ``SampleInfo``; 0, 0 and empty where no video was probed.
        text_bytes: UTF-8 bytes of all messages.
        answer_kinds: the question type of each answer, "" where the data names none.
    """

    key: str
    members: Mapping[str, Member]
    duration_s: float
    num_frames: int
    keyframe_times_s: tuple[tuple[float, ...], ...]
    text_bytes: int
    answer_kinds: tuple[str, ...]


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one shard, in the order of the tar.

    Args:
        shard: file name of the tar.
        num_bytes: size of the tar.
        entries: its samples.
    """

    shard: str
    num_bytes: int
    entries: tuple[SampleEntry, ...]

    def to_json(self) -> bytes:
        """Write the index; equal indexes give equal bytes."""
        return json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            UserError: names the file where it is no index of this version.
        """
        try:
            record = json.loads(data)
            if record["version"] != VERSION:
                raise ValueError(f"version {record['version']!r}, not {VERSION}")
            num_bytes = int(record["num_bytes"])
            return cls(str(record["shard"]), num_bytes, tuple(_read_entry(e, num_bytes) for e in record["entries"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{where}: not an index of a shard ({error!r}); delete it, or write the shard again"
            ) from error

    @property
    def digest(self) -> str:
        """The sha256 of the index as JSON, in hex."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def save(self, tar_path: str | Path) -> None:
        """Write the index beside its tar, whole or not at all."""
        write_atomic(index_path(tar_path), self.to_json())


def _read_entry(record: dict[str, Any], num_bytes: int) -> SampleEntry:
    members = {ext: Member(int(m[0]), int(m[1]), str(m[2])) for ext, m in record["members"].items()}
    for ext, (offset, size, _) in members.items():
        if not _EXTENSION.fullmatch(ext) or not 0 <= offset <= offset + size <= num_bytes:
            raise ValueError(f"member {ext!r} of {record['key']!r} at {offset} with {size} of {num_bytes} bytes")
    return SampleEntry(
        key=str(record["key"]),
        members=members,
        duration_s=float(record["duration_s"]),
        num_frames=int(record["num_frames"]),
        keyframe_times_s=tuple(tuple(float(t) for t in times) for times in record["keyframe_times_s"]),
        text_bytes=int(record["text_bytes"]),
        answer_kinds=tuple(str(kind) for kind in record["answer_kinds"]),
    )


def index_path(tar_path: str | Path) -> Path:
    """Say where the index of a tar lies: ``a.tar`` has ``a.index.json``."""
    return Path(tar_path).with_suffix(".index.json")


def padded(size: int) -> int:
    """Round a member's size up to what it takes in a tar, which is made of blocks of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under its name with ``.partial`` added, then rename it: a reader finds the whole file or none."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def split_member(name: str, where: str) -> tuple[str, str]:
    """Split a member's name into key and extension where WebDataset splits it: at the first dot after the last slash.

    Raises:
        UserError: names the tar and a member that leads out of it or is neither JSON nor media.
    """
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    if name.startswith("/") or ".." in folder.split("/") or not key or base == "..":
        raise UserError(f"{where}: the member '{name}' must have a relative name KEY.EXTENSION without '..'")
    if not _EXTENSION.fullmatch(extension.lower()):
        raise UserError(
            f"{where}: the member '{name}' is not allowed; a sample is KEY.json and KEY.0.EXT, KEY.1.EXT, ... in the "
            f"order of its visuals, EXT one of {', '.join(MEDIA)}"
        )
    return folder + slash + key, extension.lower()


class SampleText(NamedTuple):
    """What the index takes from a sample's JSON: kind and member of each visual, UTF-8 bytes, question types."""

    visuals: tuple[tuple[str, str], ...]
    text_bytes: int
    answer_kinds: tuple[str, ...]


def read_text(blobs: Mapping[str, bytes], where: str) -> SampleText:
    """Read a sample's JSON and hold it against the members that came with it.

    Raises:
        UserError: names the sample where its JSON is none, or its members are not those that the JSON names.
    """
    if "json" not in blobs:
        raise UserError(f"{where}: has the members {sorted(blobs)}, but no 'json' with its conversation")
    try:
        record = json.loads(blobs["json"])
        text = SampleText(
            tuple((str(visual["kind"]), str(visual["member"])) for visual in record["visuals"]),
            sum(len(message["content"].encode()) for message in record["messages"]),
            tuple(str(kind) for kind in record["answer_kinds"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        fields = "messages, visuals and answer_kinds"
        raise UserError(f"{where}: its 'json' is no conversation with {fields} ({error!r})") from error
    named, present = sorted(member for _, member in text.visuals), sorted(set(blobs) - {"json"})
    if named != present:
        raise UserError(f"{where}: its 'json' names the visuals {named}, but the members are {present}")
    return text


def make_entry(
    key: str, blobs: Mapping[str, bytes], offsets: Mapping[str, int], text: SampleText, info: SampleInfo
) -> SampleEntry:
    """Put together the entry of a sample whose members lie at these offsets."""
    members = {e: Member(offsets[e], len(blob), hashlib.sha256(blob).hexdigest()) for e, blob in blobs.items()}
    facts = (info.duration_s, info.num_frames, info.keyframe_times_s)
    return SampleEntry(key, members, *facts, text.text_bytes, text.answer_kinds)
