"""Two processes train together: the very command, and samples that bring no video to one of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.shards import SampleInfo, ShardWriter
from lightning_crosslmm.video import encode_video

ROOT = Path(__file__).resolve().parent.parent


def write_samples(folder: Path) -> None:
    """Every second sample is text alone; one has its video after all text that could see it."""
    video = encode_video(np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8), 4.0)
    with ShardWriter(folder) as writer:
        for number in range(8):
            has_video = number % 2 == 0
            asked = Message("user", ("<video>" if has_video else "") + f"what is {number}?")
            sample = Conversation(
                f"sample-{number}",
                (asked, Message("assistant", "red")),
                (Visual("video", "clip.mp4"),) if has_video else (),
                ("colour",),
            )
            writer.write(
                sample, {"0.mp4": video} if has_video else {}, SampleInfo(1.0, 4, ((0.0,),) if has_video else ())
            )


def test_ranks_with_and_without_video_train_together(tmp_path: Path) -> None:
    write_samples(tmp_path / "shards")
    words = [
        "data=shards",
        f"data.train={tmp_path / 'shards'}",
        f"data.val={tmp_path / 'shards'}",
        f"run_dir={tmp_path / 'run'}",
        "data.global_batch_size=2",
        "data.num_workers=0",
        "data.sampling.num_frames=2",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.precision=32-true",
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        "optim.lr.encoder=1e-3",
        "callbacks.attention_picture=null",
        "seed=1",
    ]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    # a parameter without a gradient on one rank would end the second step with an error, or never
    assert done.returncode == 0, done.stderr[-3000:]
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["processes"] == 2 and provenance["error"] is None
    assert "val/accuracy" in json.loads((tmp_path / "run" / "metrics.json").read_text())
