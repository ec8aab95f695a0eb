"""The index of a shard: where each member lies, its checksum, and what the sample holds.

A sample is ``KEY.json`` (a conversation) and a member per visual, ``KEY.0.mp4``, ``KEY.1.jpg``, next to each other in a
plain tar; others' layouts stand in ``conversation_members.py``. The index lies beside the tar: ``shard-000000.tar`` has
``shard-000000.index.json``.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

from lightning_crosslmm.conversation import Conversation
from lightning_crosslmm.conversation_members import IMAGE_EXTENSIONS, TEXTS, VIDEO_EXTENSIONS
from lightning_crosslmm.errors import UserError

VERSION = 1
INDEX = ".index.json"  # in the place of ".tar"
MAX_MEMBER_BYTES = 1 << 30
"""Largest member that is read: a worker has a sample in memory, whole, next to its decoded frames."""
MAX_TEXT_BYTES = 16 << 20
"""Largest ``json`` or ``txt``: parsed, it takes many times as much."""

_READ = re.compile(rf"{'|'.join(TEXTS)}|([^./]+\.)?({'|'.join(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)})")
_PICKLED = {"pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill"}  # to read one is to run what it says
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_META = re.compile(r"__[^/]*__($|/)")


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


Probe = Callable[[BinaryIO, str], VideoFacts]


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
        if too_large(ext, size) or not is_read(ext) or not 0 <= offset <= offset + size <= num_bytes:
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
    return Path(tar_path).with_suffix(INDEX)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under its name with ``.new`` added, then rename it: a reader finds the whole file or none."""
    partial = path.with_name(f"{path.name}.new")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def split_member(name: str, where: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension where WebDataset does: at the first dot after the last slash.

    Returns:
        None for what WebDataset skips, too: names without extension, names that begin with a dot, ``__meta__``.

    Raises:
        UserError: names the tar and a member that leads out of it, or that is pickled.
    """
    folder, slash, base = name.rpartition("/")
    if name.startswith("/") or ".." in name.split("/") or _CONTROL.search(name):
        raise UserError(f"{where}: the member {name!r} is not allowed: a name is relative, in plain text, without '..'")
    key, dot, extension = base.partition(".")
    if not key or not dot or _META.match(name):
        return None
    if _PICKLED & set(extension.lower().split(".")):
        raise UserError(
            f"{where}: the member '{name}' is not allowed: to unpickle a file is to run what it says, so none "
            "is opened; write the shard without it"
        )
    return folder + slash + key, extension.lower()


def is_read(extension: str) -> bool:
    """Tell whether a member is a text or a visual; others are left alone."""
    return _READ.fullmatch(extension) is not None


def too_large(extension: str, size: int) -> str:
    """Say that a member is too large to be read; "" where it is not."""
    limit = MAX_TEXT_BYTES if extension in TEXTS else MAX_MEMBER_BYTES
    mend = "keep conversations in it, and nothing else" if extension in TEXTS else "cut it or encode it smaller"
    return f"has {size} bytes, and {limit} are allowed; {mend}" if size > limit else ""


def make_entry(key: str, members: Mapping[str, Member], conversation: Conversation, info: SampleInfo) -> SampleEntry:
    """Put together the entry of a sample."""
    text_bytes = sum(len(message.content.encode()) for message in conversation.messages)
    facts = (info.duration_s, info.num_frames, info.keyframe_times_s)
    return SampleEntry(key, members, *facts, text_bytes, conversation.answer_kinds)
