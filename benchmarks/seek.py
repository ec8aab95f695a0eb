"""How long it takes to get 32 frames out of a long clip: `read_clip` next to other ways of seeking.

    python benchmarks/seek.py
    python benchmarks/seek.py --minutes 2 --size 720 1280 --gop 30 --turns 5

The clip is rendered here (H.264, one keyframe in `--gop` frames) and held in memory. All ways take turns within one
run, on one thread, and give RGB frames at full size; each is told by its best turn, in wall and CPU time; where cores
are shared with others, the latter counts. Rows:

    read_clip             uniform times, exact
    read_clip, keyframes  the nearest keyframes: faster and lossy
    PyAV seek             a seek and decoding forward for each wanted time
    torchcodec            frames played at the same times, exact mode (where it is installed and finds FFmpeg)
    PyAV, everything      the clip decoded from its first frame to the last one wanted

The exact ways must give the same timestamps; the last line says whether they did. Figures differ by machine: compare
rows.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
import torch

from lightning_crosslmm.video import FrameSampling, read_clip

FPS_HZ = 25


def render(minutes: float, height: int, width: int, gop: int) -> bytes:
    """Encode a pattern that drifts under changing noise, frame by frame, so that minutes of it fit into memory."""
    noise_HW = np.random.default_rng(0).integers(0, 24, (height, width), dtype=np.uint8)
    y_H1, x_1W = np.arange(height)[:, None], np.arange(width)[None]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", FPS_HZ, options={"g": str(gop), "preset": "veryfast", "crf": "23"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(round(minutes * 60 * FPS_HZ)):
            wave_HW = 100 + 60 * np.sin((x_1W + 3 * number) / 17) + 60 * np.cos((y_H1 - number) / 23)
            grey_HW = wave_HW.astype(np.uint8) + np.roll(noise_HW, number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey_HW, format="gray")))
        container.mux(stream.encode())
    return file.getvalue()


def pyav_frames(video: bytes | str, wanted_s: list[float], **picture: Any) -> Iterator[tuple[float, np.ndarray]]:
    """Seek to each time and decode forward to the frame on screen; `picture` is what the conversion to RGB is told."""
    with av.open(io.BytesIO(video) if isinstance(video, bytes) else video) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for moment_s in wanted_s:
            container.seek(int(moment_s / stream.time_base), stream=stream)
            shown = None
            for frame in container.decode(stream):
                if frame.time > moment_s:
                    break
                shown = frame
            yield shown.time, shown.to_ndarray(format="rgb24", threads=1, **picture)


def pyav_everything(video: bytes | str, wanted_s: list[float], **picture: Any) -> Iterator[tuple[float, np.ndarray]]:
    """Decode frames from the first on, as far as need be, and keep those on screen at the wanted times."""
    with av.open(io.BytesIO(video) if isinstance(video, bytes) else video) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        rest, shown = list(wanted_s), None
        for frame in container.decode(stream):
            while rest and shown is not None and frame.time > rest[0]:
                yield shown.time, shown.to_ndarray(format="rgb24", threads=1, **picture)
                rest.pop(0)
            if not rest:
                return
            shown = frame
        for _ in rest:
            yield shown.time, shown.to_ndarray(format="rgb24", threads=1, **picture)


def torchcodec_times(video: bytes, wanted_s: list[float]) -> list[float]:
    """Let torchcodec give the frames played at the wanted times."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(video, seek_mode="exact", num_ffmpeg_threads=1)
    return decoder.get_frames_played_at(seconds=wanted_s).pts_seconds.tolist()


def ways(video: bytes, num_frames: int, duration_s: float) -> dict[str, Callable[[], list[float]]]:
    """List the ways; each returns the timestamps of its frames."""
    uniform = FrameSampling("uniform", num_frames=num_frames)
    wanted_s = uniform.times_s(duration_s)
    keyframes = FrameSampling("keyframes", num_frames=num_frames)
    found = {
        "read_clip": lambda: read_clip(video, "clip", uniform).frame_time_s_F.tolist(),
        "read_clip, keyframes": lambda: read_clip(video, "clip", keyframes).frame_time_s_F.tolist(),
        "PyAV seek": lambda: [time_s for time_s, _ in pyav_frames(video, wanted_s)],
        "PyAV, everything": lambda: [time_s for time_s, _ in pyav_everything(video, wanted_s)],
    }
    try:
        torchcodec_times(video, wanted_s[:1])
    except (ImportError, RuntimeError, OSError):
        return found
    return found | {"torchcodec": lambda: torchcodec_times(video, wanted_s)}


def main() -> None:
    """Print a table of milliseconds per clip."""
    parser = argparse.ArgumentParser(description="Measure sampling a long clip.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--size", type=int, nargs=2, default=(360, 640), metavar=("H", "W"))
    parser.add_argument("--gop", type=int, default=250, help="frames from one keyframe to the next")
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    video = render(chosen.minutes, *chosen.size, chosen.gop)
    readers = ways(video, chosen.num_frames, chosen.minutes * 60)
    best_s, best_cpu_s, times_s = dict.fromkeys(readers, float("inf")), dict.fromkeys(readers, float("inf")), {}
    for _ in range(chosen.turns):
        for name, read in readers.items():
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            times_s[name] = read()
            best_s[name] = min(best_s[name], time.perf_counter() - start_s)
            best_cpu_s[name] = min(best_cpu_s[name], time.process_time() - start_cpu_s)
    size = f"{chosen.size[0]}x{chosen.size[1]}"
    print(f"{chosen.num_frames} frames of {chosen.minutes:g} min at {size}, keyframe every {chosen.gop}")
    print(f"{'':<22}{'ms':>8}{'x read_clip':>14}{'CPU ms':>10}{'x read_clip':>14}")
    for name, seconds in sorted(best_cpu_s.items(), key=lambda item: item[1]):
        wall_s, shares = best_s[name], (best_s[name] / best_s["read_clip"], seconds / best_cpu_s["read_clip"])
        print(f"{name:<22}{wall_s * 1e3:>8.0f}{shares[0]:>14.2f}{seconds * 1e3:>10.0f}{shares[1]:>14.2f}")
    exact = [name for name in readers if name != "read_clip, keyframes"]
    agree = all(np.allclose(times_s[name], times_s["PyAV, everything"], atol=1e-3) for name in exact)
    print(f"timestamps of {', '.join(exact)}: {'equal' if agree else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
