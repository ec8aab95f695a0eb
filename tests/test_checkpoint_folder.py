"""Folders of checkpoints: their order, which are kept, and what a kill leaves."""

import json
from pathlib import Path

import pytest

from lightning_crosslmm import checkpoint_folder
from lightning_crosslmm.checkpoint_folder import (
    Saved,
    begin_checkpoint,
    clear_parts,
    drop_checkpoints,
    list_checkpoints,
    rank_checkpoints,
    show_checkpoint,
)


def save(run_dir: Path, step: int, metric: float | None = None, monitor: str = "loss", mode: str = "min") -> Saved:
    part = begin_checkpoint(run_dir, step)
    (part / "inner").mkdir(parents=True)
    (part / "inner" / "state").write_bytes(b"x" * step)
    about = {"epoch": 1, "monitor": monitor, "mode": mode, "world_size": 2, "versions": {"torch": "2"}}
    return show_checkpoint(part, step=step, metric=metric, **about)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_marker_is_written_last_and_one_rename_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = checkpoint_folder._sync, Path.rename
    monkeypatch.setattr(checkpoint_folder, "_sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append("rename"), rename(old, new))[1])
    saved = save(tmp_path, 700, 0.5)
    assert done == ["state", "complete.json", ".step-00000700", "rename", "checkpoints"]
    assert names(tmp_path) == ["step-00000700"] and saved.path.name == "step-00000700"
    marker = json.loads((saved.path / "complete.json").read_text())
    assert marker["files"] == {"inner/state": 700} and (marker["step"], marker["epoch"], marker["metric"]) == (
        700,
        1,
        0.5,
    )
    assert list_checkpoints(tmp_path) == ([saved], [])


def test_the_newest_is_the_one_written_last_whatever_its_step(tmp_path: Path) -> None:
    save(tmp_path, 300), save(tmp_path, 700)
    again = save(tmp_path, 300)  # gone on with from the older one
    assert again.path.name == "step-00000300-2" and list_checkpoints(tmp_path)[0][-1] == again
    drop_checkpoints(tmp_path, keep_last=1, keep_best=0)
    assert names(tmp_path) == ["step-00000300-2"]


@pytest.mark.parametrize(
    ("mode", "expected"), [("min", [2, 4, 1]), ("max", [1, 2, 4])]
)  # 3 has no number, equal ones stand in the order in which they were saved
def test_the_best_first(tmp_path: Path, mode: str, expected: list[int]) -> None:
    for step, metric in ((1, 0.9), (2, 0.1), (3, float("nan")), (4, 0.1), (5, None)):
        save(tmp_path, step, metric, mode=mode)
    assert [each.marker.step for each in rank_checkpoints(list_checkpoints(tmp_path)[0])] == expected


def test_metrics_of_another_name_are_not_compared(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.9, "accuracy", "max"), save(tmp_path, 2, 3.0), save(tmp_path, 3, 2.0)
    assert [each.marker.step for each in rank_checkpoints(list_checkpoints(tmp_path)[0])] == [3, 2]


def test_only_old_whole_ones_are_dropped(tmp_path: Path) -> None:
    for step, metric in ((1, 0.1), (2, 0.2), (3, 0.3), (4, None), (5, None)):
        save(tmp_path, step, metric)
    (tmp_path / "checkpoints" / "step-00000003" / "complete.json").unlink()
    (tmp_path / "checkpoints" / "mine").mkdir()
    drop_checkpoints(tmp_path, keep_last=2, keep_best=1)
    assert names(tmp_path) == ["mine", "step-00000001", "step-00000003", "step-00000004", "step-00000005"]


def test_a_kill_while_one_is_dropped_leaves_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1), save(tmp_path, 2)
    begin_checkpoint(tmp_path, 3).mkdir()
    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", lambda path: (path / "complete.json").unlink())
    drop_checkpoints(tmp_path, 1, 0)
    monkeypatch.undo()
    assert [each.marker.step for each in list_checkpoints(tmp_path)[0]] == [2] and list_checkpoints(tmp_path)[1] == []
    clear_parts(tmp_path)
    assert names(tmp_path) == ["step-00000002"]
