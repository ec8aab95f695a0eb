from pathlib import Path

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import choose_checkpoint, find_checkpoint, replacing


def make_run(folder: Path, *names: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    for name in names:
        (folder / "checkpoints" / f"{name}.ckpt").write_bytes(b"weights")
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


def test_find_checkpoint_takes_a_file_a_sharded_folder_or_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "last", "best")
    last, best = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    (sharded / "meta.pt").touch()
    assert find_checkpoint(best, "ckpt") == best
    assert find_checkpoint(sharded, "ckpt") == sharded
    assert find_checkpoint(run, "resume") == last
    assert find_checkpoint(run, "ckpt", ("best", "last")) == best


def test_what_starts_from_which_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "last")
    last = run / "checkpoints" / "last.ckpt"
    new = tmp_path / "new"
    assert choose_checkpoint("fit", new, None, None, None) is None
    assert choose_checkpoint("fit", new, None, "weights.safetensors", None) is None
    assert choose_checkpoint("fit", run, str(run), None, None) == last
    assert choose_checkpoint("test", run, None, None, None) == last
    assert choose_checkpoint("describe", run, None, None, None) is None
    assert choose_checkpoint("predict", new, None, None, str(last)) == last


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("fti", {}, ["mode=fti", "fit, validate, test, predict", "did you mean 'fit'?"]),
        ("test", {"resume": "x"}, ["resume=x", "mode=test", "ckpt=PATH"]),
        ("predict", {"init_from": "x"}, ["init_from=x", "mode=predict"]),
        ("describe", {"ckpt": "x"}, ["ckpt=x", "mode=describe reads no weights"]),
        ("describe", {"init_from": "x"}, ["init_from=x", "mode=describe reads no weights"]),
        ("fit", {"ckpt": "x"}, ["ckpt=x", "resume=PATH", "init_from=PATH"]),
        ("fit", {"resume": "x", "init_from": "y"}, ["resume=x", "init_from=y"]),
        ("fit", {"resume": "nowhere"}, ["resume=nowhere", "no such file or folder"]),
        ("test", {}, ["run_dir=", "no such file or folder"]),
        ("test", {"ckpt": "{empty}"}, ["ckpt=", "holds no checkpoint", "best.ckpt or", "last.ckpt"]),
        ("fit", {"run_dir": "{full}"}, ["holds a training", "resume="]),
    ],
)
def test_contradictions_are_told(tmp_path: Path, mode: str, settings: dict[str, str], words: list[str]) -> None:
    folders = {"empty": make_run(tmp_path / "empty"), "full": make_run(tmp_path / "full", "last")}
    values = {name: value.format(**folders) for name, value in settings.items()}
    run_dir = Path(values.pop("run_dir", tmp_path / "new"))
    arguments = {"resume": None, "init_from": None, "ckpt": None, **values}
    with pytest.raises(UserError) as caught:
        choose_checkpoint(mode, run_dir, **arguments)
    for word in words:
        assert word in str(caught.value)
