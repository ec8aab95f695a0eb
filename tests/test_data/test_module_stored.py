"""Shards in a store: the same batches as from local files, whatever goes wrong on the way and whoever reads."""

import threading
import types

import pytest

from data.module import VideoDataModule
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.storage import Storage
from lightning_crosslmm.video import FrameSampling
from tests.stores import serving

STREAM = {"sampling": FrameSampling("uniform", num_frames=2), "image_size": 16, "tokenizer": "byte", "max_tokens": 64}


@pytest.fixture
def store(shard_folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(shard_folder.parent) as running:
        yield running


def batches(train, num_workers=0, **storage):
    settings = {"global_batch_size": 4, "window_shards": 2, "num_workers": num_workers}
    storage = Storage(**{"backoff_s": 0.01, "retries": 3} | storage)
    data = VideoDataModule(**STREAM, **settings, train=train, storage=storage)
    data.fit_to(types.SimpleNamespace(tokens_per_frame=1, encoder=None))
    data.setup("fit")
    try:
        return [(batch.keys, batch.frames_FCHW.tolist()) for batch in data.train_dataloader()]
    finally:
        data.teardown("fit")


@pytest.mark.parametrize(("num_workers", "is_cached"), [(0, False), (0, True), (2, True)])
def test_batches_are_those_of_local_files(shard_folder, store, tmp_path, num_workers, is_cached):
    settings = {"cache_dir": str(tmp_path / "cache")} if is_cached else {}
    store.fails.extend([500, 503, None, "reset", "cut", None, "page"])
    assert batches(f"{store.url}/clips", num_workers, **settings) == batches(shard_folder)
    asked = [path for path, _ in store.requests if path.endswith(".tar")]
    assert len(asked) >= 26 - 3 if not is_cached else 5 <= len(asked) <= 10  # each shard once, and failures
    assert len(list(tmp_path.glob("cache/*.tar"))) == 5 * is_cached


def test_shards_ahead_are_fetched_while_none_is_read(store, tmp_path):
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    data = VideoDataModule(**STREAM, global_batch_size=4, train=f"{store.url}/clips", storage=storage)
    data.setup("fit")
    plan = iter(data.train_dataloader()._plan())
    next(plan)  # the first batch is planned, and nobody reads it
    for thread in threading.enumerate():
        if "_fetch_ahead" in thread.name:
            thread.join(10)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 5


def test_a_cache_that_holds_no_window_is_refused(store, tmp_path):
    with pytest.raises(
        UserError, match=r"data\.storage\.cache_bytes: 30000 do not .*data\.window_shards=2.* up to \d{5};"
    ):
        batches(f"{store.url}/clips", cache_dir=str(tmp_path / "cache"), cache_bytes=30_000)


def test_a_store_that_fails_ends_the_run_and_no_sample(store):
    data = VideoDataModule(
        **STREAM,
        global_batch_size=4,
        max_bad_fraction=1.0,
        train=f"{store.url}/clips",
        storage=Storage(retries=1, backoff_s=0.01),
    )
    data.leaves_out = True
    data.setup("fit")
    loader = iter(data.train_dataloader())
    next(loader)
    store.always = 503
    with pytest.raises(UserError, match=r"http.*shard-00000\d\..* 2 attempts.* HTTP 503"):
        list(loader)
