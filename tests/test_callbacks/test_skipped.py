"""Skipped samples: counted over steps, kept in checkpoints, listed in the run's folder, and too many of them end it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from callbacks.skipped import MIN_SEEN, SkippedSamples
from lightning_crosslmm.batch import Skipped
from lightning_crosslmm.errors import UserError
from tests.test_callbacks.conftest import make_batch

TOLD = [Skipped("a.tar", f"s{number}", "damaged") for number in range(100)]


class Run:
    """Calls the hooks as Lightning does, for as many batches and steps as asked."""

    def __init__(self, folder, limit, state=None):
        self.callback, self.logged = SkippedSamples(), {}
        self.trainer = SimpleNamespace(
            datamodule=SimpleNamespace(max_bad_fraction=limit, leaves_out=False),
            default_root_dir=folder,
            sanity_checking=False,
        )
        self.module = SimpleNamespace(log=self.logged.__setitem__)
        self.callback.setup(self.trainer, self.module, "fit")
        if state is not None:
            self.callback.load_state_dict(state)
        self.callback.on_train_start(self.trainer, self.module)

    def train(self, *told, ends_step=True, num_samples=2):
        batch = replace(make_batch(0, num_samples), skipped=told)
        self.callback.on_train_batch_start(self.trainer, self.module, batch, 0)
        if ends_step:
            self.callback.on_before_optimizer_step(self.trainer, self.module, None)

    def validate(self, *told):
        self.callback.on_validation_batch_end(self.trainer, self.module, None, replace(make_batch(0), skipped=told), 0)
        self.callback.on_validation_epoch_end(self.trainer, self.module)


def test_it_asks_for_damaged_samples_to_be_left_out(tmp_path):
    assert Run(tmp_path, 0.5).trainer.datamodule.leaves_out


def test_what_is_saved_is_of_finished_steps(tmp_path):
    run = Run(tmp_path, 0.5)
    run.train(TOLD[0], ends_step=False)
    assert run.callback.state_dict() == {"counts": {}, "listed": []}
    run.train()
    run.train(TOLD[2], TOLD[1])
    state = run.callback.state_dict()
    assert state == {
        "counts": {"train": [9, 3]},
        "listed": [["a.tar", "s0", "damaged", 1], ["a.tar", "s1", "damaged", 1], ["a.tar", "s2", "damaged", 1]],
    }
    resumed = Run(tmp_path, 0.5, json.loads(json.dumps(state)))
    resumed.train(TOLD[1])
    assert resumed.callback.state_dict()["counts"] == {"train": [12, 4]}
    assert resumed.callback.state_dict()["listed"][1] == ["a.tar", "s1", "damaged", 2]


def test_a_stand_in_is_nobody(tmp_path):
    run = Run(tmp_path, 0.5)
    run.callback.on_train_batch_start(run.trainer, None, replace(make_batch(0, 1), keys=("",)), 0)
    run.train(TOLD[0])
    assert run.callback.state_dict()["counts"] == {"train": [3, 1]}


def test_the_first_ends_a_run_that_allows_none(tmp_path):
    run = Run(tmp_path, 0.0)
    run.train()
    with pytest.raises(UserError, match=r"a.tar: sample 's0': damaged; now 1 of 5 samples of train are damaged.*=0 of"):
        run.train(TOLD[0])
    run.callback.on_exception(run.trainer, None, UserError())
    assert json.loads((tmp_path / "skipped.json").read_text())["samples"][0]["key"] == "s0"


def test_a_share_is_of_many_samples(tmp_path):
    run = Run(tmp_path, 0.01)
    run.train(*TOLD[: MIN_SEEN // 100])
    with pytest.raises(UserError, match="max_bad_fraction=0.01 of 1000 samples"):
        run.train(TOLD[99])
    run = Run(tmp_path, 0.01, {"counts": {"train": [4000, 30]}, "listed": []})
    run.train(*TOLD[:10])
    with pytest.raises(UserError, match="now 41 of 4015 samples"):
        run.train(TOLD[99])


def test_validation_is_counted_by_itself_and_logged(tmp_path):
    run = Run(tmp_path, 0.01)
    run.validate()
    assert run.logged == {}
    run.validate(TOLD[0], TOLD[1])
    assert run.logged == {"val/skipped": 2.0}
    assert run.callback.state_dict()["counts"] == {"val": [6, 2]}


def test_the_list_is_written_and_said_at_the_end(tmp_path, caplog):
    run = Run(tmp_path, 0.5)
    run.callback.teardown(run.trainer, None, "fit")
    assert not (tmp_path / "skipped.json").exists()
    run.train(*TOLD[:12])
    run.train(TOLD[3])
    run.callback.teardown(run.trainer, None, "fit")
    written = json.loads((tmp_path / "skipped.json").read_text())
    assert written["train"] == {"seen": 17, "skipped": 13} and len(written["samples"]) == 12
    assert {"shard": "a.tar", "key": "s3", "reason": "damaged", "times": 2} in written["samples"]
    assert "12 damaged sample(s) left out" in caplog.text and "a.tar: sample 's1': damaged" in caplog.text
    assert "and 2 more" in caplog.text
