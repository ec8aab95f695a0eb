"""Same position: what is compared, and when; several processes are in tests/test_data/test_ranks.py."""

from types import SimpleNamespace

import pytest

from callbacks.same_position import SamePosition
from lightning_crosslmm.errors import UserError


def callback_of(change, same_folder=True):
    """The callback on rank 0 of three, where the last stands `change` batches further."""
    callback, asked = SamePosition(), []
    module = SimpleNamespace(state_dict=lambda: {"position": {"epoch": 1, "batch": 4}})

    def gather(record):
        if isinstance(record, str):
            return [record, record, record if same_folder else "2026-01-01_00-00-01"]
        asked.append(record)
        return [record, record, record if not change else ("other", {"epoch": 1, "batch": 4 + change})]

    callback._agreement = SimpleNamespace(gather=gather)
    return callback, SimpleNamespace(datamodule=module, default_root_dir="runs/2026-01-01_00-00-00"), asked


def test_it_is_asked_at_the_start_and_before_each_checkpoint():
    callback, trainer, asked = callback_of(0)
    callback.on_train_start(trainer, None)
    callback.on_save_checkpoint(trainer, None, {})
    assert len(asked) == 2 and asked[0] == asked[1] and asked[0][1] == {"epoch": 1, "batch": 4}


def test_ranks_that_differ_are_named():
    callback, trainer, _ = callback_of(1)
    with pytest.raises(UserError, match=r"ranks \[2\] stand at another place than rank 0: .*'batch': 5.*'batch': 4"):
        callback.on_save_checkpoint(trainer, None, {})


def test_folders_that_differ_are_named():
    callback, trainer, _ = callback_of(0, same_folder=False)
    with pytest.raises(UserError, match="different folders, 2026-01-01_00-00-00 and 2026-01-01_00-00-01: .*run_dir="):
        callback.on_train_start(trainer, None)
