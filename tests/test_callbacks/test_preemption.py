"""Real processes are stopped at a known place, and go on to where the one that was left alone has come."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks.curves import read_curves
from callbacks.preemption import Preemption
from lightning_crosslmm.checkpoint_folder import list_checkpoints
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import find_checkpoint
from lightning_crosslmm.stop_signals import RESUME_ME, STOP, StopSignals
from lightning_crosslmm.weight_files import WeightFiles
from tests.test_callbacks.stopping import MAX_STEPS, start

WAIT_S = 60.0


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """Trainings nobody stopped, by their number of processes and their strategy."""

    class Trained(dict):
        def __missing__(self, key: tuple[int, str]) -> Path:
            self[key] = tmp_path_factory.mktemp("alone")
            assert ends(start(self[key], *key)) == [0] * key[0]
            return self[key]

    return Trained()


def ends(processes: list) -> list[int]:
    for process in processes:
        process.join(WAIT_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def stop(folder: Path, processes: list, place: str, ranks: list[int], number: signal.Signals) -> list[int]:
    """Send a signal to some ranks where all of them stand at a place, and give all exit codes."""
    deadline_s = time.monotonic() + WAIT_S
    while [told for rank in range(len(processes)) if not (told := at(folder, rank)).endswith(place)]:
        assert time.monotonic() < deadline_s and any(process.is_alive() for process in processes), logs(folder)
        time.sleep(0.02)
    for rank in ranks:
        os.kill(processes[rank].pid, number)
    time.sleep(0.1)  # the signal has come before the step goes on
    (folder / "hold").unlink()
    return ends(processes)


def at(folder: Path, rank: int) -> str:
    told = folder / f"{rank}.at"
    return told.read_text() if told.exists() else ""


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def outcome(folder: Path) -> tuple[dict[str, Tensor], dict]:
    files = WeightFiles(find_checkpoint(folder, "run_dir"), prefix="")
    return files.read(files.shapes), read_curves(folder / "csv")


@pytest.mark.parametrize(
    ("world", "strategy", "ranks", "number", "place", "saved"),
    [
        (1, "auto", [0], signal.SIGTERM, "step 2", 3),
        (1, "auto", [0], signal.SIGINT, "validation 4 1", 4),
        (1, "auto", [0], signal.SIGUSR1, "step 3", 4),  # a validation comes next, and is not waited for
        (2, "ddp", [0], signal.SIGTERM, "step 2", 3),
        (2, "ddp", [1], signal.SIGTERM, "step 2", 3),
        (2, "ddp", [0, 1], signal.SIGTERM, "validation 4 1", 4),
        (2, "fsdp", [1], signal.SIGUSR1, "step 1", 2),
    ],
)
def test_all_processes_save_and_leave_together_and_nothing_is_lost(
    tmp_path: Path, left_alone, world: int, strategy: str, ranks: list[int], number: signal.Signals, place: str,
    saved: int,
) -> None:  # fmt: skip
    (tmp_path / "hold").write_text(place)
    began_s = time.monotonic()
    codes = stop(tmp_path, start(tmp_path, world, strategy), place, ranks, number)
    assert codes == [RESUME_ME] * world and time.monotonic() - began_s < WAIT_S, logs(tmp_path)
    assert [each.marker.step for each in list_checkpoints(tmp_path)[0]][-1] == saved
    assert f"{number.name} after step {saved}" in (tmp_path / "0.log").read_text()

    assert ends(start(tmp_path, world, strategy)) == [0] * world, logs(tmp_path)
    (weights, curves), (its_weights, its_curves) = outcome(left_alone[world, strategy]), outcome(tmp_path)
    assert weights.keys() == its_weights.keys()
    assert all(torch.equal(weights[name], its_weights[name]) for name in weights)
    assert curves == its_curves and len(curves["train/loss"]) == MAX_STEPS and len(curves["val/loss"]) == 2


def test_a_signal_before_training_is_not_forgotten(tmp_path: Path) -> None:
    (process,) = start(tmp_path)
    while process.pid is None or not is_listening(process.pid):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    assert ends([process]) == [RESUME_ME] and list_checkpoints(tmp_path) == ([], []), logs(tmp_path)


def is_listening(pid: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def test_the_last_step_is_not_stopped(tmp_path: Path) -> None:
    (tmp_path / "hold").write_text("step 7")
    assert stop(tmp_path, start(tmp_path), "step 7", [0], signal.SIGTERM) == [0]
    assert list_checkpoints(tmp_path)[0][-1].marker.metric is not None


def test_the_time_is_up(tmp_path: Path) -> None:
    assert ends(start(tmp_path, time_limit_s=0.01)) == [RESUME_ME]  # over before the first step begins
    assert "time_limit_s=0.01 after step 0" in logs(tmp_path)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_background_writes_what_the_foreground_does(tmp_path: Path, left_alone, strategy: str) -> None:
    assert ends(start(tmp_path, 2, strategy, background=True)) == [0, 0], logs(tmp_path)
    for one, other in zip(
        *(list_checkpoints(folder)[0] for folder in (left_alone[2, strategy], tmp_path)), strict=True
    ):
        assert one.marker.files.keys() == other.marker.files.keys() and one.marker.metric == other.marker.metric
        tensors = [WeightFiles(each.loadable, prefix="") for each in (one, other)]
        pairs = zip(*(files.read(files.shapes).items() for files in tensors), strict=True)
        assert all(name == same and torch.equal(left, right) for (name, left), (same, right) in pairs)


def test_other_processes_draw_other_numbers_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "hold").write_text("step 2")
    stop(tmp_path, start(tmp_path, 2, "ddp"), "step 2", [1], signal.SIGTERM)
    assert ends(start(tmp_path)) == [0], logs(tmp_path)
    assert "saved by 2 processes, resumed by 1: it starts anew from (seed 0, step 3, rank)" in logs(tmp_path)


def test_a_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_crosslmm import stop_signals

    heard, before = StopSignals(), signal.getsignal(signal.SIGINT)  # ignored, where a shell runs this behind
    heard.listen()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher's copy of the first
        assert heard.received == signal.SIGINT
        monkeypatch.setattr(stop_signals, "AGAIN_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        heard.forget()
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_given_back(make_trainer, tiny, batches, keeping) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    trainer = make_trainer(Preemption(None), keeping(), enable_checkpointing=True, limit_val_batches=0)
    seen: list[object] = []
    trainer.fit(tiny(on_step=lambda: seen.append(signal.getsignal(signal.SIGTERM))), batches(), batches(1))
    assert seen and all(handler == STOP._note for handler in seen)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


def test_settings_that_cannot_be(make_trainer, tiny, batches) -> None:
    with pytest.raises(UserError, match="time_limit_s=0: must be above 0, or null"):
        Preemption(0)
    with pytest.raises(UserError, match="callbacks.preemption: stopping needs callbacks.checkpoints"):
        make_trainer(Preemption(None), enable_checkpointing=True).fit(tiny(), batches(), batches(1))
