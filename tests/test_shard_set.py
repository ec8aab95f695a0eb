import json
import pickle
import shutil
import time

import fsspec
import pytest

from lightning_crosslmm.conversation import Conversation, Message
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import SampleInfo, ShardWriter, open_shards, prefetch
from lightning_crosslmm.storage import Storage
from lightning_crosslmm.store import StorageError
from tests.stores import serving

QUICK = Storage(retries=2, backoff_s=0.001)


@pytest.fixture
def folder(tmp_path):
    messages = (Message("user", "1 + 1?"), Message("assistant", "2"))
    with ShardWriter(tmp_path / "served" / "shards", samples_per_shard=2) as writer:
        for i in range(5):
            writer.write(Conversation(f"key-{i}", messages, (), ("sum",)), {}, SampleInfo(0.0, 0, ()))
    return tmp_path / "served" / "shards"


@pytest.fixture
def store(folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(folder.parent) as running:
        yield running


@pytest.fixture
def memory(folder):
    """The same folder in memory, where nothing else lies."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pipe({f"/shards/{path.name}": path.read_bytes() for path in folder.iterdir()})
    return filesystem


def samples(shards):
    return [shards.read(i, entry) for i in range(len(shards.paths)) for entry in shards.index(i).entries]


def test_a_folder_reads_the_same_wherever_it_lies(folder, store, memory):
    local = open_shards(folder)
    for spec in (f"{store.url}/shards/", f"{store.url}/shards", "memory://shards", f"file://{folder}"):
        shards = pickle.loads(pickle.dumps(open_shards(spec, storage=QUICK)))
        assert shards.fingerprint == local.fingerprint and shards.num_samples == (2, 2, 1)
        assert samples(shards) == samples(local)
        assert str(shards.paths[2]) == f"{spec.rstrip('/').removeprefix('file://')}/shard-000002.tar"


def test_a_folder_opens_by_its_manifest_alone(store):
    shards = open_shards(f"{store.url}/shards", storage=QUICK)
    assert {path for path, _ in store.requests} == {"/shards/shards.json"}
    entry = shards.index(1).entries[1]
    shards.read(1, entry)
    assert [path for path, _ in store.requests[-2:]] == ["/shards/shard-000001.index.json", "/shards/shard-000001.tar"]


def test_tars_and_patterns_of_a_store_open(store):
    one = open_shards(f"{store.url}/shards/shard-000002.tar", storage=QUICK)
    assert one.num_samples == (1,)
    some = open_shards(f"{store.url}/shards/shard-{{000001..000002}}.tar", storage=QUICK)
    assert some.num_samples == (2, 1) and some.index(1).entries[0].key == "key-4"
    with pytest.raises(UserError, match=r"shards\.json: lacks shard-000003\.tar"):
        open_shards(f"{store.url}/shards/shard-{{000001..000003}}.tar", storage=QUICK)


def test_local_tars_and_those_of_a_store_make_one_set(folder, store):
    copy = shutil.copytree(folder, folder.parent / "copy")
    both = open_shards(f"{{{store.url}/shards,{copy}}}/shard-000000.tar", storage=QUICK)
    assert both.num_samples == (2, 2) and [*samples(both)][:2] == [*samples(both)][2:]


def test_without_a_manifest_a_store_with_listings_opens_and_another_asks_for_names(folder, store, memory):
    known = open_shards(folder)
    (folder / "shards.json").unlink()
    memory.rm("/shards/shards.json")
    assert open_shards("memory://shards", storage=QUICK).fingerprint == known.fingerprint
    named = open_shards(f"{store.url}/shards/shard-{{000000..000002}}.tar", storage=QUICK)
    assert named.fingerprint == known.fingerprint and named.answer_kinds == ("sum",)
    with pytest.raises(
        UserError, match=r"shards\.json: is not there, and http .*shards/shard-\{000000\.\.000003\}\.tar"
    ):
        open_shards(f"{store.url}/shards", storage=QUICK)
    with pytest.raises(UserError, match=r"^memory://empty: holds no \.tar file"):
        open_shards("memory://empty", storage=QUICK)


def test_an_unfinished_folder_of_a_store_does_not_open(memory):
    memory.mv("/shards/shards.json", "/shards/shards.json.partial")
    with pytest.raises(UserError, match="its writing did not finish"):
        open_shards("memory://shards", storage=QUICK)


@pytest.mark.parametrize("name", ["../shard-000000.tar", "http://elsewhere/a.tar", "shard-000000.zip"])
def test_a_manifest_names_tars_of_its_folder_and_nothing_else(folder, store, name):
    manifest = json.loads((folder / "shards.json").read_bytes())
    manifest["shards"][0]["name"] = name
    (folder / "shards.json").write_text(json.dumps(manifest))
    for spec in (folder, f"{store.url}/shards"):
        with pytest.raises(UserError, match=r"shards\.json: not a list of shards .*is no name of a tar"):
            open_shards(spec, storage=QUICK)


def test_indexes_of_a_store_are_checked_and_read_again(folder, store):
    shards = open_shards(f"{store.url}/shards", storage=QUICK)
    store.fails.extend(["page", 404])
    assert shards.index(0).entries[0].key == "key-0"
    shutil.copy(folder / "shard-000001.index.json", folder / "shard-000002.index.json")
    with pytest.raises(UserError, match=r"shard-000002\.index\.json: was written for 'shard-000001\.tar'.* 3 attempts"):
        shards.index(2)
    (folder / "shard-000001.index.json").unlink()
    with pytest.raises(StorageError, match=r"shard-000001\.index\.json: the index that .* HTTP 404 Not Found"):
        shards.index(1)


def test_damage_in_a_store_names_shard_and_sample(folder, store):
    shards = open_shards(f"{store.url}/shards", storage=QUICK)
    entry = shards.index(0).entries[1]
    tar = bytearray((folder / "shard-000000.tar").read_bytes())
    tar[entry.members["json"].offset] ^= 1
    (folder / "shard-000000.tar").write_bytes(tar)
    with pytest.raises(
        UserError, match=r"^http.*shard-000000\.tar: sample 'key-1', member 'json': .*3 attempts"
    ) as error:
        shards.read(0, entry)
    assert not isinstance(error.value, StorageError)  # the store is in order


def test_shards_are_fetched_ahead_and_take_room(folder, store, tmp_path):
    cached = Storage(cache_dir=tmp_path / "cache", cache_bytes=25_000, retries=0)
    shards = open_shards(f"{store.url}/shards", storage=cached)
    size = shards.records[0].bytes
    assert size == 10_240 and shards.cached_bytes(1) == size and shards.cached_bytes(9) == 3 * size
    assert open_shards(folder, storage=cached).cached_bytes(9) == 0
    assert open_shards(f"{store.url}/shards", storage=QUICK).cached_bytes(9) == 0
    prefetch([(open_shards(folder, storage=cached), 0), (shards, 2), (shards, 0), (shards, 1)])
    deadline = time.monotonic() + 10
    while len(list((tmp_path / "cache").glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(samples(shards)) == 5
    fetched = [path for path, _ in store.requests if path.endswith(".tar")]
    assert fetched[:2] == ["/shards/shard-000002.tar", "/shards/shard-000000.tar"]
    assert 20_480 <= sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 25_000
