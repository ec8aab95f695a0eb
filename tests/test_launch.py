"""README's commands for several processes, run: started by Lightning, then gone on with under torchrun."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_ddp import ROOT, write_samples
from tests.test_docs import commands, section

OURS = ("run_dir", "resume", "trainer.max_steps")
pytestmark = pytest.mark.timeout(300)


def start(program: list[str], words: list[str], folder: Path, steps: int) -> None:
    """Run a command on few small samples, in a folder of the test."""
    kept = [word for word in words if word.partition("=")[0] not in OURS]
    small = [
        "data=shards",
        f"data.train={folder / 'shards'}",
        f"data.val={folder / 'shards'}",
        f"run_dir={folder / 'run'}",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "data.sampling.num_frames=2",
        "encoder.frames_per_chunk=3",
        "decoding.max_new_tokens=2",
        "gradient_checkpointing=true",
        f"trainer.max_steps={steps}",
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
    ]
    small += [f"resume={folder / 'run'}"] if any(word.startswith("resume=") for word in words) else []
    done = subprocess.run(
        [*program, "train.py", *kept, *small],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that Lightning started two processes for."""
    folder = tmp_path_factory.mktemp("launch")
    write_samples(folder / "shards")
    found = commands(section("Many GPUs"), "python", "train.py")
    (words,) = (each for each in found if "trainer.accelerator=cpu" in each)
    start([sys.executable], words, folder, steps=2)
    return folder


def test_lightning_starts_the_second_process(folder: Path) -> None:
    assert json.loads((folder / "run" / "provenance.json").read_text())["processes"] == 2
    assert 0 <= json.loads((folder / "run" / "metrics.json").read_text())["val/accuracy"] <= 1
    slices = {path.name for path in (folder / "run" / "checkpoints").rglob("*.distcp")}
    assert slices == {"__0_0.distcp", "__1_0.distcp"}


def test_torchrun_goes_on(folder: Path) -> None:
    (words,) = commands(section("Many GPUs"), "torchrun", "--nproc-per-node", "2", "train.py")
    start([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"], words, folder, steps=4)
    seen = []
    for path in sorted((folder / "run" / "csv").rglob("metrics.csv")):
        with path.open(newline="") as lines:
            seen.append([int(row["step"]) for row in csv.DictReader(lines) if row["train/loss"]])
    assert seen == [[0, 1], [2, 3]]


def test_a_sweep_of_sharded_runs_is_refused(tmp_path: Path) -> None:
    words = ["-m", "trainer=fsdp", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "start each distributed run by itself" in done.stderr
