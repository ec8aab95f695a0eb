"""What a video holds, and whether all of it decodes, without making tensors: who only asks need not wait for torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_crosslmm.video_file import IMAGE_FORMATS, VIDEO_FORMATS, opened


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds; height and width as displayed, times in seconds from the start of the video.

    ``rotation_deg`` is the clockwise turn (0, 90, 180, 270) that the file asks of players.
    """

    duration_s: float
    num_frames: int
    fps_hz: float
    height: int
    width: int
    rotation_deg: int
    codec: str
    keyframe_times_s: tuple[float, ...]


def probe_video(source: Path | bytes | BinaryIO, name: str) -> VideoInfo:
    """Read what a video holds from its packets, decoding its first frame only.

    Args:
        source: a local file, the bytes of one, or one that is open.
        name: what error messages call it.

    Raises:
        UserError: the file is missing, cut off, or holds no video.
    """
    with opened(source, name, VIDEO_FORMATS) as file:
        first = file.first_frame()
    with opened(source, name, VIDEO_FORMATS) as file:  # again: MPEG-TS does not find back to its start by seeking
        duration_s = file.duration_s()
        shown = sorted((file.pts(p), p.is_keyframe) for p in file.packets() if p.size and not p.is_discard)
        file.check_whole()
        sides = (first.height, first.width)
        return VideoInfo(
            duration_s=duration_s,
            num_frames=len(shown),
            fps_hz=float(file.stream.average_rate or len(shown) / max(duration_s, 1e-3)),
            height=sides[first.rotation % 180 != 0],
            width=sides[first.rotation % 180 == 0],
            rotation_deg=-first.rotation % 360,
            codec=file.stream.codec_context.codec.canonical_name,
            keyframe_times_s=tuple(file.time_s(pts) for pts, is_key in shown if is_key),
        )


def check_visual(source: Path | bytes | BinaryIO, name: str, kind: str) -> None:
    """Decode all of a video or image, a frame at a time.

    Args:
        source: a local file, the bytes of one, or one that is open.
        name: what error messages call it.
        kind: "video" or "image".

    Raises:
        UserError: the file is not of this kind, cut off or damaged, wherever in it.
    """
    with opened(source, name, VIDEO_FORMATS if kind == "video" else IMAGE_FORMATS) as file:
        if not sum(1 for _ in file.frames()):
            file.first_frame()  # there is none: it says so
        if kind == "video":
            file.check_whole()
