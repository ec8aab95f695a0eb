"""Which run `resume=auto` means, and when it says that nothing is left to do."""

import logging
from pathlib import Path

import pytest
from omegaconf import DictConfig

from lightning_crosslmm.checkpoint_folder import begin_checkpoint, show_checkpoint
from lightning_crosslmm.compose import compose_overrides, save_resolved
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.same_run import as_word, differences, is_done, words_of_newest, words_to_resume

CONF = Path(__file__).resolve().parent.parent / "conf"


def configured(run_dir: Path, *words: str) -> DictConfig:
    return compose_overrides(CONF, ["resume=auto", "trainer.max_steps=9", as_word("run_dir", run_dir), *words])


def trained(run_dir: Path, saved: str, *words: str, step: int = 3) -> Path:
    save_resolved(configured(run_dir, *words), run_dir)
    part = begin_checkpoint(run_dir, step)
    part.mkdir(parents=True)
    about = {"epoch": 0, "monitor": "m", "mode": "max", "metric": None, "world_size": 1, "versions": {}}
    marker = show_checkpoint(part, step=step, **about).path / "complete.json"
    marker.write_text(marker.read_text().replace('"saved": "20', f'"saved": "{saved}'))
    return run_dir


def test_the_newest_of_the_same_configuration(tmp_path: Path) -> None:
    config = configured(tmp_path / "new")
    assert words_of_newest(config, ["resume=auto"]) == []
    trained(tmp_path / "a", "19")
    trained(tmp_path / "it's (b)", "21")
    trained(tmp_path / "c", "18")
    trained(tmp_path / "other", "22", "seed=1")
    save_resolved(config, tmp_path / "killed before its first checkpoint")
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "config.yaml").write_text("- 1")
    (word,) = words_of_newest(config, ["resume=auto", "trainer.max_steps=9"])
    assert compose_overrides(CONF, [word]).run_dir == str(tmp_path / "it's (b)")
    for words in (["run_dir=x"], ["hydra.run.dir=x"], ["-m"]):  # a folder is named, or each job has its own
        assert words_of_newest(config, words) == []
    assert words_of_newest(compose_overrides(CONF, [as_word("run_dir", tmp_path / "new")]), []) == []


def test_places_make_no_difference_and_everything_else_does(tmp_path: Path) -> None:
    trained(tmp_path / "a", "20")
    assert differences(configured(tmp_path / "b", "callbacks.curves.train_window=10"), tmp_path / "a") == []
    other = configured(tmp_path / "b", "optim.lr.llm=7", "~callbacks.curves")
    told = differences(other, tmp_path / "a")
    assert "optim.lr.llm is 0.0015 there and 7 here" in told
    assert "callbacks.curves.train_window is 10 there and None here" in told and len(told) == 3


def test_done_or_going_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert is_done(configured(tmp_path / "new")) is False
    assert is_done(configured(trained(tmp_path / "a", "20"))) is False
    assert is_done(configured(trained(tmp_path / "b", "20", step=9))) is True
    assert [message.split("resume=auto: ")[1].replace(str(tmp_path), "") for message in caplog.messages] == [
        "no run of this configuration has a checkpoint, so a new one starts in /new",
        "/a stands at step 3: going on",
        "/b stands at step 9: done, nothing to do",
    ]
    with pytest.raises(UserError, match=r"of another configuration .callbacks.*data.seed is 0 there and.*resume="):
        is_done(configured(tmp_path / "a", "seed=1"))


def test_the_words_to_go_on_with(tmp_path: Path) -> None:
    words = ["pooler=max", "run_dir=x", "init_from=y", "resume=auto", "hydra.run.dir=z", "seed=1"]
    folder = tmp_path / "a b"
    assert words_to_resume(words, folder) == ["pooler=max", "seed=1", f"resume='{folder}'", f"run_dir='{folder}'"]
    assert compose_overrides(CONF, words_to_resume(["seed=1"], folder)).resume == str(folder)
