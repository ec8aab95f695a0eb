"""Packing: conversations and their videos become shards."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lightning_crosslmm.conversation import Conversation, Visual
from lightning_crosslmm.conversation_formats import read_conversations
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.shards import SampleInfo, ShardWriter
from lightning_crosslmm.video import VideoInfo, probe_video, read_image

ON_BAD = ("error", "skip")


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Args:
        num_samples: conversations in the shards.
        num_shards: tar files written.
        num_bytes: size of the tar files together.
        skipped: key and reason of each conversation that was left out.
    """

    num_samples: int
    num_shards: int
    num_bytes: int
    skipped: tuple[tuple[str, str], ...]


def pack(
    conversations_json: str | Path,
    video_dir: str | Path,
    out_dir: str | Path,
    *,
    samples_per_shard: int = 256,
    overwrite: bool = False,
    on_bad: str = "error",
) -> PackReport:
    """Write the conversations of a file, with the videos and images they are about, into shards.

    One conversation's files are in memory at a time. Each video is probed and each image decoded, so that damage shows
    here and not in training.

    Args:
        conversations_json: a file that ``read_conversations`` reads.
        video_dir: the folder that the paths in it start from.
        out_dir: folder for the shards.
        samples_per_shard: conversations per shard, at least 1.
        overwrite: replace shards that already lie in ``out_dir``.
        on_bad: what to do with a conversation whose video or image is missing or damaged: "error" stops and leaves no
            shard behind, "skip" leaves the conversation out and lists it in the report.

    Raises:
        UserError: names the setting, or the file and the conversation. A path out of ``video_dir`` is an error
            in either mode, and so is a file of which no conversation is left.
    """
    if on_bad not in ON_BAD:
        raise UserError(f"on_bad: '{on_bad}' must be one of {list(ON_BAD)}{nearest(str(on_bad), ON_BAD)}")
    folder = Path(video_dir)
    if not folder.is_dir():
        raise UserError(
            f"video_dir: there is no folder {folder}; name the one that the paths in {conversations_json} start from"
        )
    conversations = read_conversations(conversations_json)
    places = [
        [_place(folder, visual, conversation.key) for visual in conversation.visuals] for conversation in conversations
    ]
    skipped: list[tuple[str, str]] = []
    with ShardWriter(out_dir, samples_per_shard, overwrite=overwrite) as writer:
        for conversation, paths in zip(conversations, places, strict=True):
            try:
                members, info = _read(conversation, paths)
            except UserError as error:
                if on_bad == "error":
                    raise
                skipped.append((conversation.key, str(error)))
                continue
            writer.write(conversation, members, info)
        if not writer.num_samples:
            raise UserError(
                f"{conversations_json}: none of {len(skipped)} conversations can be packed; the first: {skipped[0][1]}"
            )
    return PackReport(writer.num_samples, writer.num_shards, writer.num_bytes, tuple(skipped))


def _place(folder: Path, visual: Visual, key: str) -> Path:
    path = PurePosixPath(visual.path)
    if path.is_absolute() or ".." in path.parts or "://" in visual.path:
        raise UserError(
            f"conversation '{key}': the path '{visual.path}' leads out of {folder}; give it relative to that folder"
        )
    return folder / path


def _read(conversation: Conversation, paths: list[Path]) -> tuple[dict[str, bytes], SampleInfo]:
    members, facts = {}, list[VideoInfo | None]()
    for visual, member, path in zip(conversation.visuals, conversation.members, paths, strict=True):
        name = f"{path} (conversation '{conversation.key}')"
        try:
            members[member] = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{name}: cannot be read ({error.strerror}); put the file there or mend its path"
            ) from error
        if visual.kind == "video":
            facts.append(probe_video(members[member], name))
        else:
            read_image(members[member], name)
            facts.append(None)
    return members, SampleInfo.of(facts)
