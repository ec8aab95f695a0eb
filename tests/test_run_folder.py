from pathlib import Path

import pytest

from lightning_crosslmm.checkpoint_folder import begin_checkpoint, show_checkpoint
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import choose_checkpoint, find_checkpoint, replacing


def make_run(folder: Path, *steps: int, **metrics: float) -> Path:
    """A run whose checkpoints are whole and hold nothing of use; ``step_4=0.5`` gives one its metric."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        part = begin_checkpoint(folder, step)
        part.mkdir()
        (part / "state.ckpt").write_bytes(b"weights")
        about = {"epoch": 0, "monitor": "val/accuracy", "mode": "max", "world_size": 1, "versions": {}}
        show_checkpoint(part, step=step, metric=metrics.get(f"step_{step}"), **about)
    return folder


def test_replacing_makes_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with replacing(path) as part:
        assert part.suffix == ".txt"
        part.write_text("new")
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"] and path.read_text() == "new"


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text("ne")
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["b.txt"] and path.read_text() == "old"


def test_find_checkpoint_takes_a_file_a_checkpoint_a_run_or_an_export(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 4, 8, step_4=0.5)
    best, last = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 8))
    assert find_checkpoint(best / "state.ckpt", "ckpt") == best / "state.ckpt"
    assert find_checkpoint(best, "ckpt") == best / "state.ckpt"
    assert find_checkpoint(run, "resume") == last / "state.ckpt"
    assert find_checkpoint(run, "ckpt", ("best", "last")) == best / "state.ckpt"
    assert find_checkpoint(make_run(tmp_path / "other", 3), "ckpt", ("best", "last")).parent.name == "step-00000003"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    assert find_checkpoint(tmp_path / "out", "init_from") == tmp_path / "out" / "model.safetensors"


def test_a_sharded_checkpoint_is_its_folder(tmp_path: Path) -> None:
    part = begin_checkpoint(tmp_path, 2)
    part.mkdir(parents=True)
    for name in ("meta.pt", ".metadata", "__0_0.distcp"):
        (part / name).write_bytes(b"shard")
    about = {"epoch": 0, "monitor": "loss", "mode": "min", "metric": None, "world_size": 2, "versions": {}}
    shown = show_checkpoint(part, step=2, **about).path
    assert find_checkpoint(tmp_path, "resume") == find_checkpoint(shown, "ckpt") == shown


def tear(folder: Path, how: str) -> None:
    if how == "no marker":
        (folder / "complete.json").unlink()
    elif how == "half a marker":
        (folder / "complete.json").write_text('{"number": 1,')
    elif how == "no file":
        (folder / "state.ckpt").unlink()
    else:
        (folder / "state.ckpt").write_bytes(b"wei")


@pytest.mark.parametrize("how", ["no marker", "half a marker", "no file", "short file"])
def test_the_newest_whole_one_is_taken_for_a_torn_one_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    run = make_run(tmp_path / "run", 3, 6, 9)
    torn = run / "checkpoints" / "step-00000009"
    tear(torn, how)
    assert find_checkpoint(run, "resume").parent.name == "step-00000006"
    (said,) = caplog.messages
    assert f"{torn}: is torn, " in said and said.endswith("; taking step-00000006, which is whole")
    with pytest.raises(UserError, match="step-00000009: is torn, "):
        find_checkpoint(torn, "resume")
    tear(run / "checkpoints" / "step-00000006", how)
    tear(run / "checkpoints" / "step-00000003", how)
    with pytest.raises(
        UserError, match="resume=.*: holds no whole checkpoint: .*step-00000003: is torn, .*; .*is torn"
    ):
        find_checkpoint(run, "resume")
    with pytest.raises(UserError, match="holds a training"):  # which is not to be trained over
        choose_checkpoint("fit", run, None, None, None)


def test_what_starts_from_which_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 4)
    last = run / "checkpoints" / "step-00000004" / "state.ckpt"
    new = tmp_path / "new"
    assert choose_checkpoint("fit", new, None, None, None) is None
    assert choose_checkpoint("fit", new, None, "weights.safetensors", None) is None
    assert choose_checkpoint("fit", run, str(run), None, None) == last
    assert choose_checkpoint("fit", run, "auto", "weights.safetensors", None) == last
    assert choose_checkpoint("fit", new, "auto", "weights.safetensors", None) is None
    assert choose_checkpoint("test", run, None, None, None) == last
    assert choose_checkpoint("describe", run, None, None, None) is None
    assert choose_checkpoint("predict", new, None, None, str(last)) == last
    assert choose_checkpoint("predict", run, None, "weights.safetensors", None) is None


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("fti", {}, ["mode=fti", "fit, validate, test, predict", "did you mean 'fit'?"]),
        ("test", {"resume": "x"}, ["resume=x", "mode=test", "ckpt=PATH"]),
        ("predict", {"init_from": "x", "ckpt": "y"}, ["init_from=x", "ckpt=y", "give one of them"]),
        ("describe", {"ckpt": "x"}, ["ckpt=x", "mode=describe reads no weights"]),
        ("describe", {"init_from": "x"}, ["init_from=x", "mode=describe reads no weights"]),
        ("fit", {"ckpt": "x"}, ["ckpt=x", "resume=PATH", "init_from=PATH"]),
        ("fit", {"resume": "x", "init_from": "y"}, ["resume=x", "init_from=y"]),
        ("fit", {"resume": "nowhere"}, ["resume=nowhere", "no such file or folder"]),
        ("test", {}, ["run_dir=", "no such file or folder"]),
        ("test", {"ckpt": "{empty}"}, ["ckpt=", "holds no checkpoint", "complete.json"]),
        ("fit", {"resume": "{out}"}, ["resume=", "weights and nothing to go on from; use init_from="]),
        ("fit", {"run_dir": "{full}"}, ["holds a training", "resume="]),
    ],
)
def test_contradictions_are_told(tmp_path: Path, mode: str, settings: dict[str, str], words: list[str]) -> None:
    folders = {"empty": make_run(tmp_path / "empty"), "full": make_run(tmp_path / "full", 1), "out": tmp_path}
    (tmp_path / "model.safetensors").touch()
    values = {name: value.format(**folders) for name, value in settings.items()}
    run_dir = Path(values.pop("run_dir", tmp_path / "new"))
    arguments = {"resume": None, "init_from": None, "ckpt": None, **values}
    with pytest.raises(UserError) as caught:
        choose_checkpoint(mode, run_dir, **arguments)
    for word in words:
        assert word in str(caught.value)
