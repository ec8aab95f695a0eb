"""Packed training under Lightning: an epoch whose number of batches is known with its last, resumed at any of them."""

import pytest
import torch

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.errors import UserError
from tests.test_data.test_module import ALL_KEYS, Recorder, SaveAt, data_of, fit

PACKED = {"pack_tokens": 120, "global_batch_size": 2}
REST = {"val_check_interval": 3, "check_val_every_n_epoch": None}


class Rows(Recorder):
    """Keeps the rows of each batch, too, and what Lightning says of it."""

    def __init__(self):
        super().__init__()
        self.rows, self.is_last, self.epochs_ended = [], [], []

    def training_step(self, batch: VideoBatch, batch_index: int):
        self.rows.append(batch.row_of_sample.tolist())
        self.is_last.append(self.trainer.is_last_batch)
        return super().training_step(batch, batch_index)

    def on_train_epoch_end(self):
        self.epochs_ended.append(len(self.keys))


def packed(folder, *callbacks, changes=None, **options):
    return fit(data_of(folder, **PACKED | (changes or {})), *callbacks, module=Rows(), **REST | options)


def test_an_epoch_ends_with_its_last_row(text_folder):
    module = packed(text_folder)
    ends = module.epochs_ended
    assert len(ends) == 3 and [n + 1 for n, is_last in enumerate(module.is_last) if is_last] == ends
    assert ends[0] < 13, "rows hold several samples, so an epoch has fewer batches than the loader's length"
    for begin, end in zip([0, *ends], ends, strict=False):
        assert sorted(key for keys in module.keys[begin:end] for key in keys) == ALL_KEYS
    assert all(len(set(rows)) == 2 for end in ends for rows in module.rows[end - 3 : end - 1])


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 12}])
@pytest.mark.parametrize("num_workers", [0])
@pytest.mark.parametrize(
    ("hook", "at"),
    [("on_train_batch_end", n) for n in (1, 2, "end", "after", "second end")]
    + [("on_train_epoch_end", "end"), ("on_train_epoch_end", "second end"), ("on_validation_end", 3)],
)
def test_a_resumed_run_trains_what_is_left_exactly_once(text_folder, tmp_path, hook, at, num_workers, length):
    first, second, _ = packed(text_folder).epochs_ended
    num_batches = {"end": first, "after": first + 1, "second end": second}.get(at, at)
    path = tmp_path / "saved.ckpt"
    whole = packed(text_folder, SaveAt(hook, num_batches, path), **length)
    position = torch.load(path, weights_only=True)["VideoDataModule"]["position"]
    epoch = (num_batches >= first) + (num_batches >= second)
    assert (position["epoch"], position["batch"]) == (epoch, num_batches - [0, first, second][epoch])
    resumed = packed(text_folder, ckpt_path=path, **length)
    assert resumed.keys == whole.keys[num_batches:] and resumed.rows == whole.rows[num_batches:]
    assert resumed.val_keys == whole.val_keys[-len(resumed.val_keys) :]
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(("before", "micro_batches", "after"), [(1, 3, 2), (2, 3, 1), (2, 5, 2)])
def test_accumulation_may_change(text_folder, tmp_path, before, micro_batches, after):
    path = tmp_path / "saved.ckpt"
    whole = packed(text_folder)
    packed(text_folder, SaveAt("on_train_batch_end", micro_batches, path), accumulate_grad_batches=before)
    resumed = packed(text_folder, ckpt_path=path, accumulate_grad_batches=after)
    told = [sorted(sum(resumed.keys[n : n + after], ())) for n in range(0, len(resumed.keys), after)]
    assert [[key for key in keys if key] for keys in told] == [
        sorted(keys) for keys in whole.keys[micro_batches // before :]
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_tokens": 100}, "data.pack_tokens: then 120, now 100"),
        ({"bytes_per_token": 2}, "data.bytes_per_token: then 1.0, now 2"),
        ({"pack_tokens": None}, "data.bytes_per_token: then 1.0, now None"),
        ({"window_shards": 2}, "data.window_shards: then 8, now 2"),
    ],
)
def test_another_plan_is_refused(text_folder, tmp_path, changes, message):
    path = tmp_path / "saved.ckpt"
    packed(text_folder, SaveAt("on_train_batch_end", 2, path), max_epochs=1)
    with pytest.raises(UserError, match=message):
        packed(text_folder, ckpt_path=path, changes=changes)


def test_a_share_of_an_unknown_epoch_is_no_interval(text_folder):
    with pytest.raises(UserError, match="trainer.val_check_interval: 1.0 is a share of an epoch"):
        packed(text_folder, val_check_interval=1.0, check_val_every_n_epoch=1)
