"""Makes clips that carry their frame's number as a grey level, so that a test knows which frame it was given."""

from fractions import Fraction

import av
import numpy as np
import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.video import FrameSampling, read_clip

STEP = 4  # grey levels between neighbouring frames: more than a codec's error
EIGHT = FrameSampling("uniform", num_frames=8)


def numbered_frames(count, size=(64, 64)):
    grey = (np.arange(count, dtype=np.uint8) * STEP)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(grey, (count, *size, 3)))


def numbers(clip):
    return (clip.frames_FCHW.float().mean((1, 2, 3)) / STEP).round().int().tolist()


def mux(
    path, pts, fmt="mp4", codec="libx264", options=None, time_base=Fraction(1, 1000), container_options=None, **more
):
    """Write numbered frames at the given times (ticks) with PyAV; audio_s adds a sound track."""
    options = {"g": "12", "preset": "medium", "x265-params": "log-level=none"} | (options or {})
    frames = more.get("frames", numbered_frames(len(pts)))
    with av.open(str(path), "w", format=fmt, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = time_base
        if "rotation_deg" in more:  # clockwise
            stream.set_display_rotation(-more["rotation_deg"], hflip=more.get("mirrored", False))
        sound = container.add_stream("aac", rate=8000) if "audio_s" in more else None
        for moment, frame_HWC in zip(pts, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(frame_HWC)
            frame.pts, frame.time_base = moment, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for start in range(0, int(more["audio_s"] * 8000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.rate, silence.pts, silence.time_base = 8000, start, Fraction(1, 8000)
                container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def encode_image(array_HWC, codec, pix_fmt):
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt = *array_HWC.shape[:2], pix_fmt
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(array_HWC).reformat(
        format=pix_fmt, dst_color_range="JPEG" if codec == "mjpeg" else None
    )
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


class FrameSamplingAt:
    """One moment of our choice, in the place of a FrameSampling."""

    mode = "uniform"

    def __init__(self, time_s):
        self.time_s = time_s

    def times_s(self, duration_s, start_s=0.0, offset=None):
        return [start_s + self.time_s]


def refused(source, sampling=EIGHT):
    with pytest.raises(UserError) as caught:
        read_clip(source, "shard 3, clip 7", sampling)
    assert str(caught.value).startswith("shard 3, clip 7: ")
    return str(caught.value)
