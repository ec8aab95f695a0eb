"""Video files through PyAV: opening, seeking and decoding."""

import io
import re
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from lightning_crosslmm.errors import UserError

# No playlists (hls, concat, dash): what they name would be opened too.
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,gif"
IMAGE_FORMATS = "jpeg_pipe,png_pipe,webp_pipe"
_TOLD_BY_MP4 = {"h264", "hevc", "av1", "vp9"}  # codecs of which its header tells all that FFmpeg would find out
# Before version 19, PyAV raised at tags that are no UTF-8 unless told to replace them.
_METADATA: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


def _error(name: str, what: str, mend: str = "replace the file or take it out of the data") -> UserError:
    return UserError(f"{name}: {what}; {mend}")


def _open_source(source: Path | bytes | BinaryIO, name: str) -> AbstractContextManager[BinaryIO]:
    """Open the file here: FFmpeg gets bytes and never a name that it could take for a URL, a device or a pattern."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        return nullcontext(source)  # who opened it closes it
    path = Path(source)
    if not path.is_file():
        raise _error(name, f"no file at '{path}'", "give the path of a local file (URLs and pipes are not opened)")
    try:
        return path.open("rb")
    except OSError as error:
        raise _error(name, f"cannot be read: {error.strerror}", "check the file's permissions") from error


def _open_container(file: BinaryIO, formats: str) -> InputContainer:
    """Let FFmpeg read the header, and look into the streams only where that leaves something open.

    For that it opens decoders of its own, which takes longer than all else: 0.3 ms for a tiny mp4, 1.1 ms for 360p.
    """
    allowed = {"format_whitelist": formats}
    is_mp4 = file.read(8)[4:] == b"ftyp"
    file.seek(0)
    if is_mp4:
        container = av.open(file, "r", "mov", container_options=allowed | {"codec_whitelist": "none"}, **_METADATA)
        codecs = {s.codec_context.codec.canonical_name for s in container.streams.video if s.frames and s.codec_context}
        # In fragments (no frames counted) the order of H.264's frames may stand nowhere but in the pictures.
        if codecs and codecs <= _TOLD_BY_MP4 and all(s.frames for s in container.streams.video):
            return container
        container.close()
        file.seek(0)
    return av.open(file, "r", container_options=allowed, **_METADATA)


@contextmanager
def opened(
    source: Path | bytes | BinaryIO, name: str, formats: str, timeout_s: float | None = None
) -> Iterator["VideoFile"]:
    """Open a file of one of the formats at its first video stream, and close it; FFmpeg's errors name the file.

    Reading its packets and frames is given up on once it takes longer than `timeout_s`; None waits for ever.
    """
    with _open_source(source, name) as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise _error(name, "is empty (0 bytes)")
        file.seek(0)
        try:
            with _open_container(file, formats) as container:
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
                yield VideoFile(container, streams[0], name, timeout_s)
        except av.FFmpegError as error:
            mend = f"give a whole, undamaged file of one of these formats: {formats}"
            raise _error(name, f"cannot be decoded: {error.strerror}", mend) from error


class Shown(NamedTuple):
    """A frame and when it comes on screen, in ticks of its stream."""

    pts: int
    frame: VideoFrame


class VideoFile:
    """One open video stream, read by its own timestamps (pts, in ticks of ``tick_s`` seconds)."""

    def __init__(
        self, container: InputContainer, stream: VideoStream, name: str, timeout_s: float | None = None
    ) -> None:
        self.container, self.stream, self.name = container, stream, name
        self._timeout_s, self._opened_s = timeout_s, time.monotonic()
        self.start_pts, self.tick_s = stream.start_time or 0, stream.time_base or Fraction(1, av.time_base)

    @staticmethod
    def pts(packet: Packet) -> int:
        """When the packet's frame comes on screen; AVI tells only when it is decoded."""
        return (packet.dts or 0) if packet.pts is None else packet.pts

    def time_s(self, pts: int) -> float:
        """Seconds from the start of the video."""
        return self._seconds(pts - self.start_pts)

    def _seconds(self, ticks: int) -> float:
        return (
            ticks * self.tick_s.numerator / self.tick_s.denominator
        )  # rounded once; a Fraction takes ten times as long

    def duration_s(self) -> float:
        """How long the video lasts, by the header where that tells, else by the packets."""
        start_s, length_s = self._seconds(self.start_pts), (self.container.duration or 0) / av.time_base
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
            return self._seconds(self.start_pts + self.stream.duration)
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", self.stream.metadata.get("DURATION", ""))
        return float(tag[1]) * 3600 + float(tag[2]) * 60 + float(tag[3]) if tag else 0.0

    def _last_packet_end_s(self, *streams: VideoStream) -> float:
        self.container.seek(self.container.start_time or 0)
        ends_s = ((self.pts(p) + (p.duration or 0)) * p.time_base for p in self._demux(*streams) if p.size)
        return float(max(ends_s, default=0))

    def _demux(self, *streams: VideoStream) -> Iterator[Packet]:
        for packet in self.container.demux(*streams):
            self._check_time()
            yield packet

    def _check_time(self) -> None:
        if self._timeout_s is not None and time.monotonic() - self._opened_s > self._timeout_s:
            mend = "allow more (data.sample_timeout_s) or encode it again with more keyframes"
            raise _error(self.name, f"is not decoded after {self._timeout_s:g} s", mend)

    def packets(self) -> Iterator[Packet]:
        """Yield packets from here on; the last is empty and makes the decoder give what it holds back."""
        for packet in self._demux(self.stream):
            if packet.is_corrupt:
                raise _error(self.name, f"is damaged or cut off at {self.time_s(self.pts(packet)):.2f} s")
            yield packet

    def frames(self) -> Iterator[Shown]:
        """Yield frames in the order shown, from the next keyframe on, and raise at the first damage."""
        started = False
        for packet in self.packets():
            started = started or packet.is_keyframe
            for frame in packet.decode() if started else ():
                self._check_time()
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

    def keyframes_near(self, wanted_pts: Sequence[int]) -> Iterator[Shown]:
        """Yield the keyframe nearest to each of the rising timestamps, decoding nothing else."""
        keys, last, now = self._keyframe_pts(), -1, None
        for pts in wanted_pts:
            right = min(bisect_left(keys, pts), len(keys) - 1)
            chosen = right - 1 if right and pts - keys[right - 1] <= keys[right] - pts else right
            if now is None or chosen != last:
                after = keys[chosen + 1] if chosen + 1 < len(keys) else keys[chosen] + round(1 / self.tick_s)
                now, last = self._keyframe_at(keys[chosen], (keys[chosen] + after) // 2), chosen
            yield now

    def _keyframe_pts(self) -> list[int]:
        if self.container.format.name.startswith("matroska"):
            self.container.seek(self.start_pts, stream=self.stream)  # it reads its index at the first seek
        index = self.stream.index_entries
        if len(index) > 1:
            ahead = self.start_pts - index[0].timestamp
            return sorted(entry.timestamp + ahead for entry in index if entry.is_keyframe)
        keys = sorted(self.pts(packet) for packet in self.packets() if packet.size and packet.is_keyframe)
        if not keys:
            raise _error(self.name, "holds no frame that can be decoded")
        return keys

    def _keyframe_at(self, key_pts: int, goal_pts: int) -> Shown:
        """Decode one keyframe, aiming between it and the next: indexes tell its time roughly, seeks may fall short."""
        slack, seek_pts, step = (goal_pts - key_pts) // 2, goal_pts, round(1 / self.tick_s)
        while True:
            self.container.seek(seek_pts, stream=self.stream)
            keys = (p for p in self.packets() if p.is_keyframe and self.pts(p) >= key_pts - slack)
            packet = next(keys, None)
            if packet is not None and self.pts(packet) <= goal_pts:
                break
            if seek_pts <= self.start_pts:
                raise _error(self.name, f"its keyframe at {self.time_s(key_pts):.2f} s is not found again")
            seek_pts, step = max(self.start_pts, seek_pts - step), 2 * step  # landed past it
        # emptying the decoder gives the frame now: with B-frames it would wait for those that follow
        frame = next(iter(packet.decode() or self.stream.codec_context.decode(None)), None)
        if frame is None or frame.pts is None or frame.is_corrupt:
            raise _error(self.name, f"the frame at {self.time_s(key_pts):.2f} s is damaged")
        return Shown(frame.pts, frame)

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
