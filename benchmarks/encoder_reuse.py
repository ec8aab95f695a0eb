"""What an encoder is spared: frames that repeat, encoded once, and features kept on disk; and what lossy sharing costs.

    python benchmarks/encoder_reuse.py
    python benchmarks/encoder_reuse.py --shards SHARDS --frames 32 --turns 3

Clips in shards of one's own, and three generated ones that stand still: a picture, the same picture
under a camera's noise, and four slides. All are H.264, decoded as in training. Times are the process's own CPU time of
the visual side, one thread, median of `--turns`, arms in turns: comparing, hashing and files count, decoding does not.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

import torch
from torch import Tensor

from lightning_crosslmm.answer import prompt_batch
from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides, instantiate
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.text import Text
from lightning_crosslmm.video import FrameSampling, encode_video, read_clip

CONF = Path(__file__).resolve().parents[1] / "conf"
# ViT-Ti in place of two blocks of width 64, so that the tower has something to be spared
TOWER = (
    "experiment=real_clips",
    "encoder.image_size=96",
    "encoder.config.embed_dim=192",
    "encoder.config.depth=12",
    "encoder.config.num_heads=3",
    "encoder.config.mlp_ratio=4",
    "optim.lr.encoder=null",
)
CACHE = "encoder.feature_cache.folder={folder}"
ARMS = {
    "off": "",
    "tolerance 0": "encoder.same_frame_tolerance=0",
    "tolerance 1": "encoder.same_frame_tolerance=1",
    "tolerance 2": "encoder.same_frame_tolerance=2",
    "tolerance 4": "encoder.same_frame_tolerance=4",
    "cache, cold": CACHE,
    "cache, warm": CACHE,
}
SIDE, SECONDS, RATE_HZ = 192, 16, 8.0
HEADER = (
    f"{'clips':<18}{'arm':<14}{'frames':>7}{'encoded':>9}{'CPU s':>8}{'of off':>8}{'max dev.':>10}{'mean dev.':>11}"
)


def over_tower(settings: Sequence[str]) -> list[str]:
    """Put settings over those of the scaled tower."""
    given = {word.partition("=")[0] for word in settings}
    return [*(word for word in TOWER if word.partition("=")[0] not in given), *settings]


def still_clips(num_frames: int, image_size: int) -> Iterator[tuple[str, list[VideoBatch]]]:
    """Encode and decode pictures that stand still."""
    noise = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 12, 12, generator=noise)
    pictures = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1) * 255
    length = round(SECONDS * RATE_HZ)
    grain = torch.randn(length, 3, SIDE, SIDE, generator=noise) * 3
    films = {
        "still picture": pictures[:1].expand(length, -1, -1, -1),
        "still, noise": pictures[:1] + grain,
        "four slides": pictures.repeat_interleave(length // 4, dim=0),
    }
    sampling = FrameSampling("uniform", num_frames=num_frames)
    for name, film_FCHW in films.items():
        content = encode_video(film_FCHW.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1), RATE_HZ)
        clip = read_clip(content, name, sampling, image_size)
        yield name, [prompt_batch(name, "video", clip, Text([0], [0], [-1]))]


def real_clips(shards: Path, words: Sequence[str]) -> dict[str, list[VideoBatch]]:
    """Read every sample of a folder of shards, by its key."""
    where = (f"data.train={shards}", f"data.val={shards}", "data.num_workers=0", "data.global_batch_size=1")
    config = compose_overrides(CONF, [*words, *where])
    data = instantiate(config.data, ANY_TARGET)
    data.prepare_data()
    data.setup("validate")
    return {batch.keys[0]: [batch] for batch in data.val_dataloader() if len(batch.frames_FCHW)}


def build(words: Sequence[str], arm: str, folder: Path) -> CrossLMM:
    """Build an arm; all have the same weights."""
    config = compose_overrides(CONF, [*words, "data.train=none", "data.val=none", *arm.format(folder=folder).split()])
    torch.manual_seed(0)
    model = build_model(config, ANY_TARGET).eval()
    instantiate(config.optim, ANY_TARGET).freeze(model)
    model.keep_features()
    return model


@torch.no_grad()
def measure(model: CrossLMM, batches: Sequence[VideoBatch]) -> tuple[float, float, list[Tensor]]:
    """Encode batches: CPU seconds, the share of frames that the tower ran on, and source tokens."""
    frames: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda _, given: frames.append(len(given[0])))
    start_s = time.process_time()
    sources = [model.encode(batch).source.features_SD for batch in batches]
    spent_s = time.process_time() - start_s
    handle.remove()
    return spent_s, sum(frames) / sum(len(batch.frames_FCHW) for batch in batches), sources


def compare(name: str, batches: Sequence[VideoBatch], models: dict[str, CrossLMM], kept: Path, turns: int) -> list[str]:
    """Let all arms encode the same batches, in turns; rows of the table."""
    times_s: dict[str, list[float]] = {arm: [] for arm in models}
    shares: dict[str, float] = {}
    off_by: dict[str, tuple[float, float]] = {}
    for turn in range(turns + 1):  # the first turn warms up, and hashes weights, which a run does once
        expected: list[Tensor] = []
        shutil.rmtree(kept, ignore_errors=True)
        for arm, model in models.items():
            spent_s, shares[arm], sources = measure(model, batches)
            expected = expected or sources
            off_by[arm] = deviation(sources, expected)
            times_s[arm] += [spent_s] * (turn > 0)
    frames = sum(len(batch.frames_FCHW) for batch in batches)
    seconds = {arm: statistics.median(spent_s) for arm, spent_s in times_s.items()}
    return [
        f"{name:<18}{arm:<14}{frames:>7}{shares[arm]:>9.3f}{seconds[arm]:>8.3f}{seconds[arm] / seconds['off']:>8.3f}"
        f"{off_by[arm][0]:>10.2g}{off_by[arm][1]:>11.2g}"
        for arm in models
    ]


def deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Measure how far source tokens are off, the furthest entry and the mean, in units of their RMS."""
    right_SD = torch.cat(list(expected))
    apart_SD = (torch.cat(list(found)) - right_SD).abs() / right_SD.square().mean().sqrt()
    return float(apart_SD.max()), float(apart_SD.mean())


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="settings of train.py, over those of the scaled tower")
    parser.add_argument("--shards", type=Path, help="a folder that crosslmm pack wrote")
    parser.add_argument("--frames", type=int, default=32, help="of each clip")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_intermixed_args()
    words = over_tower([f"data.sampling.num_frames={args.frames}", *args.settings])
    torch.set_num_threads(1)
    try:
        image_size = compose_overrides(CONF, [*words, "data.train=none", "data.val=none"]).encoder.image_size
        clips = dict(still_clips(args.frames, image_size))
        if args.shards is not None:
            clips = {**real_clips(args.shards, words), **clips}
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "features"
            models = {arm: build(words, settings, kept) for arm, settings in ARMS.items()}
            sys.stdout.write(HEADER + "\n")
            for name, batches in clips.items():
                sys.stdout.write("\n".join(compare(name, batches, models, kept, args.turns)) + "\n")
                sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
