"""Kill runs at random moments and see whether what comes of them is what an undisturbed run gives, bit for bit.

    python benchmarks/kill_resume.py --trials 16 --seed 0
    python benchmarks/kill_resume.py --trials 4 --arms ranks=2

Each trial trains a small model on the probe set's clips for `--steps` steps, is killed (SIGKILL, all of its processes)
one to three times in a row, and goes on by `resume=auto` each time. Kills come after a random batch, at most `--within`
steps after the last start, and a third of them where an epoch ends; half of them at once, which with accumulation may
be amid a step, half some tenths of a second later, which may be while a checkpoint is written. Compared with a run of
the same settings that nobody killed: parameters, optimizer state, schedule, position in the data, final metrics and the
samples of every step. Trials take turns among the arms, in an order drawn from the seed; 16 trials are all of them:
1 process or 2 with FSDP2, 0 or 2 workers, rows packed or not, gradients accumulated or not. Checkpoints come every
third step.

Prints a line per trial and `N of N`; the exit code is 1 unless all are equal.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_crosslmm.checkpoint_folder import SHARDED, list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "data.probe.clips={train: 40, val: 8, test: 4}",
    "data.probe.clips_per_shard=8",
    "data.probe.questions_per_clip=4",
    "data.encoder_fit.steps=5",
    "data.global_batch_size=4",
    "+llm.model.config.attention_dropout=0.1",  # random state matters
    "trainer.val_check_interval=8",
    "callbacks.checkpoints.every_n_steps=3",
    "callbacks.attention_picture=null",
    "callbacks.prefill_cost=null",  # wall times, which are no part of the comparison
    "callbacks.progress=null",
    "logger.tensorboard=null",
)
RANKS = {"ranks=1": (), "ranks=2": ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")}
RANKS["ranks=2"] += ("trainer.precision=32-true",)
WORKERS = {"workers=0": ("data.num_workers=0",), "workers=2": ("data.num_workers=2",)}
ROWS = {"unpacked": (), "packed": ("data.pack_tokens=160",)}
PIECES = {"whole": (), "accumulated": ("trainer.accumulate_grad_batches=2",)}
TIMES = ("train/seconds", "train/clips_per_s", "train/steps_per_s", "train/wait_share")


def arms() -> dict[str, list[str]]:
    """Name every combination and give its settings."""
    groups = (PIECES, ROWS, WORKERS, RANKS)
    named = {" ".join(reversed(names)): names for names in itertools.product(*groups)}
    return {name: [word for g, n in zip(groups, names, strict=True) for word in g[n]] for name, names in named.items()}


def start(words: list[str], folder: Path) -> subprocess.Popen:
    """Start a run, or go on with it, in a process group of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *words, f"run_dir={folder / 'run'}", "resume=auto"]
    command.append(f"+callbacks.witness={{_target_: benchmarks.witness.Witness, folder: {folder / 'steps'}}}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folder.parent, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def batches_of(folder: Path) -> dict[tuple[int, int, int], tuple[int, list[str]]]:
    """Read epoch and samples by (step, piece of it, rank); the last line of each is what counts."""
    found = {}
    for path in sorted((folder / "steps").glob("rank-*.jsonl")):
        rank = int(path.stem.split("-")[1])
        for line in path.read_text().splitlines():
            step, piece, epoch, keys = json.loads(line)
            found[step, piece, rank] = epoch, keys
    return found


def epoch_ends(folder: Path) -> list[tuple[int, int]]:
    """Name the last (step, piece) of each epoch of a finished run."""
    last = {epoch: place[:2] for place, (epoch, _) in sorted(batches_of(folder).items())}
    return list(last.values())[:-1]


def last_of(folder: Path) -> tuple[int, int]:
    """Name the furthest (step, piece) that any process trained."""
    return max((place[:2] for place in batches_of(folder)), default=(-1, 0))


def disturb(words: list[str], folder: Path, beside: Path, within: int, dice: random.Random) -> list[str]:
    """Run to the end, killing on the way.

    Args:
        words: settings.
        folder: of the run.
        beside: of the run that nobody disturbs, which is done.
        within: most steps from where the run stands to its kill.
        dice: says when.

    Returns:
        The "step.piece" that each kill came after.
    """
    killed = []
    places, ends = sorted({place[:2] for place in batches_of(beside)}), epoch_ends(beside)
    for _ in range(dice.randint(1, 3)):
        last = last_of(folder)
        ahead = [place for place in places[:-1] if last < place and place[0] <= last[0] + within]
        at_end = [place for place in ends if place in ahead] if dice.random() < 1 / 3 else []
        if not ahead:
            break
        goal, wait_s = dice.choice(at_end or ahead), dice.choice((0.0, dice.uniform(0, 0.4)))
        process = start(words, folder)
        while process.poll() is None and last_of(folder) < goal:
            time.sleep(0.01)
        time.sleep(wait_s)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.append(".".join(map(str, last_of(folder))))
    finish(words, folder)
    return killed


def finish(words: list[str], folder: Path) -> None:
    """Run to the end undisturbed.

    Raises:
        RuntimeError: it ended with an error.
    """
    if (code := start(words, folder).wait()) != 0:
        raise RuntimeError(f"exit code {code}; see {folder / 'log'}")


def outcome(folder: Path) -> dict[str, Any]:
    """Read what a run amounts to: the last checkpoint whole, the metrics, the samples of each step."""
    saved, _ = list_checkpoints(folder / "run")
    path = saved[-1].loadable
    if (path / SHARDED).exists():
        whole = folder / "whole.pt"
        dcp_to_torch_save(path, whole)  # a run's own files: these are pickles
        state = torch.load(whole, weights_only=False) | {"meta": torch.load(path / SHARDED, weights_only=True)}
    else:
        state = torch.load(path, weights_only=True)
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    return {
        "checkpoint": state,
        "metrics": {name: value for name, value in metrics.items() if name not in TIMES},
        "samples": {str(place): keys for place, (_, keys) in batches_of(folder).items()},
    }


def different(one: Any, other: Any, where: str = "") -> list[str]:
    """Name the places where two nests of tensors and plain values differ; wall times do not count."""
    if "seconds" in where or "RunRecord" in where or "Throughput" in where or "path" in where:
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in {**one, **other}
            for found in different(one.get(key, "absent"), other.get(key, "absent"), f"{where}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [w for n, pair in enumerate(zip(one, other, strict=True)) for w in different(*pair, f"{where}/{n}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if one == other else [where]


def main() -> None:
    """Do the trials."""
    parser = argparse.ArgumentParser(description="Kill, resume, compare.")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--within", type=int, default=12, help="most steps from a start to its kill")
    parser.add_argument("--arms", nargs="*", default=[], help="words that an arm's name must hold, ranks=2 for one")
    parser.add_argument("--out", type=Path, default=Path("runs/kill_resume"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    dice = random.Random(chosen.seed)
    named = [(name, words) for name, words in arms().items() if set(chosen.arms) <= set(name.split())]
    dice.shuffle(named)
    references: dict[str, dict[str, Any]] = {}
    equal = 0
    for trial, (name, words) in zip(range(chosen.trials), itertools.cycle(named), strict=False):
        words = [*words, f"trainer.max_steps={chosen.steps}", f"data.cache_dir={chosen.out.resolve() / 'cache'}"]
        folder = chosen.out.resolve() / f"trial-{trial}"
        for place in (folder, beside := folder.with_name("undisturbed-" + name.replace(" ", "-").replace("=", ""))):
            if place == folder or name not in references:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
        if name not in references:
            finish(words, beside)
            references[name] = outcome(beside)
        killed = disturb(words, folder, beside, chosen.within, dice)
        found = different(references[name], outcome(folder))
        equal += not found
        verdict = "equal" if not found else f"DIFFERENT in {len(found)} places, {found[0]} first"
        print(f"{trial + 1:>3}  {name:<40} killed after {', '.join(killed) or 'nothing':<16} {verdict}", flush=True)
    print(f"{equal} of {chosen.trials} runs that were killed are bit for bit the run that was not")
    sys.exit(equal != chosen.trials)


if __name__ == "__main__":
    main()
