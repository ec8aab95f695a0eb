import json
import subprocess
import sys
from pathlib import Path

import pytest

from callbacks.run_record import REPOSITORY, RunRecord
from callbacks.throughput import Throughput
from lightning_crosslmm.run_folder import find_checkpoint


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_a_training_leaves_its_record(make_trainer, tiny, batches, tmp_path: Path) -> None:
    trainer = make_trainer(Throughput(), RunRecord(seed=7), limit_val_batches=1)
    trainer.fit(tiny(), batches(), batches(1))
    record, metrics = read(tmp_path, "provenance.json"), read(tmp_path, "metrics.json")
    assert record["command"] == sys.argv and record["seed"] == 7 and record["mode"] == "fit"
    assert record["packages"]["lightning"] and record["packages"]["torch"].startswith("2.")
    assert record["python"].startswith("3.") and record["device"].startswith("cpu") and record["processes"] == 1
    assert record["error"] is None and record["started"] <= record["ended"]
    assert metrics["val/accuracy"] == metrics["val/accuracy/colour"] == 0.75
    assert metrics["train/loss"] == pytest.approx(0.8**10)  # what the last step saw: weights 0.8^5
    assert metrics["val/loss"] is None  # infinite, which JSON has no word for
    assert 0 < metrics["train/seconds"] < 60 and 0 <= metrics["train/wait_share"] <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"csv", "provenance.json", "metrics.json"}


def test_the_commit_is_the_repositorys(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(RunRecord(seed=0), limit_val_batches=0).fit(tiny(), batches(), batches(1))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    record = read(tmp_path, "provenance.json")
    assert record["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert isinstance(record["uncommitted_changes"], bool) is (git.returncode == 0)


def test_without_a_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from callbacks import run_record

    monkeypatch.setattr(run_record, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_record._commit() == {"commit": None, "uncommitted_changes": None}


def test_a_run_that_breaks_says_why(make_trainer, tiny, batches, tmp_path: Path) -> None:
    def fail() -> None:
        raise FloatingPointError("loss is gone")

    with pytest.raises(FloatingPointError):
        make_trainer(RunRecord(seed=0), limit_val_batches=0).fit(tiny(on_step=fail), batches(), batches(1))
    record = read(tmp_path, "provenance.json")
    assert record["error"] == "FloatingPointError: loss is gone" and record["ended"]


def test_measuring_leaves_the_record_of_training_alone(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(RunRecord(seed=0), limit_val_batches=1).fit(tiny(), batches(), batches(1))
    before = {name: (tmp_path / name).read_bytes() for name in ("provenance.json", "metrics.json")}
    make_trainer(RunRecord(seed=0)).validate(tiny([0.5]), batches(1), verbose=False)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert read(tmp_path, "metrics_validate.json")["val/accuracy"] == 0.5
    assert "train/seconds" not in read(tmp_path, "metrics_validate.json")
    assert read(tmp_path, "provenance_validate.json")["mode"] == "validate"


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")  # the loader has no position
def test_seconds_and_sessions_of_a_resumed_run_add_up(make_trainer, tiny, batches, keeping, tmp_path: Path) -> None:
    import time

    def train(max_steps: int, on_step=None, ckpt_path: Path | None = None) -> float:
        trainer = make_trainer(
            RunRecord(0), keeping(4), max_steps=max_steps, limit_val_batches=0, enable_checkpointing=True
        )
        trainer.fit(tiny(on_step=on_step), batches(), batches(1), ckpt_path=ckpt_path, weights_only=True)
        return read(tmp_path, "metrics.json")["train/seconds"]

    first_s = train(4, lambda: time.sleep(0.2))
    assert first_s > 0.8
    first = read(tmp_path, "provenance.json")
    assert train(5, None, find_checkpoint(tmp_path, "resume")) > 0.8
    train(6, None, find_checkpoint(tmp_path, "resume"))
    sessions = read(tmp_path, "provenance.json")["earlier_sessions"]
    assert len(sessions) == 2 and first.pop("earlier_sessions") == [] and sessions[0] == first
