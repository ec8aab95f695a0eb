"""Loader: the same batches for every number and kind of workers, and trouble in them as one message."""

import multiprocessing
import os
import signal
import time
from functools import partial

import psutil
import pytest
import torch

from data.collate import collate
from data.loader import BatchLoader
from data.mixture import Mixture
from data.order import EpochOrder
from data.packing import Rows
from data.plan import TrainPlan
from data.stream import ClipDataset
from lightning_crosslmm.errors import UserError
from tests.test_data.test_stream import READING, damage, dataset_of


def plans_of(folder, epochs):
    data = Mixture.open(folder, "data.train")
    for epoch in range(epochs):
        order = EpochOrder(1, epoch, "f", data.samples_per_shard, 2, True)
        yield TrainPlan(Rows(order, data, None, None, (epoch,)), 4, 0, 1)


def loader_of(folder, num_workers, epochs=1, dataset=None, **options):
    plans = plans_of(folder, epochs)
    together = partial(collate, image_size=16)
    return BatchLoader(dataset or dataset_of(folder), together, lambda: next(plans), 7, num_workers, **options)


def assert_same(one, other):
    assert one.keys == other.keys and one.answer_kinds == other.answer_kinds and one.skipped == other.skipped
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name


def test_workers_change_nothing_and_stay_for_the_next_epoch(shard_folder):
    here, there = (loader_of(shard_folder, workers, epochs=2) for workers in (0, 2))
    workers_of_epoch = []
    for _ in range(2):
        batches = list(zip(here, there, strict=True))
        assert len(batches) == 7 == len(there)
        for one, other in batches:
            assert_same(one, other)
        workers_of_epoch.append({worker.pid for worker in there._loader._iterator._workers})
    assert workers_of_epoch[0] == workers_of_epoch[1] and len(workers_of_epoch[0]) == 2
    there.close()


class Threads(ClipDataset):
    """Fails in a worker that would decode or compute with more than one thread."""

    def __getitem__(self, ref):
        if torch.utils.data.get_worker_info() is not None and torch.get_num_threads() != 1:
            raise UserError(f"{torch.get_num_threads()} threads")
        return super().__getitem__(ref)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind_give_the_same_with_one_thread_each(shard_folder, start):
    dataset = Threads(Mixture.open(shard_folder, "data.train"), READING)
    loader = loader_of(shard_folder, 1, start=start, dataset=dataset)
    for one, other in zip(loader_of(shard_folder, 0), loader, strict=True):
        assert_same(one, other)
    assert loader._loader.multiprocessing_context.get_start_method() == start
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_clip_is_one_message_with_shard_and_sample(shard_folder, tmp_path, num_workers):
    folder = damage(shard_folder, tmp_path / "damaged")
    with pytest.raises(UserError) as caught:
        list(loader_of(folder, num_workers))
    assert "shard-000001.tar: sample 's09', member '0.mp4'" in str(caught.value)
    assert "Traceback" not in str(caught.value) and "worker" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_or_it_is_left_out_and_reported(shard_folder, tmp_path, num_workers):
    folder = damage(shard_folder, tmp_path / "damaged")
    batches, whole = list(loader_of(folder, num_workers, leaves_out=True)), list(loader_of(shard_folder, 0))
    (told,) = [told for batch in batches for told in batch.skipped]
    assert told.key == "s09" and told.shard == str(folder / "shard-000001.tar")
    for batch, other in zip(batches, whole, strict=True):
        assert batch.keys == tuple(key for key in other.keys if key != "s09"), "nothing stands in for it"
        batch.validate()


def test_the_end_is_known_with_the_last_batch(shard_folder):
    loader = loader_of(shard_folder, 0)
    assert [loader.at_end for _ in loader] == [False] * 6 + [True]


class Stuck(ClipDataset):
    """Never comes back from one sample."""

    def __getitem__(self, ref):
        if ref[:2] == (1, 3):
            time.sleep(600)
        return super().__getitem__(ref)


class Killed(ClipDataset):
    """Ends its process at the first sample, as a worker that runs out of memory does."""

    def __getitem__(self, ref):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", [Stuck, Killed])
def test_a_worker_that_does_not_come_back_names_what_it_read(shard_folder, kind):
    dataset = kind(Mixture.open(shard_folder, "data.train"), READING)
    loader = loader_of(shard_folder, 1, dataset=dataset, start="fork", timeout_s=3)
    with pytest.raises(UserError, match=r"no batch came \(.* was read: .*data.sample_timeout_s"):
        list(loader)


def _training(folder, told):
    loader = loader_of(folder, 1)
    next(iter(loader))
    told.send([worker.pid for worker in loader._loader._iterator._workers])
    time.sleep(600)


def test_workers_end_with_a_training_that_is_killed(shard_folder):
    told, tells = multiprocessing.Pipe()
    training = multiprocessing.get_context("spawn").Process(target=_training, args=(shard_folder, tells))
    training.start()
    workers = [psutil.Process(pid) for pid in told.recv()]
    training.kill()
    training.join()
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]


def test_the_plan_is_asked_for_with_the_first_batch(shard_folder):
    loader = BatchLoader(dataset_of(shard_folder), collate, lambda: pytest.fail("too early"), 7)
    iter(loader)
