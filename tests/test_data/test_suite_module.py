"""The suite as data: tasks mixed or alone, lengths that training never sees, and one command that runs it all."""

import csv
import json

import numpy as np
import pytest

import train
from data.suite_module import SuiteDataModule
from lightning_crosslmm.compose import ANY_TARGET, compose_overrides, instantiate
from lightning_crosslmm.errors import UserError

SMALL = (
    "data=suite",
    "data.suite.clips={train: 4, val: 2, test: 2}",
    "data.suite.frames={train: [4], val: [4, 6], test: [5]}",
    "data.suite.image_size=32",
    "data.difficulty.needle.needles=2",
    "data.cache_dir=cache",
    "data.encoder_fit=null",
    "data.num_workers=0",
    "data.global_batch_size=2",
)


def suite(*words):
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in SMALL if word.partition("=")[0] not in keys]
    config = compose_overrides(train.CONF_DIR, [*kept, *words])
    data = instantiate(config.data, ANY_TARGET)
    assert isinstance(data, SuiteDataModule)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lengths(loader):
    return {int(count) for batch in loader for count in np.diff(batch.visual_offsets)}


def test_held_out_lengths_are_measured_and_never_trained():
    data = suite("data.tasks=[needle,motion]")
    assert lengths(data.train_dataloader()) == {4} and lengths(data.val_dataloader()) == {4, 6}
    assert data.answer_kinds == ("motion@4", "motion@6", "needle@4", "needle@6")
    data.setup("test")
    assert lengths(data.test_dataloader()) == {5}
    data.setup("predict")
    assert lengths(data.predict_dataloader()) == {5}


def test_the_default_trains_no_length_that_it_calls_held_out():
    frames = compose_overrides(train.CONF_DIR, ["data=suite"]).data.suite.frames
    assert set(frames.train) == {8} and set(frames.val) == set(frames.test) == {8, 16, 32}


def test_every_task_of_the_default_fits_its_lengths_and_reads_every_frame():
    names = list(compose_overrides(train.CONF_DIR, ["data=suite"]).data.tasks)
    lengths = "data.suite.frames={train: [8], val: [8, 16], test: [8]}"
    data = suite("data.suite.clips={train: 1, val: 1, test: 1}", lengths)
    assert len(names) == 7
    kinds = {kind for batch in data.train_dataloader() for kind in batch.answer_kinds}
    assert kinds == {f"{name}@8" for name in names}
    for batch in data.val_dataloader():
        last_s = batch.frame_time_s_F[batch.visual_offsets[1:] - 1]
        assert (last_s * 4 + 1 == batch.visual_offsets.diff()).all()


def test_tasks_come_mixed():
    many = ("data.suite.clips={train: 32, val: 1, test: 1}", "data.suite.clips_per_shard=4")
    data = suite("data.tasks=[needle,motion]", *many)
    tasks = [key.partition("-")[0] for batch in data.train_dataloader() for key in batch.keys]
    assert tasks.count("needle") == tasks.count("motion") == 32
    assert 0.25 < np.mean([one == other for one, other in zip(tasks, tasks[1:], strict=False)]) < 0.75


def test_clips_are_rendered_once_and_by_what_they_depend_on(here):
    def folders():
        return {path.name for path in (here / "cache").iterdir()}

    suite("data.tasks=[needle]")
    first = {path: path.stat().st_mtime_ns for path in (here / "cache").rglob("*.tar")}
    suite("data.tasks=[needle,motion]")
    assert len(folders()) == 2 and all(path.stat().st_mtime_ns == time for path, time in first.items())
    suite("data.tasks=[needle]", "data.difficulty.needle.others=2", "data.difficulty.motion.movers=1")
    assert len(folders()) == 3
    suite("data.tasks=[needle]", "data.suite.frames.val=[7]")  # another length lies beside the others
    assert len(folders()) == 3 and len(list((here / "cache").glob("suite-needle-*/val-*"))) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.tasks=[needel]",), "data.tasks: names 'needel'; right are needle, .*did you mean 'needle'"),
        (("data.tasks=[]",), "data.tasks: must list different tasks of needle, .*, got \\[\\]"),
        (("data.tasks=[needle,needle]",), "data.tasks: must list different tasks"),
        (("data.tasks=needle",), "data.tasks: must list different tasks .* got 'needle'"),
        (("data.difficulty.needle.needles=5",), "data.suite.frames: has clips of 4 .* needs 5 or more"),
        (("data.difficulty.motion.speed=0.6",), "data.difficulty.motion.speed: must be"),
    ],
)
def test_what_cannot_be(words, message):
    with pytest.raises(UserError, match=message):
        suite(*words)


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Checkpoint directory .* exists")
def test_one_command_trains_and_measures_it(here):
    words = [*SMALL, "data.suite.form=choice", "data.tasks=[needle,motion]", "run_dir=run", "trainer.max_steps=2"]
    words += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "callbacks.progress=null"]
    train.run(compose_overrides(train.CONF_DIR, words))
    metrics = json.loads((here / "run" / "metrics.json").read_text())
    kinds = {"needle@4", "needle@6", "motion@4", "motion@6"}
    assert {name.removeprefix("val/accuracy/") for name in metrics if name.startswith("val/accuracy/")} == kinds
    assert {name.removeprefix("val/circular/") for name in metrics if name.startswith("val/circular")} == kinds
    assert (here / "run" / "needle.png").stat().st_size > 1000
    with (here / "run" / "needle.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["task"] for row in rows} == {"needle"}
    assert sum(int(row["answers"]) for row in rows) == 4 * 2 * 2 * 2  # permutations, lengths, clips, needles
