"""How many samples a second the stream gives, next to as many processes that call PyAV on the same clips as open files.

    OMP_NUM_THREADS=1 python benchmarks/stream.py
    OMP_NUM_THREADS=1 python benchmarks/stream.py --workers 4 --clips FOLDER_OF_VIDEOS --turns 9

Two kinds of clips: tiny ones like the probe set's (4 frames of 64 x 64), and 360p ones: the videos of `--clips`, or two
that are rendered here. They are packed into shards, and every sample asks one question, no two the same.

    stream   index, ranges of the shard, sha256, decoding, resizing, tokens, collation, the way to the training process
    PyAV     each clip opened by its file name, its frames converted and resized in the worker, and dropped there; by
             seeking or by decoding from the start, whichever is faster for the clip

Both sides do the same number of clips per turn from the first request to the last result, so nothing is prepared ahead
of the clock, and take turns, so that a busy machine slows both. Rates are medians over turns, ratios medians of the
ratios within turns. CPU time is that of all processes of a side; it tells more than rates where cores are shared.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

import numpy as np
import psutil
import torch
from decode import moving_picture
from seek import pyav_everything, pyav_frames, render

from data.module import VideoDataModule
from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.shards import SampleInfo, ShardWriter
from lightning_crosslmm.video import FrameSampling, encode_video, probe_video, read_clip

Clip = tuple[str, list[float], bool, int]
"""File, wanted times in seconds, whether seeking is faster, side of the square in pixels."""


def decode(clip: Clip) -> int:
    """Do what a worker of the PyAV side does with one clip; gives the number of frames."""
    name, wanted_s, seeks, side = clip
    read = pyav_frames if seeks else pyav_everything
    frames = [picture for _, picture in read(name, wanted_s, width=side, height=side, interpolation="BICUBIC")]
    return len(np.stack(frames))


def prepare(video: Path, num_frames: int, side: int) -> Clip:
    """Find out when the stream would look at a clip, and which way of reading it is faster."""
    sampling = FrameSampling("uniform", num_frames=num_frames)
    wanted_s = [time_s + 5e-4 for time_s in sampling.times_s(probe_video(video, video.name).duration_s)]
    spent_s = {}
    for seeks in (True, False) * 3:
        start_s = time.perf_counter()
        decode((str(video), wanted_s, seeks, side))
        spent_s[seeks] = min(time.perf_counter() - start_s, spent_s.get(seeks, np.inf))
    shown_s = [time_s for time_s, _ in pyav_everything(str(video), wanted_s)]
    if not np.allclose(shown_s, read_clip(video, video.name, sampling).frame_time_s_F, atol=2e-3):
        raise RuntimeError(f"{video}: the two sides would read other frames")
    return str(video), wanted_s, spent_s[True] < spent_s[False], side


def write_shards(videos: list[Path], count: int, folder: Path) -> Path:
    """Pack `count` samples, the videos by turns."""
    facts = {video: (video.read_bytes(), SampleInfo.of([probe_video(video, video.name)])) for video in videos}
    with ShardWriter(folder, samples_per_shard=64) as writer:
        for number, video in enumerate(islice(cycle(videos), count)):
            messages = (
                Message("user", f"<video>\nWhat is held in clip {number}?"),
                Message("assistant", "A book, open."),
            )
            conversation = Conversation(f"s{number:06d}", messages, (Visual("video", video.name),), ("",))
            writer.write(conversation, {conversation.members[0]: facts[video][0]}, facts[video][1])
    return folder


def stream_of(shards: Path, num_frames: int, side: int, batch: int, workers: int) -> VideoDataModule:
    """Open the stream that training would read."""
    datamodule = VideoDataModule(
        sampling=FrameSampling("uniform", num_frames=num_frames),
        image_size=side,
        tokenizer="byte",
        max_tokens=1024,
        global_batch_size=batch,
        train=str(shards),
        sample_timeout_s=60,
        num_workers=workers,
        prefetch_batches=4,
    )
    datamodule.setup("fit")
    return datamodule


def cpu_s() -> float:
    """CPU time so far of this process and all it started that still live, in seconds."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def spent(work: Callable[[], int]) -> tuple[float, float]:
    """Clips per second and CPU seconds per clip of some work that tells how many it did."""
    start_s, start_cpu_s = time.perf_counter(), cpu_s()
    done = work()
    return done / (time.perf_counter() - start_s), (cpu_s() - start_cpu_s) / done


def measure(videos: list[Path], num_frames: int, side: int, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Let both sides take turns on some videos."""
    clips = [prepare(video, num_frames, side) for video in videos]
    work = list(islice(cycle(clips), count))
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(videos, count, Path(folder) / "shards")
        datamodule = stream_of(shards, num_frames, side, options.batch, options.workers)
        loader = datamodule.train_dataloader()
        started = multiprocessing.get_context("forkserver").Pool(options.workers) if options.workers else nullcontext()
        with started as pool:
            through = partial(pool.imap_unordered, chunksize=options.batch) if pool else map
            sides: dict[str, Callable[[], int]] = {
                "stream": lambda: sum(len(batch.keys) for batch in loader),
                "PyAV": lambda: sum(1 for _ in through(decode, work)),
            }
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for turn in range(options.turns + 1):  # the first one starts the workers
                for name in list(sides)[:: 1 if turn % 2 else -1]:
                    figures = spent(sides[name])
                    found[name] += [figures] if turn else []
        datamodule.teardown("fit")
    pairs = list(zip(found["stream"], found["PyAV"], strict=True))
    return {
        "clips_per_s": {name: statistics.median(rate for rate, _ in each) for name, each in found.items()},
        "cpu_ms_per_clip": {name: statistics.median(cpu for _, cpu in each) * 1e3 for name, each in found.items()},
        "ratio": statistics.median(ours[0] / theirs[0] for ours, theirs in pairs),
        "cpu_ratio": statistics.median(theirs[1] / ours[1] for ours, theirs in pairs),
    }


def main() -> None:
    """Print a row per kind of clip."""
    parser = argparse.ArgumentParser(description="Measure the stream against PyAV on open files.")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes of each side; 0: this one")
    parser.add_argument("--batch", type=int, default=8, help="clips of a batch, and of a task of the other side")
    parser.add_argument("--clips", type=Path, help="a folder of 360p videos (.mp4); rendered ones without it")
    parser.add_argument("--count", type=int, default=96, help="360p clips of a turn; ten times as many tiny ones")
    parser.add_argument("--num-frames", type=int, default=8, help="frames sampled from a 360p clip")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.mp4").write_bytes(encode_video(moving_picture(4, 64, 64), 4.0))
        videos = sorted(chosen.clips.glob("*.mp4")) if chosen.clips else []
        for number, gop in enumerate(() if chosen.clips else (250, 50)):
            videos.append(folder / f"clip-{number}.mp4")
            videos[-1].write_bytes(render(1 / 6, 360, 640, gop))
        rows = {
            "4 x 64 x 64": measure([folder / "tiny.mp4"], 4, 32, 10 * chosen.count, chosen),
            f"{len(videos)} videos to 224": measure(videos, chosen.num_frames, 224, chosen.count, chosen),
        }
    print(f"{chosen.workers} workers of each side, {chosen.turns} turns")
    print(f"{'':<18}{'stream /s':>10}{'PyAV /s':>10}{'ratio':>8}{'stream CPU ms':>15}{'PyAV CPU ms':>13}{'ratio':>8}")
    for title, row in rows.items():
        rates, cpu_ms = row["clips_per_s"].values(), row["cpu_ms_per_clip"].values()
        print(
            f"{title:<18}" + "".join(f"{rate:>10.1f}" for rate in rates) + f"{row['ratio']:>8.2f}"
            f"{next(iter(cpu_ms)):>15.2f}" + f"{list(cpu_ms)[1]:>13.2f}{row['cpu_ratio']:>8.2f}"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
