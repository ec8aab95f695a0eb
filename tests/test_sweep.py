"""Sweeps: a folder for each run, one process at each, failures that stop nothing, and the same command again."""

import functools
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import train
from callbacks.curves import read_curves
from lightning_crosslmm.checkpoint_folder import list_checkpoints
from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import find_checkpoint
from lightning_crosslmm.same_run import OtherRunError
from lightning_crosslmm.stop_signals import RESUME_ME, STOP, Stopped
from lightning_crosslmm.sweep import (
    Ended,
    Outcome,
    SweepEnd,
    attempt,
    check_sweep,
    folder_name,
    read_sweep,
    summary,
)
from tests.test_train import SMALL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # a test has few
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),  # it does where training goes on
]
ARMS = ("pooler=random,average", "virtual_unmerging=expanded,none")
AVERAGE = ("pooler=average", "virtual_unmerging=none")
FIXED = (*SMALL, "trainer.max_steps=4", "callbacks.attention_picture=null", "data.cache_dir=cache")


def sweep(folder: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`python train.py -m` in this process, as far as Hydra is concerned; its log handlers go when it is over."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "-m", f"--config-path={train.CONF_DIR}", *FIXED, *words, "hydra.sweep.dir=sweep"]
    )
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        train.main()
    except SystemExit as end:
        return end.code
    finally:
        for handler in {*root.handlers} - {*before}:
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)
    return 0


def folder_of(sweep_dir: Path, *arms: str) -> Path:
    (found,) = (path for path in sweep_dir.iterdir() if set(arms) <= set(path.name.split(",")))
    return found


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, str]:
    """One sweep whose first arm cannot be built: its folder, exit code, and what it said."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        said = {name: io.StringIO() for name in ("stdout", "stderr")}
        for name, stream in said.items():
            patch.setattr(sys, name, stream)
        code = sweep(folder, *ARMS, monkeypatch=patch)
    return folder, code, *(stream.getvalue() for stream in said.values())


def test_a_failure_stops_no_other(swept: tuple[Path, int, str, str]) -> None:
    folder, code, out, err = swept
    assert code == 1
    failed = [f"pooler={name},virtual_unmerging=expanded" for name in ("random", "average")]
    assert [line.split(",callbacks.")[0] for line in err.splitlines() if line.startswith("failed: ")] == [
        f"failed: {name}" for name in failed
    ]
    assert "report: sweep/report\n" in out and (folder / "sweep" / "report" / "report.html").stat().st_size > 1000
    assert re.search(r"sweep: 4 runs\n +done +2 .*\n +skipped +0\n +failed +2 .*\n +pooler=random.*\n +pooler=av", out)
    for name in failed:
        record = json.loads((folder_of(folder / "sweep", *name.split(",")) / "failed.json").read_text())
        assert "virtual_unmerging=expanded" in record["message"] and "\n" not in record["message"]
        assert "Traceback" in record["traceback"] and datetime.fromisoformat(record["time"]) < datetime.now(UTC)
    for arm in ("pooler=random", "pooler=average"):
        run = folder_of(folder / "sweep", arm, "virtual_unmerging=none")
        assert list_checkpoints(run)[0][-1].marker.step == 4 and not (run / "failed.json").exists()


def test_a_run_after_others_is_the_run_alone(
    swept: tuple[Path, int, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(swept[0])
    after, alone = folder_of(swept[0] / "sweep", *AVERAGE), swept[0] / "alone"
    assert train.run(compose_overrides(train.CONF_DIR, [*FIXED, *AVERAGE, "run_dir=alone"]))
    states = [torch.load(find_checkpoint(run, "run_dir"), weights_only=True) for run in (after, alone)]
    moments = [state["optimizer_states"][0]["state"] for state in states]
    for one, other in (moments, [state["state_dict"] for state in states]):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    curves = [{name: read_curves(run / "csv")[name] for name in ("train/loss", "val/loss")} for run in (after, alone)]
    assert curves[0] == curves[1]


def test_what_is_done_is_passed_over_and_other_runs_are_left_alone(
    swept: tuple[Path, int, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_crosslmm.report.write_report", raising(OSError("no\nroom")))
    run, again = (
        folder_of(swept[0] / "sweep", *AVERAGE),
        functools.partial(sweep, swept[0], *AVERAGE, monkeypatch=monkeypatch),
    )
    state, config = read_tree(run / "checkpoints"), (run / "config.yaml").read_text()
    provenance = (run / "provenance.json").read_text()
    (run / "failed.json").write_text("{}")  # of a try before the one that succeeded
    assert again() == 0 and not (run / "failed.json").exists()
    told = capsys.readouterr()
    assert re.search(r"done +0\n +skipped +1  done before\n", told.out)
    assert "no report of sweep: OSError: no room\n" in told.err  # and the exit code is that of the runs

    record = json.loads(provenance)
    record["data_fingerprint"]["val"] = "0" * 64
    for name, text, message in (
        ("provenance.json", json.dumps(record), "holds a run on other data (val was 000000000000, is "),
        ("config.yaml", config.replace("weight_decay: 0.01", "weight_decay: 0.5"), "optim.weight_decay is 0.5 there a"),
    ):
        (run / name).write_text(text)
        assert again() == 1
        assert f"failed: {run.name}: run_dir={run}: " in (told := capsys.readouterr().err) and message in told
        assert not (run / "failed.json").exists()  # whose run it is has not failed
    assert read_tree(run / "checkpoints") == state


def command(folder: Path, *words: str, **settings: Any) -> subprocess.Popen[str]:
    words = ["-m", *FIXED, *words, "hydra.callbacks.sweep.report=false"]
    full = [sys.executable, str(train.CONF_DIR.parent / "train.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(full, cwd=folder, start_new_session=True, **pipes, **settings)


def test_a_stopped_sweep_is_gone_on_with_by_two_processes_at_once(tmp_path: Path) -> None:
    words = ("pooler=average,max", "seed=0,1", "callbacks.curves=null", "callbacks.checkpoints.every_n_steps=1")
    with command(tmp_path, *words) as first:
        while not list(tmp_path.glob("sweeps/*/*/checkpoints/step-*")):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        out, told = first.communicate()
    assert first.returncode == RESUME_ME and "sweep sweeps/20" in out, told[-2000:]
    assert re.search(r"stopped +1  goes on with the same command", out) or "done   1" in out
    again = shlex.split(re.search(r"go on with: python \S+ (.*)\n", told)[1])
    (sweep_dir,) = tmp_path.glob("sweeps/*")
    assert again[-1] == f"hydra.sweep.dir={sweep_dir.relative_to(tmp_path)}" and again[0] == "-m"

    two = [command(tmp_path, *words, again[-1]) for _ in range(2)]
    said = [each.communicate() for each in two]
    assert [each.returncode for each in two] == [0, 0], said
    runs = [path for path in sweep_dir.iterdir() if path.is_dir()]
    assert len(runs) == 4 and [list_checkpoints(run)[0][-1].marker.step for run in runs] == [4] * 4
    # each run was trained by one process: the one that was stopped in two sessions, the others in one
    sessions = [len(json.loads((run / "provenance.json").read_text())["earlier_sessions"]) for run in runs]
    assert sorted(sessions) in ([0, 0, 0, 1], [0, 0, 0, 0])
    counts = [dict(re.findall(r"^ +(\w+) +(\d+)", out, re.MULTILINE)) for out, _ in said]
    assert all(sum(map(int, count.values())) == 4 and count["failed"] == "0" for count in counts)
    assert sum(int(count["done"]) for count in counts) == 4 - ("done   1" in out)


def test_a_killed_process_frees_its_claim(tmp_path: Path) -> None:
    holds = "import sys, time; from pathlib import Path; from lightning_crosslmm.sweep import claim\n"
    holds += "with claim(Path('run')) as held: print(held, flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(train.CONF_DIR.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", holds], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "True\n"
        ended = attempt(configured(tmp_path / "run"), lambda config: pytest.fail("it is held"))
        assert ended == Ended(Outcome.HELD)
        other.kill()
    assert attempt(configured(tmp_path / "run"), lambda config: True) == Ended(Outcome.DONE)


composed = functools.cache(functools.partial(compose_overrides, train.CONF_DIR))


def configured(run_dir: Path, mode: str = "fit") -> DictConfig:
    config = composed(("callbacks.preemption=null",)).copy()
    config.update(run_dir=str(run_dir), mode=mode)
    return config


def raising(error: BaseException) -> Callable[[DictConfig], bool]:
    def run(config: DictConfig) -> bool:
        raise error

    return run


def test_what_came_of_an_attempt(tmp_path: Path) -> None:
    config, failure = configured(tmp_path), tmp_path / "failed.json"
    assert attempt(config, raising(MemoryError("no\nmore"))) == Ended(Outcome.FAILED, "MemoryError: no more")
    assert json.loads(failure.read_text())["message"] == "MemoryError: no more"
    assert attempt(config, raising(OtherRunError("not yours"))) == Ended(Outcome.FAILED, "not yours")
    assert attempt(config, raising(Stopped("now"))) == Ended(Outcome.STOPPED, "now", ends_sweep=True)
    assert json.loads(failure.read_text())["message"] == "MemoryError: no more"  # neither is a try that failed
    with pytest.raises(KeyboardInterrupt):
        attempt(config, raising(KeyboardInterrupt()))
    assert attempt(configured(tmp_path, "test"), lambda config: True) == Ended(Outcome.DONE) and failure.exists()
    assert attempt(config, lambda each: each.resume == "auto") == Ended(Outcome.DONE) and not failure.exists()
    assert attempt(config, lambda each: False) == Ended(Outcome.SKIPPED)
    (tmp_path / "file").touch()
    assert attempt(configured(tmp_path / "file"), lambda each: True).outcome is Outcome.FAILED


def test_signals_between_runs_and_in_a_last_step_end_the_sweep(tmp_path: Path) -> None:
    config = compose_overrides(train.CONF_DIR, [f"run_dir={tmp_path}"])

    def run(config: DictConfig) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        STOP.forget()
        return True

    try:
        assert attempt(config, run) == Ended(Outcome.DONE, ends_sweep=True)
        assert attempt(config, lambda each: True) == Ended(Outcome.DONE)
        os.kill(os.getpid(), signal.SIGUSR1)  # while the next one is composed
        assert attempt(config, run) == Ended(Outcome.STOPPED, "SIGUSR1 before it began", ends_sweep=True)
    finally:
        STOP.forget()


def test_a_launcher_that_runs_jobs_elsewhere_is_told_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(configured(tmp_path / "a"), raising(UserError("too much")))
    attempt(configured(tmp_path / "b"), lambda config: True)
    assert read_sweep(tmp_path) == {"a": Ended(Outcome.FAILED, "too much"), "b": Ended(Outcome.STOPPED)}
    with pytest.raises(SystemExit, match="1"):
        SweepEnd(report=False).on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert capsys.readouterr().out == summary(tmp_path, read_sweep(tmp_path))


def test_names_of_folders() -> None:
    assert folder_name(["seed=1", "pooler.rows=2", "fusion=none", "mode=test"]) == "fusion=none,seed=1,pooler.rows=2"
    assert folder_name(["resume=auto"]) == "default"
    paths = [folder_name([f"data.train={path}"]) for path in ("/a/b", "/a-b", "-a-b")]
    assert len(set(paths)) == 3 and paths[2] == "data.train=-a-b" and not any("/" in path for path in paths)
    long = [folder_name(["pooler=average", "data.train=" + "é" * 200 + end]) for end in "xy"]
    assert len(set(long)) == 2 and all(len(name.encode()) < 255 and name.startswith("pooler=") for name in long)


@pytest.mark.parametrize(
    ("word", "message"),
    [("trainer=ddp", "start each distributed run by itself"), ("resume=runs/a", "go on by themselves.*init_from")],
)
def test_what_no_sweep_can_do(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sweep([compose_overrides(train.CONF_DIR, [word])])
