"""The probe's table: `python train.py` for every arm and seed, one after the other, and what came of it.

    python benchmarks/probe.py
    python benchmarks/probe.py trainer.max_steps=300 --seeds 0 --arms fusion=crosslmm fusion=none --check

Each arm is a string of settings of its own. A run that is done is not done again, and one that was interrupted goes on,
so the command can be repeated until the table is whole. `--check` holds the project's bar against it, for every seed.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

from lightning_crosslmm.compose import ANY_TARGET, compose_overrides, instantiate, load_run
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import has_checkpoints, replacing
from lightning_crosslmm.same_run import as_word

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
ARMS = ("fusion=crosslmm", "fusion=none", "fusion=v2v", "fusion=t2v", "pooler=none fusion=none")
ACCURACY = "val/accuracy"
METHOD, BASELINE = "fusion=crosslmm", "fusion=none"
LEAST_ACCURACY, LEAST_LEAD = 0.95, 0.30


@dataclass
class Run:
    """One training of one arm.

    Args:
        arm: its settings, as given.
        seed: of the training.
        folder: its run folder.
        words: the command line after ``train.py``.
        error: why there are no numbers, or None.
        metrics: the run's ``metrics.json``.
        commit: the code it was trained with.
        steps: optimizer steps.
        tokens_per_frame: pooled tokens, None where it depends on the picture.
        llm_tokens: what the LLM reads of a sample, mean over the first validation batch.
    """

    arm: str
    seed: int
    folder: Path
    words: list[str]
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    commit: str | None = None
    steps: int | None = None
    tokens_per_frame: int | None = None
    llm_tokens: float | None = None

    def train(self) -> None:
        """Run the command unless it has been run; a failure is noted, not raised.

        Raises:
            UserError: the folder holds a run of another command.
        """
        record = _read_json(self.folder / "provenance.json")
        done_words = [word for word in record.get("command", [])[1:] if not word.startswith("resume=")]
        if record and done_words != self.words:
            raise UserError(f"{self.folder}: holds a run of `{shlex.join(done_words)}`; choose another --out")
        if _is_done(record) and ACCURACY in _read_json(self.folder / "metrics.json"):
            return
        words = list(self.words)
        if has_checkpoints(self.folder):
            words.append(as_word("resume", self.folder))
        log = self.folder.with_name(f"{self.folder.name}.log")
        with log.open("a") as output:
            command = [sys.executable, str(TRAIN), *words]
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        if code != 0:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            self.error = f"exit code {code}: {''.join(last)} (see {log})"

    def read(self) -> None:
        """Take the numbers from the run folder, and the token counts from its settings and data."""
        if self.error is not None:
            return
        metrics = _read_json(self.folder / "metrics.json")
        if metrics.get(ACCURACY) is None:
            self.error = f"{self.folder / 'metrics.json'} has no {ACCURACY}"
            return
        self.metrics, self.commit = metrics, _read_json(self.folder / "provenance.json").get("commit")
        config = load_run(self.folder)
        self.steps = config.trainer.max_steps
        self.tokens_per_frame, self.llm_tokens = count_tokens(config)


def count_tokens(config: Any) -> tuple[int | None, float | None]:
    """Tell what a run's LLM reads: pooled tokens per frame, and tokens per sample of the first validation batch."""
    from lightning_crosslmm.batch import VISUAL_MARK  # here, so that composing alone does not import torch

    for key, nothing in (("weights", None), ("pretrained", False)):  # only the shape is asked for
        if key in config.encoder:
            config.encoder[key] = nothing
    grid = instantiate(config.encoder, ANY_TARGET).grid
    per_frame = instantiate(config.pooler, ANY_TARGET).tokens_per_frame(grid)
    if per_frame is None:
        return None, None
    config.data.num_workers = 0
    datamodule = instantiate(config.data, ANY_TARGET)
    datamodule.prepare_data()
    datamodule.setup("validate")
    batch = next(iter(datamodule.val_dataloader()))
    num_tokens = int((batch.ids_L != VISUAL_MARK).sum()) + per_frame * len(batch.frames_FCHW)
    return per_frame, num_tokens / batch.num_samples


def plan(arms: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], out: Path) -> list[Run]:
    """Say which runs there are, seed by seed, so that an interrupted series compares arms.

    Raises:
        UserError: a mistake in an arm's settings, before anything is trained.
    """
    runs = []
    for seed in seeds:
        for arm in arms:
            folder = out / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', arm).strip('-')}_seed{seed}"
            words = [*overrides, *shlex.split(arm), f"seed={seed}", as_word("run_dir", folder)]
            compose_overrides(TRAIN.parent / "conf", words)
            runs.append(Run(arm, seed, folder, words))
    return runs


def table(runs: Sequence[Run]) -> str:
    """Lay the runs out as a Markdown table, a row per arm; all but the accuracies by seed are means over seeds."""
    arms, seeds = list(dict.fromkeys(run.arm for run in runs)), list(dict.fromkeys(run.seed for run in runs))
    kinds = sorted({name for run in runs for name in run.metrics if name.startswith(f"{ACCURACY}/")})
    columns: list[tuple[str, Callable[[Run], float | None], str]] = [
        *((f"seed {seed}", _metric(ACCURACY, seed), "{:.3f}") for seed in seeds),
        ("mean", _metric(ACCURACY), "{:.3f}"),
        *((kind.removeprefix(f"{ACCURACY}/"), _metric(kind), "{:.3f}") for kind in kinds),
        ("steps", lambda run: run.steps, "{:.0f}"),
        ("training s", _metric("train/seconds"), "{:.0f}"),
        ("tokens/frame", lambda run: run.tokens_per_frame, "{:.0f}"),
        ("LLM tokens", lambda run: run.llm_tokens, "{:.0f}"),
        ("clips/s", _metric("train/clips_per_s"), "{:.1f}"),
        ("wait share", _metric("train/wait_share"), "{:.1%}"),
    ]
    lines = [["arm", *(title for title, _, _ in columns)], ["---", *["---:"] * len(columns)]]
    for arm in arms:
        done = [run for run in runs if run.arm == arm and run.error is None]
        lines.append([arm, *(_mean(map(value, done), form) for _, value, form in columns)])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
    commits = sorted({run.commit or "unknown" for run in runs if run.error is None})
    text += f"\nAccuracy on validation, answers right to the last token. Commit: {', '.join(commits) or 'none'}.\n"
    return text + "".join(f"\nFailed: {run.arm}, seed {run.seed}: {run.error}\n" for run in runs if run.error)


def shortfalls(runs: Sequence[Run]) -> list[str]:
    """Name every seed at which the method misses the bar, or is not known to meet it."""
    accuracy = {(run.arm, run.seed): run.metrics.get(ACCURACY) for run in runs}
    found = []
    for seed in dict.fromkeys(run.seed for run in runs):
        method, baseline = accuracy.get((METHOD, seed)), accuracy.get((BASELINE, seed))
        if method is None or baseline is None:
            found.append(f"seed {seed}: {METHOD} has {method} and {BASELINE} has {baseline}; a run failed")
            continue
        if method < LEAST_ACCURACY:
            found.append(f"seed {seed}: {METHOD} has {method:.3f}, below {LEAST_ACCURACY}")
        if method - baseline < LEAST_LEAD - 1e-9:  # 0.95 - 0.65 is a lead of 0.30
            found.append(f"seed {seed}: {BASELINE} has {baseline:.3f}, less than {LEAST_LEAD:.2f} below {method:.3f}")
    return found


def _metric(name: str, seed: int | None = None) -> Callable[[Run], float | None]:
    return lambda run: run.metrics.get(name) if seed in (None, run.seed) else None


def _mean(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if known else "-"


def _is_done(record: dict[str, Any]) -> bool:
    return bool(record.get("ended")) and record.get("error") is None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    """Do the runs, print the table, write it beside them, and check the bar if asked to."""
    parser = argparse.ArgumentParser(description="Train the probe's arms and compare them.")
    parser.add_argument("overrides", nargs="*", help="settings of train.py, for every arm; before the options")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="settings of one arm each")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--out", type=Path, default=Path("runs/probe"), help="folder of the run folders and the table")
    parser.add_argument("--check", action="store_true", help=f"exit 1 below {LEAST_ACCURACY} or a lead of {LEAST_LEAD}")
    chosen = parser.parse_args()
    if chosen.check and not {METHOD, BASELINE} <= set(chosen.arms):
        parser.error(f"--check compares {METHOD} with {BASELINE}; --arms has {', '.join(chosen.arms)}")
    try:
        runs = plan(chosen.arms, chosen.seeds, chosen.overrides, chosen.out)
        chosen.out.mkdir(parents=True, exist_ok=True)
        for number, run in enumerate(runs, start=1):
            print(f"[{number}/{len(runs)}] {run.arm}, seed {run.seed}: {run.folder}", flush=True)
            run.train()
        for run in runs:
            run.read()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    text = table(runs)
    print(f"\n{text}")
    for name, content in (
        ("table.md", text),
        ("table.json", json.dumps([asdict(run) for run in runs], indent=2, default=str)),
    ):
        with replacing(chosen.out / name) as part:
            part.write_text(content)
    if chosen.check and (missed := shortfalls(runs)):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
