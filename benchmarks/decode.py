"""How many clips a second `read_clip` gives, next to bare PyAV decoding of the same files.

    python benchmarks/decode.py
    python benchmarks/decode.py --clips 50 --frames 1800 --size 360 640 --num-frames 32

Two kinds of clips, generated here and held in memory: tiny ones like the probe set's (8 frames of 64 x 64), and long
ones of `--frames` frames at `--size`. Rows, taken in turns within one run so that a busy machine slows all alike:

    read_clip        sampled frames as a tensor, resized to the encoder's square where the clip is long
    bare PyAV        the same file decoded from its first to its last frame, no colour conversion
    bare PyAV, RGB   the same, the sampled frames converted with `to_ndarray` at full size

One process, one thread. Figures differ by machine: compare rows, not runs.
"""

import argparse
import io
import time
from collections.abc import Callable

import av
import numpy as np
import torch

from lightning_crosslmm.video import FrameSampling, encode_video, read_clip


def moving_picture(num_frames: int, height: int, width: int) -> np.ndarray:
    """Draw a pattern that drifts, with some noise: neither free nor impossible to predict. uint8 (F, H, W, 3)."""
    noise_HW = np.random.default_rng(0).integers(0, 24, (height, width), dtype=np.uint8)
    y_H1, x_1W = np.arange(height)[:, None], np.arange(width)[None]
    frames_FHWC = np.empty((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        shade_HW = (100 + 60 * np.sin((x_1W + 3 * number) / 17) + 60 * np.cos((y_H1 - number) / 23)).astype(np.uint8)
        frames_FHWC[number] = (shade_HW + np.roll(noise_HW, number, axis=1))[..., None]
    return frames_FHWC


def decode_bare(video: bytes, wanted: frozenset[int]) -> None:
    """Decode every frame with PyAV on one thread, and convert the wanted ones to RGB."""
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frame.to_ndarray(format="rgb24", threads=1)


def clips_per_s(readers: dict[str, Callable[[], object]], num_clips: int) -> dict[str, float]:
    """Call the readers in turns and count how many calls each does in a second of its own time."""
    spent_s = dict.fromkeys(readers, 0.0)
    for turn in range(num_clips + 1):  # the first turn warms up
        for name, read in readers.items():
            start_s = time.perf_counter()
            read()
            spent_s[name] += (time.perf_counter() - start_s) * (turn > 0)
    return {name: num_clips / seconds for name, seconds in spent_s.items()}


def measure(video: bytes, num_frames: int, sampled: int, image_size: int | None, num_clips: int) -> dict[str, float]:
    """Measure the three rows on one clip."""
    sampling = FrameSampling("uniform", num_frames=sampled)
    wanted = frozenset(int((i + 0.5) * num_frames / sampled) for i in range(sampled))
    readers = {
        "read_clip": lambda: read_clip(video, "benchmark clip", sampling, image_size),
        "bare PyAV": lambda: decode_bare(video, frozenset()),
        "bare PyAV, RGB": lambda: decode_bare(video, wanted),
    }
    return clips_per_s(readers, num_clips)


def main() -> None:
    """Print clips per second, one row per way of reading and one column per kind of clip."""
    parser = argparse.ArgumentParser(description="Measure read_clip against bare PyAV decoding.")
    parser.add_argument("--clips", type=int, default=10, help="long clips to read; ten times as many tiny ones")
    parser.add_argument("--frames", type=int, default=750, help="frames of a long clip, at 25 Hz")
    parser.add_argument("--size", type=int, nargs=2, default=(360, 640), metavar=("H", "W"), help="of a long clip")
    parser.add_argument("--num-frames", type=int, default=8, help="frames sampled from a clip")
    chosen = parser.parse_args()
    torch.set_num_threads(1)

    tiny = encode_video(moving_picture(8, 64, 64), 4.0)
    long = encode_video(moving_picture(chosen.frames, *chosen.size), 25.0, preset="veryfast", crf=23)
    title = f"{chosen.frames} x {chosen.size[0]} x {chosen.size[1]}"
    columns = {
        "8 x 64 x 64": measure(tiny, 8, chosen.num_frames, None, 10 * chosen.clips),
        f"{title}, to 224": measure(long, chosen.frames, chosen.num_frames, 224, chosen.clips),
    }
    print(f"{'clips/s':16}" + "".join(f"{name:>28}" for name in columns))
    for row in columns["8 x 64 x 64"]:
        print(f"{row:16}" + "".join(f"{rates[row]:28.1f}" for rates in columns.values()))


if __name__ == "__main__":
    main()
