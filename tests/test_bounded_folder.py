import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_crosslmm import bounded_folder
from lightning_crosslmm.bounded_folder import BoundedFolder

ROOT = Path(__file__).parents[1]
A, B, C, D = (letter * 32 for letter in "abcd")
KILLED = """
import sys
from pathlib import Path
from lightning_crosslmm.bounded_folder import BoundedFolder

def fetch(start, end):
    sys.stdout.write("begun\\n")
    sys.stdout.flush()
    sys.stdin.read()

BoundedFolder(Path(sys.argv[1]), 100, "shard", "tar").open("a" * 32, 60, fetch)
"""


def shards(folder, num_bytes):
    return BoundedFolder(folder, num_bytes, "shard", "tar")


def filled(byte, calls=None):
    def fetch(start, end):
        if calls is not None:
            calls.append((start, end))
        return byte * (end - start)

    return fetch


def content(cache, digest, num_bytes, fetch):
    file = cache.open(digest, num_bytes, fetch)
    if file is None:
        return None
    with file:
        return file.read()


def refuse(start, end):
    raise AssertionError("it is there already")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def total(folder):
    found = 0
    for entry in os.scandir(folder):
        try:
            found += entry.stat().st_size
        except FileNotFoundError:
            continue
    return found


def test_a_shard_is_fetched_once_in_pieces_the_last_one_first(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_folder, "PIECE", 40)
    cache, calls = shards(tmp_path / "new" / "folder", 1000), []
    fetch = lambda start, end: calls.append((start, end)) or bytes(range(start, end))  # noqa: E731
    assert content(cache, A, 100, fetch) == bytes(range(100))
    assert calls == [(80, 100), (40, 80), (0, 40)]
    assert content(cache, A, 100, refuse) == bytes(range(100))


def test_the_shard_that_was_not_used_for_longest_makes_room(tmp_path):
    cache = shards(tmp_path, 100)
    for digest, byte in ((A, b"a"), (B, b"b")):
        assert content(cache, digest, 50, filled(byte)) == byte * 50
        time.sleep(0.02)
    assert content(cache, A, 50, refuse) == b"a" * 50
    assert content(cache, C, 50, filled(b"c")) == b"c" * 50
    assert names(tmp_path) == [f"shard-{A}.tar", f"shard-{C}.tar"]
    time.sleep(0.02)
    cache.touch([A, D])
    assert content(cache, B, 50, filled(b"b")) == b"b" * 50
    assert names(tmp_path) == [f"shard-{A}.tar", f"shard-{B}.tar"]


def test_the_bound_holds_at_all_times_for_many_readers(tmp_path):
    most, wrong, stop = [0], [], threading.Event()

    def watch():
        while not stop.is_set():
            with shards(tmp_path, 70)._counting():  # else files come and go while they are counted
                most[0] = max(most[0], total(tmp_path))

    def read(seed):
        for turn in range(30):
            number = (seed * 7 + turn * 3) % 8
            byte, size = b"%d" % number, 20 + number
            found = content(shards(tmp_path, 70), f"{number}" * 32, size, lambda s, e, byte=byte: byte * (e - s))
            if found not in (None, byte * size):
                wrong.append((number, found))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert wrong == [] and 20 <= most[0] <= 70
    assert not list(tmp_path.glob("*.partial"))


def test_two_readers_fetch_a_shard_once(tmp_path):
    calls, begun, go_on, found = [], threading.Event(), threading.Event(), []

    def slow(start, end):
        calls.append(start)
        begun.set()
        go_on.wait(10)
        return b"a" * (end - start)

    threads = [threading.Thread(target=lambda: found.append(content(shards(tmp_path, 100), A, 60, slow)))]
    threads[0].start()
    begun.wait(10)
    threads.append(threading.Thread(target=lambda: found.append(content(shards(tmp_path, 100), A, 60, slow))))
    threads[1].start()
    # what is being fetched takes its room already, and is not evicted
    assert content(shards(tmp_path, 100), B, 60, filled(b"b")) is None
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [b"a" * 60] * 2 and len(calls) == 1


def test_fetching_ahead_waits_for_nobody(tmp_path):
    cache, begun, go_on = shards(tmp_path, 100), threading.Event(), threading.Event()

    def slow(start, end):
        begun.set()
        go_on.wait(10)
        return b"a" * (end - start)

    thread = threading.Thread(target=cache.fetch_ahead, args=(A, 60, slow))
    thread.start()
    begun.wait(10)
    cache.fetch_ahead(A, 60, refuse)
    cache.fetch_ahead(B, 30, filled(b"b"))
    cache.fetch_ahead(B, 30, refuse)
    cache.fetch_ahead(C, 101, refuse)
    assert names(tmp_path) == [f"shard-{A}.partial", f"shard-{B}.tar"]
    go_on.set()
    thread.join()
    assert content(cache, A, 60, refuse) == b"a" * 60


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # Python 3.12
def test_a_process_forked_in_the_middle_holds_nothing(tmp_path):
    children, found = [], []

    def fork(start, end):
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(20)
            os._exit(0)
        waiting = threading.Thread(target=lambda: found.append(content(shards(tmp_path, 100), A, 60, refuse)))
        waiting.start()
        time.sleep(0.1)  # it waits for the lock
        children.append(waiting)
        return b"a" * (end - start)

    assert content(shards(tmp_path, 100), A, 60, fork) == b"a" * 60
    pid, waiting = children
    waiting.join(5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert found == [b"a" * 60]


def test_a_shard_larger_than_the_bound_is_not_cached(tmp_path):
    assert shards(tmp_path / "cache", 50).open(A, 51, refuse) is None
    assert not (tmp_path / "cache").exists()


def test_an_open_shard_stays_readable_when_it_is_evicted(tmp_path):
    cache = shards(tmp_path, 60)
    with cache.open(A, 60, filled(b"a")) as file:
        assert content(cache, B, 60, filled(b"b")) == b"b" * 60
        assert names(tmp_path) == [f"shard-{B}.tar"]
        assert file.read() == b"a" * 60


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    def fail(start, end):
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        shards(tmp_path, 100).open(A, 60, fail)
    assert names(tmp_path) == []
    assert content(shards(tmp_path, 100), A, 60, filled(b"a")) == b"a" * 60


def test_what_a_killed_process_left_is_never_read_and_makes_room(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        assert content(shards(tmp_path, 100), B, 60, filled(b"b")) is None  # no room beside it while it lives
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert names(tmp_path) == [f"shard-{A}.partial"]
    assert content(shards(tmp_path, 100), B, 60, filled(b"b")) == b"b" * 60
    assert names(tmp_path) == [f"shard-{B}.tar"]


def test_files_of_others_are_never_touched(tmp_path):
    others = ["shard-000000.tar", "notes.txt", f"shard-{A}.tar.partial"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(500))
    assert content(shards(tmp_path, 60), A, 60, filled(b"a")) == b"a" * 60
    assert content(shards(tmp_path, 60), B, 60, filled(b"b")) == b"b" * 60
    assert names(tmp_path) == sorted([*others, f"shard-{B}.tar"])
