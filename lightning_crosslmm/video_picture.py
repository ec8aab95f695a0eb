"""Pictures through PyAV: decoded frames to upright RGB of one size, and RGB to an encoded video.

Axis letters:
    F  frames    C  channels (R, G, B)    H W  pixel rows, pixel columns
"""

import io
import math
import threading
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from lightning_crosslmm.errors import UserError

_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_SCALING: dict[str, Any] = {"interpolation": _BICUBIC, "threads": 1}
_BT601_MATRIX = 6  # AVCOL_SPC_SMPTE170M, what Colorspace.ITU601 is called in a stream's header


class _Converter(threading.local):
    """Each thread's own, kept from clip to clip: to compute its filters takes longer than to scale a small frame."""

    def __init__(self) -> None:
        self.reformat = VideoReformatter().reformat


_CONVERTER = _Converter()


class Picture:
    """Turns decoded frames into upright RGB of one size: ``image_size``, or that of the first frame.

    One pass of swscale converts and resizes, with antialiasing, to planes: 53 dB from torch's antialiased bicubic on
    natural 360p video, in an eighth (to 224) or a fifth (to 384) of the time of RGB at full size and torch after it.
    Packed rgb24 is slower and, by default, 2/255 darker.
    Untagged colours are read as BT.601, like FFmpeg does.
    """

    def __init__(self, image_size: tuple[int, int] | int | None) -> None:
        self._size = (image_size, image_size) if isinstance(image_size, int) else image_size

    def rgb(self, frame: VideoFrame) -> np.ndarray:
        """Convert one frame to uint8 (3, H, W)."""
        a, b, c, d = _display_matrix(frame)
        sideways = abs(b) > abs(a)
        if self._size is None:
            self._size = (frame.width, frame.height) if sideways else (frame.height, frame.width)
        height, width = self._size[::-1] if sideways else self._size
        planar = _CONVERTER.reformat(frame, width, height, "gbrp", **_SCALING)
        picture_CHW = np.empty((3, *self._size), np.uint8)
        flip_x, flip_y = (c < 0, b < 0) if sideways else (a < 0, d < 0)
        stored_CHW = picture_CHW[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1]
        stored_CHW = stored_CHW.transpose(0, 2, 1) if sideways else stored_CHW
        for channel, plane in zip((1, 2, 0), planar.planes, strict=True):  # green, blue, red
            stored_CHW[channel] = np.ndarray((height, width), np.uint8, _bytes(plane), strides=(plane.line_size, 1))
        return picture_CHW


def _bytes(buffer: Any) -> np.ndarray:
    return np.frombuffer(buffer, np.uint8)


def _display_matrix(frame: VideoFrame) -> list[float]:
    """Give (a, b, c, d): the pixel at (x, y) is to be shown at (a x + c y, b x + d y)."""
    try:
        told = frame.side_data
        matrix = told.get("DISPLAYMATRIX") if len(told) else None
        return _bytes(matrix).view(np.int32)[[0, 1, 3, 4]].tolist() if matrix else [1, 0, 0, 1]
    except ValueError:  # PyAV does not know all kinds of side data, EXIF for one; the turn it tells, a mirror image not
        angle = -math.radians(frame.rotation)
        return [math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)]


def encode_video(
    frames_FHWC: np.ndarray | Tensor,
    fps_hz: float,
    codec: str = "libx264",
    *,
    crf: int = 18,
    preset: str = "ultrafast",
    pix_fmt: str = "yuv420p",
    gop: int | None = None,
) -> bytes:
    """Encode frames as an mp4 file in memory.

    Args:
        frames_FHWC: uint8 RGB, (F, H, W, 3), F > 0.
        fps_hz: frames per second, 0 < fps_hz < 10000.
        codec: "libx264" (H.264) or "libx265" (HEVC).
        crf: constant rate factor, 0 (best) to 51.
        preset: the encoder's trade of speed for size, "ultrafast" to "veryslow".
        pix_fmt: how pixels are stored; "yuv420p" halves the resolution of colour and needs even sides.
        gop: most frames between keyframes; None leaves it to the encoder (250).

    Raises:
        UserError: the codec is another one, or it refuses the frames or settings.
    """
    if codec not in ("libx264", "libx265"):
        raise UserError(f"codec: '{codec}' must be 'libx264' or 'libx265'")
    frames_FHWC = np.ascontiguousarray(frames_FHWC)
    if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3 or not len(frames_FHWC):
        raise UserError(f"frames: must be uint8 (F, H, W, 3) with F > 0, got {frames_FHWC.dtype} {frames_FHWC.shape}")
    if not 0 < fps_hz < 1e4:
        raise UserError(f"fps_hz: must be above 0 and below 10000, got {fps_hz}")
    options = {"crf": str(crf), "preset": preset} | ({} if gop is None else {"g": str(gop)})
    if codec == "libx265":
        options["x265-params"] = "log-level=none"
    file, converter = io.BytesIO(), VideoReformatter()
    stored = _SCALING | {"format": pix_fmt, "dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
    try:
        with av.open(file, "w", format="mp4") as container:
            rate = Fraction(fps_hz).limit_denominator(1001)
            stream = cast(VideoStream, container.add_stream(codec, rate=rate, options=options))
            stream.height, stream.width, stream.pix_fmt = *frames_FHWC.shape[1:3], pix_fmt
            stream.codec_context.thread_count = 1
            stream.codec_context.colorspace, stream.codec_context.color_range = _BT601_MATRIX, ColorRange.MPEG
            for number, frame_HWC in enumerate(frames_FHWC):
                frame = converter.reformat(VideoFrame.from_ndarray(frame_HWC, format="rgb24"), **stored)
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.FFmpegError, ValueError) as error:
        size, words = frames_FHWC.shape[1:3], getattr(error, "strerror", error)
        raise UserError(f"{codec} cannot encode {size} frames as {pix_fmt} with {options}: {words}") from error
    return file.getvalue()


def pictures_of(frames: Any, image_size: int) -> np.ndarray:
    """Bring pictures that are decoded already to uint8 (F, 3, H, W) of one size, as files are.

    Args:
        frames: uint8 RGB, one array or tensor (F, H, W, 3) or (F, 3, H, W), or pictures one by one, PIL's too.
        image_size: pixels per side.

    Raises:
        UserError: they are no such pictures.
    """
    found = [np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame) for frame in frames]
    upright = [frame.transpose(1, 2, 0) if frame.ndim == 3 and frame.shape[0] == 3 else frame for frame in found]
    if not found or any(frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 for frame in upright):
        shapes = sorted({f"{frame.dtype} {frame.shape}" for frame in found})
        raise UserError(f"pictures: must be uint8 RGB, (height, width, 3) or (3, height, width) each, got {shapes}")
    frames_of_file = (VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in upright)
    picture = Picture(image_size)
    return np.stack([picture.rgb(frame) for frame in frames_of_file])
