"""Videos and images as tensors: sampling by time, probing, reading.

Frames are chosen by timestamp and never by index, so variable frame rates, B-frames and streams that do not start at
zero need no special case. A file that cannot give a frame that was asked for raises; no other frame stands in for it.

Axis letters:
    F  frames    C  channels (R, G, B)    H W  pixel rows, pixel columns
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.video_file import IMAGE_FORMATS, VIDEO_FORMATS, opened
from lightning_crosslmm.video_picture import Picture, encode_video, pictures_of
from lightning_crosslmm.video_probe import VideoInfo, probe_video

__all__ = ["Clip", "FrameSampling", "VideoInfo", "clip_of", "encode_video", "probe_video", "read_clip", "read_image"]

_SETTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"num_frames": int},
    "keyframes": {"num_frames": int},
    "rate": {"rate_hz": (int, float), "max_frames": int},
}


@dataclass(frozen=True)
class FrameSampling:
    """Which moments of a clip are looked at.

    For a clip of D seconds that starts at s:
    ``uniform``: ``t_i = s + (i + 1/2) D / n``, i = 0..n-1, the middles of n = ``num_frames`` equal parts.
    ``rate``: ``t_i = s + i / rate_hz`` while ``t_i < s + D``; if these are more than ``max_frames``, the times of
    ``uniform`` with n = ``max_frames`` instead.
    ``keyframes``: for each time of ``uniform`` the nearest keyframe: several times faster on long clips, and lossy, as
    what moves between keyframes is not seen and one keyframe may stand for several times.

    Args:
        mode: "uniform", "rate" or "keyframes".
        num_frames: n > 0, for "uniform" and "keyframes" only.
        rate_hz: frames per second > 0, for "rate" only.
        max_frames: most frames > 0, for "rate" only.
        jitter: in training, shift all moments of a clip by the same part of the step between them, drawn anew for each
            sample and epoch; elsewhere it changes nothing.

    Raises:
        UserError: a setting is unknown, missing, not positive, or has no effect in this mode.
    """

    mode: str = "uniform"
    num_frames: int | None = None
    rate_hz: float | None = None
    max_frames: int | None = None
    jitter: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot be."""
        if self.mode not in _SETTINGS:
            raise UserError(f"mode: '{self.mode}' must be one of {list(_SETTINGS)}{nearest(str(self.mode), _SETTINGS)}")
        reads = _SETTINGS[self.mode]
        for setting in ("num_frames", "rate_hz", "max_frames"):
            value, kind = getattr(self, setting), reads.get(setting)
            if kind is None and value is not None:
                raise UserError(f"{setting}: {value} has no effect in mode '{self.mode}', which reads {list(reads)}")
            if kind and (not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf):
                number = "a whole number" if kind is int else "a number"
                raise UserError(f"{setting}: mode '{self.mode}' needs {number} above 0, got {value!r}")

    def times_s(self, duration_s: float, start_s: float = 0.0, offset: float | None = None) -> list[float]:
        """List the wanted moments, in seconds, rising; never empty.

        Args:
            duration_s: D.
            start_s: s.
            offset: part of a step, in [0, 1), by which the first moment lies past the clip's start, and the others with
                it; None is as above.
        """
        count = self.num_frames or self.max_frames or 0
        if self.rate_hz is not None:
            shift_s = (offset or 0.0) * min(1 / self.rate_hz, duration_s)
            # The small number keeps a clip of exactly k periods from getting frame k, which lies past its end.
            steps = max(1, math.ceil((duration_s - shift_s) * self.rate_hz - 1e-6))
            if steps <= count:
                return [start_s + shift_s + i / self.rate_hz for i in range(steps)]
        part = 0.5 if offset is None else offset
        return [start_s + (i + part) * duration_s / count for i in range(count)]

    def most_frames(self, duration_s: float, num_videos: int) -> int:
        """Bound the frames of some videos.

        Args:
            duration_s: of all of them together; 0 where nobody measured.
            num_videos: how many.
        """
        most = num_videos * (self.num_frames or self.max_frames or 0)
        if self.rate_hz is None or duration_s == 0:
            return most
        return min(most, math.ceil(duration_s * self.rate_hz) + num_videos)


@dataclass(frozen=True)
class Clip:
    """Decoded frames, uint8 RGB (F, 3, H, W), and when each came on screen, (F,) float32, seconds from the start."""

    frames_FCHW: Tensor
    frame_time_s_F: Tensor


def read_clip(
    source: Path | bytes,
    name: str,
    sampling: FrameSampling,
    image_size: tuple[int, int] | int | None = None,
    *,
    offset: float | None = None,
    timeout_s: float | None = None,
) -> Clip:
    """Decode the frames on screen at the sampled moments: for each, the last one that begins at or before it.

    With ``mode="keyframes"`` for each the keyframe that begins nearest to it, and its own time.

    Args:
        source: a local file, or the bytes of one; never a URL.
        name: what error messages call it.
        sampling: which moments.
        image_size: (height, width) or the side of a square that frames are stretched to; None keeps their size.
        offset: as for ``FrameSampling.times_s``.
        timeout_s: give up on a clip that takes longer than this to decode; None waits for ever.

    Returns:
        The upright frames. A frame on screen at several moments stands once for each of them.

    Raises:
        UserError: the file is missing, not a video, damaged, or ends before a wanted moment, or the time is up.
    """
    with opened(source, name, VIDEO_FORMATS, timeout_s) as file:
        times_s, tick_s = sampling.times_s(file.duration_s(), offset=offset), float(file.tick_s)
        # Matroska rounds times to milliseconds: half of one makes up for it.
        wanted_pts = [file.start_pts + math.floor((t + 5e-4) / tick_s) for t in times_s]
        picture, pictures, shown_s, last = Picture(image_size), [], [], None
        shown = file.keyframes_near(wanted_pts) if sampling.mode == "keyframes" else file.shown_at(wanted_pts)
        for pts, frame in shown:
            pictures.append(pictures[-1] if frame is last else picture.rgb(frame))
            shown_s.append(file.time_s(pts))
            last = frame
        return Clip(torch.from_numpy(np.array(pictures)), torch.tensor(shown_s, dtype=torch.float32))


def read_image(source: Path | bytes, name: str, image_size: tuple[int, int] | int | None = None) -> Clip:
    """Decode a JPEG, PNG or WebP picture as a clip of one frame at time 0; arguments and errors as in ``read_clip``."""
    with opened(source, name, IMAGE_FORMATS) as file:
        picture_CHW = Picture(image_size).rgb(file.first_frame())
        return Clip(torch.from_numpy(picture_CHW)[None].contiguous(), torch.zeros(1))


def clip_of(frames: Any, image_size: int, fps_hz: float | None = None) -> Clip:
    """Make a clip of pictures that are decoded already; ``pictures_of`` says what they may be.

    Args:
        frames: at least one.
        image_size: the side of a square that they are stretched to.
        fps_hz: how fast they follow each other, above 0; None gives all of them time 0.

    Raises:
        UserError: they are no pictures.
    """
    frames_FCHW = torch.from_numpy(pictures_of(frames, image_size))
    return Clip(
        frames_FCHW, torch.arange(len(frames_FCHW), dtype=torch.float32) * (0.0 if fps_hz is None else 1 / fps_hz)
    )
