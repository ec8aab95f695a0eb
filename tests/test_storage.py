import multiprocessing
import random
import time

import fsspec
import pytest
from fsspec.registry import known_implementations

from lightning_crosslmm import store as requests
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.location import Url, locate
from lightning_crosslmm.storage import Storage, Version
from lightning_crosslmm.storage import _ahead as ahead
from lightning_crosslmm.store import StorageError
from tests.stores import PAGE, serving

DATA = random.Random(0).randbytes(5000)
VERSION = Version(len(DATA), "0" * 64)
QUICK = {"retries": 2, "backoff_s": 0.001}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(DATA)
    with serving(tmp_path / "served") as running:
        yield running


def is_data(offset):
    def check(parts):
        for part in parts:
            if part != DATA[offset : offset + len(part)]:
                raise UserError(f"k: not the bytes of the index but {part[:50]}")
        return parts

    return check


def read(url, storage, offset=100, size=50, version=None):
    return storage.read_ranges(locate(url), [(offset, size)], is_data(offset), f"{url}: sample 'k'", version)


def text(data):
    if data == PAGE:
        raise UserError(f"no list: {data[:6]}")
    return data.decode()


def test_local_files_are_opened_as_they_are(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    storage = Storage(cache_dir=tmp_path / "cache")
    assert storage.read_file(tmp_path / "a", bytes.decode) == "0123456789"
    assert storage.find_file(tmp_path / "b", bytes.decode) is None
    parts = storage.read_ranges(tmp_path / "a", [(7, 2), (0, 3)], list, "here", Version(10, ""))
    assert parts == [b"78", b"012"] and not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"b: cannot be read \(No such file"):
        storage.read_file(tmp_path / "b", bytes.decode)
    with pytest.raises(UserError, match=r"^here cannot be read \(No such file"):
        storage.read_ranges(tmp_path / "b", [(0, 1)], list, "here")


def test_memory_is_a_store():
    fsspec.filesystem("memory").pipe_file("/storage-test/a.tar", DATA)
    folder, storage = locate("memory://storage-test"), Storage(**QUICK)
    assert storage.list_names(folder) == ["a.tar"]
    assert storage.list_names(folder / "none") == []
    assert storage.find_file(folder / "b", bytes.decode) is None
    assert read("memory://storage-test/a.tar", storage) == [DATA[100:150]]
    with pytest.raises(UserError, match=r"^memory://storage-test/a\.tar: sample 'k': lies past the end .* 3 attempts"):
        read("memory://storage-test/a.tar", storage, 4990, 50)


def test_neighbours_are_read_by_one_request_and_others_are_not(store, tmp_path, monkeypatch):
    (tmp_path / "served" / "far.tar").write_bytes(DATA[:200] + bytes(200_000) + DATA)
    ranges = [(200_200, 100), (10, 20), (60, 0), (0, 5)]
    parts = Storage(**QUICK).read_ranges(locate(f"{store.url}/far.tar"), ranges, list, "here")
    assert parts == [DATA[:100], DATA[10:30], b"", DATA[:5]]
    assert [asked for _, asked in store.requests] == ["bytes=0-59", "bytes=200200-200299"]
    store.requests.clear()
    monkeypatch.setattr(requests, "PIECE", 64)
    assert read(f"{store.url}/a.tar", Storage(**QUICK), 0, 150) == [DATA[:150]]
    assert [asked for _, asked in store.requests] == ["bytes=0-63", "bytes=64-127", "bytes=128-149"]


@pytest.mark.parametrize("failure", [500, 404, 403, "page", "whole", "cut", "reset", "wrong"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_what_fails_twice_is_read_the_third_time(store, tmp_path, failure, is_cached):
    storage = Storage(cache_dir=tmp_path / "cache" if is_cached else None, **QUICK)
    store.fails.extend([failure] * 2)
    assert read(f"{store.url}/a.tar", storage, version=VERSION) == [DATA[100:150]]
    assert 3 <= len(store.requests) <= 5  # aiohttp asks again by itself where a kept connection has ended
    store.fails.extend([failure] * (failure not in ("whole", 404, "wrong")))
    (tmp_path / "served" / "list").write_text("hello")
    assert storage.read_file(locate(f"{store.url}/list"), text) == "hello"


@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [
        (500, StorageError, "HTTP 500 Internal Server Error"),
        (404, StorageError, "HTTP 404 Not Found"),
        ("page", StorageError, "HTTP 200 with text/html of 46 bytes instead of the range .* an error page"),
        ("whole", StorageError, "HTTP 200 with application/x-tar of 5000 bytes .* does not answer range requests"),
        ("cut", StorageError, "payload is not completed"),
        ("reset", StorageError, "disconnected|reset"),
        ("wrong", UserError, "not the bytes of the index"),
        (416, UserError, "lies past the end of the shard"),
    ],
)
@pytest.mark.parametrize("is_cached", [False, True])
def test_what_always_fails_is_one_error_with_url_attempts_and_reason(store, tmp_path, failure, kind, said, is_cached):
    storage = Storage(cache_dir=tmp_path / "cache" if is_cached else None, **QUICK)
    store.always = failure
    with pytest.raises(UserError, match=said) as error:
        read(f"{store.url}/a.tar", storage, version=VERSION)
    assert type(error.value) is kind and error.value.__cause__ is error.value.__context__ is None
    assert "3 attempts" in str(error.value) and "\n" not in str(error.value)
    if failure != "wrong":  # what is wrong with bytes that came, the check says
        assert str(error.value).startswith(f"{store.url}/a.tar")
    assert not list(tmp_path.glob("cache/*.[tp]ar*"))


def test_a_store_that_does_not_answer_is_not_waited_for(store):
    store.always = "stall"
    before_s = time.monotonic()
    with pytest.raises(StorageError, match=r"a\.tar: sample 'k': .* 2 attempts.* no answer within 0\.1 s"):
        read(f"{store.url}/a.tar", Storage(retries=1, backoff_s=0, timeout_s=0.1))
    assert time.monotonic() - before_s < 5


def test_a_file_that_may_be_missing_is_not_asked_for_again(store):
    assert Storage(**QUICK).find_file(locate(f"{store.url}/none"), text) is None
    assert len(store.requests) == 1
    store.fails.append(500)
    assert Storage(**QUICK).find_file(locate(f"{store.url}/none"), text) is None
    store.always = "page"
    (store.folder / "list").write_text("hello")
    with pytest.raises(UserError, match="no list: .*in each of 3 attempts"):
        Storage(**QUICK).find_file(locate(f"{store.url}/list"), text)
    assert Storage(**QUICK).list_names(locate(store.url)) is None


def test_waits_double_up_to_a_limit_and_leave_the_random_state(store, monkeypatch):
    waits_s = []
    monkeypatch.setattr(time, "sleep", waits_s.append)
    store.always, state = 500, random.getstate()
    with pytest.raises(StorageError):
        read(f"{store.url}/a.tar", Storage(retries=6, backoff_s=2))
    for wait_s, longest_s in zip(waits_s, (2, 4, 8, 16, 30, 30), strict=True):
        assert longest_s / 2 <= wait_s <= longest_s
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("setting", "value"),
    [("cache_bytes", 0), ("retries", -1), ("backoff_s", -1.0), ("timeout_s", 0), ("timeout_s", 301)],
)
def test_settings_that_make_no_sense(setting, value):
    with pytest.raises(UserError, match=rf"data\.storage\.{setting}: must be .*, got {value}"):
        Storage(**{setting: value})


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(known_implementations, "gs", {"class": "no_such_package.X", "err": "no"})
    requests._driver.cache_clear()
    with pytest.raises(StorageError, match=r"^gs://bucket: gs:// is read by the package gcsfs.* pip install gcsfs$"):
        read("gs://bucket/a.tar", Storage())


def test_reasons_hold_no_credentials(monkeypatch):
    def fail(*_, **__):
        raise OSError("403, url='https://me:secret@cdn.org/a.tar?sig=secret'")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", fail)
    with pytest.raises(StorageError, match=r"https://cdn\.org/a\.tar'") as error:
        read("memory://a.tar", Storage(**QUICK))
    assert "secret" not in str(error.value)


def test_a_shard_is_fetched_once_and_read_from_disk(store, tmp_path):
    storage = Storage(cache_dir=tmp_path / "cache", **QUICK)
    for offset in (0, 100, 4000):
        assert read(f"{store.url}/a.tar", storage, offset, version=VERSION) == [DATA[offset : offset + 50]]
    assert store.requests == [("/a.tar", "bytes=0-4999")]
    (cached,) = (tmp_path / "cache").glob("*.tar")
    cached.write_bytes(bytes(5000))  # a disk that lost it
    assert read(f"{store.url}/a.tar", storage, version=VERSION) == [DATA[100:150]]
    assert len(store.requests) == 2
    read(f"{store.url}/a.tar", storage, version=Version(5000, "1" * 64))  # another index, another shard
    assert len(store.requests) == 3 and len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_without_room_ranges_are_read(store, tmp_path):
    storage = Storage(cache_dir=tmp_path / "cache", cache_bytes=4999, **QUICK)
    assert read(f"{store.url}/a.tar", storage, version=VERSION) == [DATA[100:150]]
    assert store.requests == [("/a.tar", "bytes=100-149")]


def test_of_a_shard_that_was_cut_off_the_beginning_is_read(store, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_crosslmm.bounded_folder.PIECE", 1000)
    storage = Storage(cache_dir=tmp_path / "cache", **QUICK)
    (store.folder / "a.tar").write_bytes(DATA[:3000])
    assert read(f"{store.url}/a.tar", storage, version=VERSION) == [DATA[100:150]]
    assert [asked for _, asked in store.requests] == ["bytes=4000-4999", "bytes=100-149"]
    with pytest.raises(UserError, match="sample 'k': lies past the end of the shard .*20 of 50 bytes"):
        read(f"{store.url}/a.tar", storage, 2980, version=VERSION)


def test_a_cache_that_cannot_be_written_is_named(store, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"^data\.storage\.cache_dir: .*file cannot take http.*a\.tar"):
        read(f"{store.url}/a.tar", Storage(cache_dir=tmp_path / "file", **QUICK), version=VERSION)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_shards_are_fetched_ahead_as_many_as_there_is_room_for(store, tmp_path):
    names = ("a", "b", "c", "d")
    for name in names[1:]:
        (store.folder / f"{name}.tar").write_bytes(DATA)
    urls = [locate(f"{store.url}/{name}.tar") for name in names]
    storage = Storage(cache_dir=tmp_path / "cache", cache_bytes=10_000, **QUICK)
    read(str(urls[3]), storage, version=VERSION)
    read(str(urls[1]), storage, version=VERSION)  # older than what comes, and to be kept
    store.fails.append(500)
    large = (Url(f"{store.url}/large.tar"), Version(10_001, ""))
    storage.prefetch([large, *((url, VERSION) for url in urls)])
    wait_for(lambda: len(store.requests) == 4)
    wait_for(lambda: len(list((tmp_path / "cache").glob("*.tar"))) == 2)
    assert [path for path, _ in store.requests] == ["/d.tar", "/b.tar", "/a.tar", "/a.tar"]
    for url in urls[:2]:
        read(str(url), storage, version=VERSION)
    assert len(store.requests) == 4


def test_what_cannot_be_fetched_ahead_is_told_to_who_reads_it(store, tmp_path):
    storage = Storage(cache_dir=tmp_path / "cache", retries=0)
    store.always = 500
    storage.prefetch([(locate(f"{store.url}/a.tar"), VERSION)])
    wait_for(lambda: store.requests and not ahead.locked())
    with pytest.raises(StorageError, match="HTTP 500"):
        read(f"{store.url}/a.tar", storage, version=VERSION)
    Storage().prefetch([(locate(f"{store.url}/b.tar"), VERSION)])  # without a cache there is nothing to do
    assert {path for path, _ in store.requests} == {"/a.tar"}


def read_all(url, storage, queue):
    queue.put([read(url, storage, offset, version=VERSION)[0] for offset in range(0, 4000, 1000)])


@pytest.mark.parametrize("start", ["fork", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # Python 3.12
def test_processes_read_one_store_and_share_one_cache(store, tmp_path, start):
    storage = Storage(cache_dir=tmp_path / "cache", **QUICK)
    (store.folder / "b.tar").write_bytes(DATA)
    read(f"{store.url}/b.tar", storage)  # this process has a connection already, and a thread that serves it
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    workers = [context.Process(target=read_all, args=(f"{store.url}/a.tar", storage, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [[DATA[offset : offset + 50] for offset in range(0, 4000, 1000)]] * 2
    assert [path for path, _ in store.requests].count("/a.tar") == 1
