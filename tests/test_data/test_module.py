"""The data module under Lightning: every batch once, whenever a run stops and however many batches it accumulates."""

import json
import shutil
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.skipped import SkippedSamples
from data.module import VideoDataModule
from data.probe_module import ProbeDataModule
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import open_shards
from lightning_crosslmm.video import FrameSampling
from tests.test_data.test_stream import damage

STREAM = {
    "sampling": FrameSampling("uniform", num_frames=2),
    "image_size": 16,
    "tokenizer": "byte",
    "max_tokens": 64,
}


def data_of(folder, **changes):
    data = VideoDataModule(**STREAM | {"train": folder, "val": folder, "global_batch_size": 4, "seed": 5} | changes)
    data.fit_to(MODEL)
    return data


MODEL = types.SimpleNamespace(tokens_per_frame=9, encoder=None)
"""All that the data side asks of a model."""


class Recorder(LightningModule):
    """Keeps the keys of the batches it trained on; its weight depends on each of them and their order."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.keys, self.val_keys, self.fail_at = [], [], fail_at

    def training_step(self, batch, batch_index):
        batch.validate()
        if len(self.keys) == self.fail_at:
            raise RuntimeError("power cut")
        self.keys.append(batch.keys)
        target = batch.ids_L[batch.ids_L > 0].float().mean()
        return (self.weight - target).pow(2).sum()

    def validation_step(self, batch, batch_index):
        self.val_keys += batch.keys

    def predict_step(self, batch, batch_index):
        return batch.keys

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint in one hook, once a number of batches was trained."""

    def __init__(self, hook, num_batches, path):
        def save(trainer, module, *_):
            if len(module.keys) == num_batches and not path.exists() and not trainer.sanity_checking:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


ALL_KEYS = [f"s{number:02d}" for number in range(26)]


def trainer_of(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    short = {"devices": 1, "max_epochs": 3, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet | short | options)


def fit(data, *callbacks, module=None, ckpt_path=None, **options):
    module = module or Recorder()
    trainer_of(*callbacks, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def test_epochs_cover_the_data_in_orders_of_their_own(shard_folder):
    module = fit(data_of(shard_folder))
    assert [len(keys) for keys in module.keys] == [4, 4, 4, 4, 4, 4, 2] * 3
    epochs = [[key for keys in module.keys[e * 7 : e * 7 + 7] for key in keys] for e in range(3)]
    assert all(sorted(epoch) == ALL_KEYS for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert module.val_keys == ALL_KEYS * 3


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 21}])
@pytest.mark.parametrize(
    ("hook", "num_batches"),
    [("on_train_batch_end", n) for n in (1, 4, 7, 8, 14, 20)]
    + [("on_validation_end", 7), ("on_train_epoch_end", 7), ("on_train_epoch_end", 14), ("on_train_start", 0)],
)
def test_a_resumed_run_trains_what_is_left_exactly_once(text_folder, tmp_path, hook, num_batches, length):
    path = tmp_path / "saved.ckpt"
    whole = fit(data_of(text_folder), SaveAt(hook, num_batches, path), **length)
    record = torch.load(path, weights_only=True)["VideoDataModule"]["position"]
    assert (record["epoch"], record["batch"]) == divmod(num_batches, 7)
    resumed = fit(data_of(text_folder), ckpt_path=path, **length)
    assert resumed.keys == whole.keys[num_batches:]
    assert torch.equal(resumed.weight, whole.weight)


def test_workers_that_read_ahead_do_not_move_the_position(shard_folder, tmp_path):
    path = tmp_path / "saved.ckpt"
    whole = fit(data_of(shard_folder, num_workers=2), SaveAt("on_train_batch_end", 8, path), limit_val_batches=0)
    assert fit(data_of(shard_folder), ckpt_path=path, limit_val_batches=0).keys == whole.keys[8:]


@pytest.mark.parametrize("fail_at", [3, 5])
def test_a_batch_that_was_begun_is_trained_again(text_folder, tmp_path, fail_at):
    class SaveOnException(Callback):
        def on_exception(self, trainer, module, error):
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole = fit(data_of(text_folder))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(data_of(text_folder), SaveOnException(), module=Recorder(fail_at))
    assert fit(data_of(text_folder), ckpt_path=tmp_path / "saved.ckpt").keys == whole.keys[fail_at:]


def steps_of(module, accumulate=1):
    """The samples of each optimizer step, however they were cut into batches."""
    steps = [module.keys[start : start + accumulate] for start in range(0, len(module.keys), accumulate)]
    return [sorted(key for keys in step for key in keys if key) for step in steps]


@pytest.mark.parametrize(
    ("before", "micro_batches", "after"), [(1, 4, 2), (2, 8, 1), (2, 7, 2), (2, 1, 2), (1, 7, 4), (4, 28, 1), (2, 9, 4)]
)
def test_accumulation_may_change_and_lost_gradients_are_made_again(text_folder, tmp_path, before, micro_batches, after):
    path, rest = tmp_path / "saved.ckpt", {"limit_val_batches": 0}
    whole = fit(data_of(text_folder), **rest)
    partial = fit(
        data_of(text_folder),
        SaveAt("on_train_batch_end", micro_batches, path),
        accumulate_grad_batches=before,
        **rest,
    )
    assert steps_of(partial, before) == steps_of(whole)
    resumed = fit(data_of(text_folder), ckpt_path=path, accumulate_grad_batches=after, **rest)
    assert steps_of(resumed, after) == steps_of(whole)[micro_batches // before :]


def test_a_shortened_epoch_ends_and_the_next_one_begins(text_folder, tmp_path):
    path, short = tmp_path / "saved.ckpt", {"limit_train_batches": 3}
    whole = fit(data_of(text_folder), SaveAt("on_train_batch_end", 3, path), **short)
    assert len(whole.keys) == 9
    assert fit(data_of(text_folder), ckpt_path=path, **short).keys == whole.keys[3:]


def test_asking_for_the_number_of_steps_loses_nothing(text_folder, tmp_path):
    class Asking(Recorder):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 21
            return super().configure_optimizers()

    path = tmp_path / "saved.ckpt"
    whole = fit(data_of(text_folder), SaveAt("on_train_batch_end", 4, path), module=Asking())
    assert fit(data_of(text_folder), module=Asking(), ckpt_path=path).keys == whole.keys[4:]


@pytest.mark.parametrize(
    ("changes", "setting"), [({"seed": 6}, "data.seed"), ({"global_batch_size": 2}, "data.global_batch_size")]
)
def test_resuming_with_another_order_is_refused(text_folder, tmp_path, changes, setting):
    path = tmp_path / "saved.ckpt"
    fit(data_of(text_folder), SaveAt("on_train_batch_end", 2, path), max_epochs=1)
    with pytest.raises(UserError, match=setting):
        fit(data_of(text_folder, **changes), ckpt_path=path)
    one_shard = text_folder / "shard-000000.tar"
    with pytest.raises(UserError, match="data.train: the checkpoint was trained on other data, so"):
        fit(data_of(text_folder, train=one_shard), ckpt_path=path)


def test_a_checkpoint_without_a_position_is_refused(text_folder, tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(data_of(text_folder), SaveAt("on_train_batch_end", 2, path), max_epochs=1)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["VideoDataModule"]
    checkpoint["loops"]["fit_loop"]["state_dict"] = {}  # Lightning keeps a copy here
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="epoch 0, global batch 0, but Lightning goes on with epoch 0, batch 2"):
        fit(data_of(text_folder), ckpt_path=path)


def test_validating_a_checkpoint_leaves_training_at_the_start(text_folder, tmp_path):
    path, data = tmp_path / "saved.ckpt", data_of(text_folder)
    whole = fit(data, SaveAt("on_train_batch_end", 4, path))
    fresh = data_of(text_folder)
    trainer_of().validate(Recorder(), datamodule=fresh, ckpt_path=path, verbose=False)
    assert fit(fresh).keys == whole.keys


def test_predicting_covers_all_samples_and_needs_its_shards(text_folder):
    told = trainer_of().predict(Recorder(), datamodule=data_of(text_folder, predict=text_folder))
    assert sum(told, ()) == tuple(f"s{number:02d}" for number in range(26))
    with pytest.raises(UserError, match="data.predict: is not set"):
        trainer_of().predict(Recorder(), datamodule=data_of(text_folder))


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_no_validation_shards_mean_no_validation(text_folder):
    assert fit(data_of(text_folder, val=None), max_epochs=1).val_keys == []


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shards", ["", "shard-000000.tar"], ids=["five-shards", "fewer-than-ranks"])
def test_ranks_read_parts_of_the_same_batches(text_folder, world, shards):
    folder, parts = text_folder / shards, []
    for rank in range(world):
        data = data_of(folder)
        ranks = {"rank": rank, "num_replicas": world}
        data.trainer = types.SimpleNamespace(
            distributed_sampler_kwargs=ranks, accumulate_grad_batches=1, overfit_batches=0
        )
        data.setup("fit")
        parts.append(list(data._train_plan(data._beginning(epoch=1))))
    alone = data_of(folder)
    alone.setup("fit")
    whole = list(alone._train_plan(alone._beginning(epoch=1)))
    read = [sorted(planned.ref for batch in batches for planned in batch) for batches in zip(*parts, strict=True)]
    assert read == [sorted(planned.ref for planned in batch) for batch in whole]


def test_settings_that_cannot_work_name_themselves(text_folder):
    with pytest.raises(UserError, match=r"data.global_batch_size: 4 does not divide by 1 rank.* x 3"):
        fit(data_of(text_folder), accumulate_grad_batches=3)
    with pytest.raises(UserError, match="trainer.overfit_batches"):
        fit(data_of(text_folder), overfit_batches=2)
    with pytest.raises(UserError, match="data.window_shards: must be at least 1, got 0"):
        data_of(text_folder, window_shards=0)
    with pytest.raises(UserError, match="data.num_workers: must be at least 0, got -1"):
        data_of(text_folder, num_workers=-1)


def test_answer_kinds_and_fingerprint_come_from_the_shards(text_folder):
    data = data_of(text_folder)
    data.setup("fit")
    assert data.answer_kinds == ("number", "surety")
    assert data.fingerprint == dict.fromkeys(("train", "val"), open_shards(text_folder).fingerprint)


PROBE = {
    "clips": {"train": 6, "val": 3, "test": 2},
    "num_frames": 2,
    "image_size": 16,
    "noise": 0.1,
    "kinds": ["colour_of_shape", "colour_at_place"],
    "questions_per_clip": 2,
    "seed": 0,
    "clips_per_shard": 4,
}


def probe_of(folder, **changes):
    return ProbeDataModule(cache_dir=folder, probe=PROBE | changes, global_batch_size=2, **STREAM)


def test_the_probe_is_written_once_per_settings(tmp_path):
    data = probe_of(tmp_path)
    data.prepare_data()
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())] == [
        3,
        2,
        1,
    ]
    assert data.answer_kinds == ("colour_at_place", "colour_of_shape")
    next(iter(data.train_dataloader())).validate()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    probe_of(tmp_path).prepare_data()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    probe_of(tmp_path, seed=1).prepare_data()
    assert len(list(tmp_path.iterdir())) == 2


def test_processes_that_race_for_the_probe_all_find_it_whole(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda data: data.prepare_data(), [probe_of(tmp_path) for _ in range(4)]))
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["test", "train", "val"]
    probe_of(tmp_path).setup("fit")


def test_a_probe_that_fails_leaves_no_split_behind(tmp_path):
    with pytest.raises(UserError, match="data.probe.kinds"):
        probe_of(tmp_path, kinds=["colur"]).prepare_data()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("train")]


def test_damaged_samples_are_left_out_of_training_and_validation(text_folder, tmp_path):
    folder = damage(text_folder, tmp_path / "damaged", member="json")
    state = {}
    for limit, num_workers in ((0.01, 0), (0.01, 1)):
        data = data_of(folder, max_bad_fraction=limit, num_workers=num_workers)
        skipped = SkippedSamples()
        module = fit(data, skipped, default_root_dir=tmp_path, max_epochs=2)
        assert [sorted(sum(module.keys[n : n + 7], ())) for n in (0, 7)] == [[k for k in ALL_KEYS if k != "s09"]] * 2
        assert module.val_keys == [key for key in ALL_KEYS if key != "s09"] * 2
        state[num_workers] = skipped.state_dict()
    assert state[0] == state[1] and state[0]["counts"] == {"train": [52, 2], "val": [52, 2]}
    assert json.loads((tmp_path / "skipped.json").read_text())["samples"][0]["times"] == 4
    with pytest.raises(UserError, match="sample 's09'.* data.max_bad_fraction=0 "):
        fit(data_of(folder), SkippedSamples(), default_root_dir=tmp_path)
    with pytest.raises(UserError, match="sample 's09', member 'json'"):  # nobody counts
        fit(data_of(folder, max_bad_fraction=0.5))


def test_a_resumed_run_goes_on_counting(text_folder, tmp_path):
    folder = damage(text_folder, tmp_path / "damaged", member="json")
    options = {"max_bad_fraction": 0.5, "val": None}
    skipped, path, rest = (
        SkippedSamples(),
        tmp_path / "saved.ckpt",
        {"limit_val_batches": 0, "default_root_dir": tmp_path},
    )
    whole = fit(data_of(folder, **options), SaveAt("on_train_batch_end", 9, path), skipped, **rest)
    resumed = SkippedSamples()
    assert fit(data_of(folder, **options), resumed, ckpt_path=path, **rest).keys == whole.keys[9:]
    assert resumed.state_dict() == skipped.state_dict()


def test_changed_data_are_named_on_resume(text_folder, tmp_path):
    folder, path = tmp_path / "shards", tmp_path / "run" / "checkpoints" / "saved.ckpt"
    shutil.copytree(text_folder, folder)
    data = data_of(folder)
    fit(data, SaveAt("on_train_batch_end", 2, path), max_epochs=1)
    (tmp_path / "run" / "data.json").write_text(json.dumps(data.record()))
    (folder / "shards.json").unlink()
    for ending in ("tar", "index.json"):
        (folder / f"shard-000004.{ending}").unlink()
    with pytest.raises(
        UserError, match=r"data.train: .* other data \(in '.*shards' 1 shard\(s\) removed: shard-000004.t"
    ):
        fit(data_of(folder), ckpt_path=path)


def test_settings_are_checked_by_name(text_folder):
    for changes, message in [
        ({"pack_tokens": 0}, "data.pack_tokens: must be at least 1, got 0"),
        ({"bytes_per_token": 0}, "data.bytes_per_token: must be above 0"),
        ({"max_bad_fraction": 1.5}, "data.max_bad_fraction: must be from 0 to 1, got 1.5"),
        ({"sample_timeout_s": -1}, "data.sample_timeout_s: must be above 0, or null, got -1"),
        ({"turns": "once"}, "data.turns: must be one of all, one, mixed.*did you mean 'one'"),
        ({"worker_start": "spwan"}, "data.worker_start: .*did you mean 'spawn'"),
    ]:
        with pytest.raises(UserError, match=message):
            data_of(text_folder, **changes)
