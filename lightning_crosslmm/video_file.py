"""Video files through PyAV, whose only door this is: opening, seeking, decoding, converting and encoding.

Axis letters:
    F  frames    C  channels (R, G, B)    H W  pixel rows, pixel columns
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import av
import numpy as np
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from lightning_crosslmm.errors import UserError

# No playlists (hls, concat, dash): what they name would be opened too.
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,gif"
IMAGE_FORMATS = "jpeg_pipe,png_pipe,webp_pipe"
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Before version 19, PyAV raised at tags that are no UTF-8 unless told to replace them.
_METADATA: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
_SCALING: dict[str, Any] = {"interpolation": _BICUBIC, "threads": 1}
_BT601_MATRIX = 6  # AVCOL_SPC_SMPTE170M, what Colorspace.ITU601 is called in a stream's header


def _error(name: str, what: str, mend: str = "replace the file or take it out of the data") -> UserError:
    return UserError(f"{name}: {what}; {mend}")


def _open_source(source: Path | bytes, name: str) -> BinaryIO:
    """Open the file here: FFmpeg gets bytes and never a name that it could take for a URL, a device or a pattern."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if not path.is_file():
        raise _error(name, f"no file at '{path}'", "give the path of a local file (URLs and pipes are not opened)")
    try:
        return path.open("rb")
    except OSError as error:
        raise _error(name, f"cannot be read: {error.strerror}", "check the file's permissions") from error


@contextmanager
def opened(source: Path | bytes, name: str, formats: str) -> Iterator["VideoFile"]:
    """Open a file of one of the formats at its first video stream, and close it; FFmpeg's errors name the file."""
    with _open_source(source, name) as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise _error(name, "is empty (0 bytes)")
        file.seek(0)
        try:
            allowed = {"format_whitelist": formats}
            with av.open(file, "r", container_options=allowed, **_METADATA) as container:
                # The cover of a music file is a video stream of one frame.
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams or streams[0].codec_context is None:
                    kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
                    raise _error(name, f"holds no video that can be decoded (streams: {kinds})")
                decoder = streams[0].codec_context
                # FFmpeg's own threads in many loader workers fight for cores and have been seen to hang.
                decoder.thread_type, decoder.thread_count = ThreadType.NONE, 1
                if decoder.name == "mjpeg":  # it would fill up half a JPEG with grey
                    decoder.options = {"err_detect": "explode"}
                yield VideoFile(container, streams[0], name)
        except av.FFmpegError as error:
            mend = f"give a whole, undamaged file of one of these formats: {formats}"
            raise _error(name, f"cannot be decoded: {error.strerror}", mend) from error


class Shown(NamedTuple):
    """A frame and when it comes on screen, in ticks of its stream."""

    pts: int
    frame: VideoFrame


class VideoFile:
    """One open video stream, read by its own timestamps (pts, in ticks of ``tick_s`` seconds)."""

    def __init__(self, container: InputContainer, stream: VideoStream, name: str) -> None:
        self.container, self.stream, self.name = container, stream, name
        self.start_pts, self.tick_s = stream.start_time or 0, stream.time_base or Fraction(1, av.time_base)

    @staticmethod
    def pts(packet: Packet) -> int:
        """When the packet's frame comes on screen; AVI tells only when it is decoded."""
        return (packet.dts or 0) if packet.pts is None else packet.pts

    def time_s(self, pts: int) -> float:
        """Seconds from the start of the video."""
        return float((pts - self.start_pts) * self.tick_s)

    def duration_s(self) -> float:
        """How long the video lasts, by the header where that tells, else by the packets."""
        start_s, length_s = float(self.start_pts * self.tick_s), (self.container.duration or 0) / av.time_base
        if length_s and not self.container.format.name.startswith("matroska"):
            length_s += start_s  # Matroska's header tells the end, the others' the length
        return max(0.0, (self._header_end_s() or length_s or self._last_packet_end_s()) - start_s)

    def check_whole(self) -> None:
        """Refuse a file whose packets end before its header says; most containers take a cut for an ordinary end."""
        own_s = self._header_end_s()
        promised_s = own_s or (self.container.duration or 0) / av.time_base
        end_s = self._last_packet_end_s(*[self.stream] if own_s else [])
        slack_s = max(0.1, 2 / float(self.stream.average_rate or 20))  # how long the last frame lasts is often unknown
        if promised_s - end_s > slack_s:
            raise _error(self.name, f"is cut off: it ends at {end_s:.2f} s of {promised_s:.2f} s")

    def _header_end_s(self) -> float:
        """When the video itself ends, sound apart, as the header tells (Matroska in a tag); 0 where it does not."""
        if self.stream.duration:
            return float((self.start_pts + self.stream.duration) * self.tick_s)
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", self.stream.metadata.get("DURATION", ""))
        return float(tag[1]) * 3600 + float(tag[2]) * 60 + float(tag[3]) if tag else 0.0

    def _last_packet_end_s(self, *streams: VideoStream) -> float:
        self.container.seek(self.container.start_time or 0)
        ends_s = ((self.pts(p) + (p.duration or 0)) * p.time_base for p in self.container.demux(*streams) if p.size)
        return float(max(ends_s, default=0))

    def packets(self) -> Iterator[Packet]:
        """Yield packets from here on; the last is empty and makes the decoder give what it holds back."""
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt:
                raise _error(self.name, f"is damaged or cut off at {self.time_s(self.pts(packet)):.2f} s")
            yield packet

    def frames(self) -> Iterator[Shown]:
        """Yield frames in the order shown, from the next keyframe on, and raise at the first damage."""
        started = False
        for packet in self.packets():
            started = started or packet.is_keyframe
            for frame in packet.decode() if started else ():
                if frame.pts is None:
                    raise _error(self.name, "its frames carry no timestamps", "convert it to mp4 or mkv")
                if frame.is_corrupt:
                    raise _error(self.name, f"the frame at {self.time_s(frame.pts):.2f} s is damaged")
                yield Shown(frame.pts, frame)

    def first_frame(self) -> VideoFrame:
        """Decode the first frame, from where a freshly opened file stands."""
        for first in self.frames():
            return first.frame
        raise _error(self.name, "holds no frame that can be decoded")

    def shown_at(self, wanted_pts: Sequence[int]) -> Iterator[Shown]:
        """Yield the frame on screen at each of the rising timestamps; no group of pictures is decoded twice."""
        if len(self.stream.index_entries) == 1:
            self.container.seek(self.start_pts, stream=self.stream)  # Matroska reads its index at the first seek
        frames, whole = self.frames(), False
        shown: Shown | None = None
        following: Shown | None = None
        for pts in wanted_pts:
            latest = following or shown
            if self._keyframe_between(latest.pts if latest else self.start_pts, pts):
                (following, frames), shown = self._frames_from(pts), None
            elif latest is None:
                following = next(frames, None)
            while following and following.pts <= pts:
                shown, following = following, next(frames, None)
            now = shown or following  # before the first frame comes, that one
            if now is None:
                raise _error(self.name, "holds no frame that can be decoded")
            if not (following or whole) and pts >= now.pts + (now.frame.duration or 0):
                self.check_whole()
                whole = True
            yield now

    def _keyframe_between(self, pts: int, target_pts: int) -> bool:
        """Tell from the container's index whether one may skip to a keyframe on the way to the target."""
        index = self.stream.index_entries
        if len(index) == 0:
            return False
        ahead = self.start_pts - index[0].timestamp  # mp4 indexes decoding times, which run ahead of those shown
        found = index.search_timestamp(target_pts - ahead)
        return found >= 0 and index[found].timestamp + ahead > pts

    def _frames_from(self, target_pts: int) -> tuple[Shown | None, Iterator[Shown]]:
        """Seek to the last keyframe shown at or before the target; gives the first frame and those after it."""
        goal_pts, step = target_pts, round(1 / self.tick_s)
        while True:
            self.container.seek(goal_pts, stream=self.stream)
            frames = self.frames()
            first = next(frames, None)
            if goal_pts <= self.start_pts or (first and first.pts <= target_pts):
                return first, frames
            goal_pts, step = max(self.start_pts, goal_pts - step), 2 * step  # landed past it: go back further


class Picture:
    """Turns decoded frames into upright RGB of one size: ``image_size``, or that of the first frame.

    One pass of swscale converts and resizes, with antialiasing, to planes: 53 dB from torch's antialiased bicubic on
    natural 360p video, in an eighth (to 224) or a fifth (to 384) of the time of RGB at full size and torch after it.
    Packed rgb24 is slower and, by default, 2/255 darker.
    Untagged colours are read as BT.601, like FFmpeg does.
    """

    def __init__(self, image_size: tuple[int, int] | int | None) -> None:
        self._size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._converter = VideoReformatter()

    def rgb(self, frame: VideoFrame) -> np.ndarray:
        """Convert one frame to uint8 (3, H, W)."""
        a, b, c, d = _display_matrix(frame)
        sideways = abs(b) > abs(a)
        if self._size is None:
            self._size = (frame.width, frame.height) if sideways else (frame.height, frame.width)
        height, width = self._size[::-1] if sideways else self._size
        planar = self._converter.reformat(frame, width, height, "gbrp", **_SCALING)
        green, blue, red = (_bytes(p).reshape(height, p.line_size)[:, :width] for p in planar.planes)
        picture_CHW = np.stack((red, green, blue))
        picture_CHW = picture_CHW.transpose(0, 2, 1) if sideways else picture_CHW
        flip_x, flip_y = (c < 0, b < 0) if sideways else (a < 0, d < 0)
        return np.ascontiguousarray(picture_CHW[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _bytes(buffer: Any) -> np.ndarray:
    return np.frombuffer(buffer, np.uint8)


def _display_matrix(frame: VideoFrame) -> list[float]:
    """Give (a, b, c, d): the pixel at (x, y) is to be shown at (a x + c y, b x + d y)."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
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
