import errno
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import webdataset

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import SampleInfo, ShardWriter, build_index, open_shards, read_index, read_sample

ROOT = Path(__file__).parents[1]


def sample(i, num_bytes=700):
    messages = (Message("user", "<video> or <image>?"), Message("assistant", f"number {i}"))
    visuals = (Visual("video", "v.mp4"), Visual("image", "i.jpg"))
    conversation = Conversation(f"key-{i}", messages, visuals, (("", "odd")[i % 2],))
    members = {"0.mp4": bytes([i % 256]) * num_bytes, "1.jpg": b"jpg" * i}
    return conversation, members, SampleInfo(1.5, 40, ((0.0, 1.0), ()))


def write(folder, num_samples=5, **settings):
    with ShardWriter(folder, **{"samples_per_shard": 2, **settings}) as writer:
        for i in range(num_samples):
            writer.write(*sample(i))
    return folder


def test_written_shards_open_and_give_back_the_same_bytes(tmp_path):
    shards = open_shards(write(tmp_path / "out"))
    assert [path.name for path in shards.paths] == [f"shard-00000{i}.tar" for i in range(3)]
    assert (shards.num_samples, shards.answer_kinds) == ((2, 2, 1), ("odd",))
    for i, path in enumerate(shards.paths):
        for j, entry in enumerate(shards.index(i).entries):
            conversation, members, info = sample(2 * i + j)
            assert read_sample(path, entry) == {"json": conversation.to_json(), **members}
            assert (entry.duration_s, entry.keyframe_times_s) == (info.duration_s, info.keyframe_times_s)
    manifest = json.loads((tmp_path / "out" / "shards.json").read_bytes())
    assert (manifest["num_samples"], manifest["duration_s"], manifest["answer_kinds"]) == (5, 7.5, ["odd"])
    assert not list((tmp_path / "out").glob("*.partial"))


def test_stock_webdataset_reads_the_same_bytes(tmp_path):
    write(tmp_path / "out")
    pattern = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing its files to the collector
        read = list(webdataset.WebDataset(pattern, shardshuffle=False))
        gc.collect()
    assert len(read) == 5
    for i, got in enumerate(read):
        conversation, members, _ = sample(i)
        stored = {name: data for name, data in got.items() if not name.startswith("__")}
        assert got["__key__"] == conversation.key
        assert stored == {"json": conversation.to_json(), **members}


def test_index_written_equals_index_built(tmp_path):
    for path in open_shards(write(tmp_path / "out")).paths:
        built, read = build_index(path), read_index(path)
        assert [entry.members for entry in built.entries] == [entry.members for entry in read.entries]
        assert built.num_bytes == read.num_bytes


def test_equal_samples_give_equal_files_and_fingerprint(tmp_path):
    first, second = open_shards(write(tmp_path / "a")), open_shards(write(tmp_path / "b"))
    for one, other in zip(first.paths, second.paths, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first.fingerprint == second.fingerprint
    assert open_shards(write(tmp_path / "c", 4)).fingerprint != first.fingerprint


def test_a_shard_closes_before_it_grows_too_large(tmp_path):
    folder = write(tmp_path / "out", samples_per_shard=100, shard_bytes=6000)
    sizes = open_shards(folder).num_samples
    assert sum(sizes) == 5 and max(sizes) == 2
    assert open_shards(write(tmp_path / "tiny", shard_bytes=1)).num_samples == (1,) * 5


def test_folder_opens_without_reading_any_index(tmp_path):
    folder = write(tmp_path / "out")
    whole = open_shards(folder)
    for path in folder.glob("*.index.json"):
        path.write_text("broken")
    assert open_shards(folder).fingerprint == whole.fingerprint
    with pytest.raises(UserError, match="not an index of a shard"):
        open_shards(folder).index(0)


def test_one_tar_and_patterns_open(tmp_path):
    folder = write(tmp_path / "out")
    assert open_shards(folder / "shard-000002.tar").num_samples == (1,)
    some = open_shards(f"{folder}/shard-{{000001..000002}}.tar")
    assert some.num_samples == (2, 1)
    assert some.index(1).entries[0].key == "key-4"
    assert pickle.loads(pickle.dumps(some)) == some


def test_folder_without_manifest_and_index_opens_the_same(tmp_path, caplog):
    folder = write(tmp_path / "out")
    whole = open_shards(folder)
    (folder / "shards.json").unlink()
    assert open_shards(folder) == whole
    members = whole.index(1).entries[0].members
    (folder / "shard-000001.index.json").unlink()
    bare = open_shards(folder)
    assert "shard-000001.tar has no index" in caplog.text
    assert (bare.num_samples, bare.answer_kinds) == (whole.num_samples, whole.answer_kinds)
    assert bare.index(1).entries[0].members == members


def test_index_that_is_not_the_manifests_is_refused(tmp_path):
    folder = write(tmp_path / "out")
    path = folder / "shard-000000.tar"
    build_index(path).save(path)  # without durations
    with pytest.raises(UserError, match=r"shard-000000\.index\.json.*shards\.json"):
        open_shards(folder).index(0)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pipe:cat shard-000000.tar", "is not opened"),
        ("ftp://host/shard-000000.tar", "is not opened"),
        ("{a,pipe:b}.tar", "there is no shard a.tar"),
        ("{file:///b,a}.tar", "there is no shard file:///b.tar"),
        ("shard-{000000..000009}.tar", "there is no shard shard-000003.tar"),
        ("shard-{000000.tar", "braces do not close"),
        ("shard-{000000,000000}.tar", "twice"),
        ("shard-000000.index.json", "name a folder, a .tar"),
        ("nowhere", "there is no shard nowhere"),
    ],
)
def test_specs_that_name_no_shards(tmp_path, monkeypatch, spec, said):
    monkeypatch.chdir(write(tmp_path / "out"))
    with pytest.raises(UserError) as error:
        open_shards(spec)
    assert spec in str(error.value) and said in str(error.value)


def test_each_address_of_a_pattern_is_looked_at():
    with pytest.raises(UserError, match=r"^pipe:b\.tar: is not opened"):
        open_shards("{pipe:b,a}.tar")


def test_folders_that_are_not_whole(tmp_path):
    folder = write(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no \.tar"):
        open_shards(tmp_path / "empty")
    (folder / "shard-000001.tar").rename(folder / "other.tar")
    with pytest.raises(UserError, match=r"lacks 1 shard.*shard-000001\.tar"):
        open_shards(folder)
    (folder / "other.tar").rename(folder / "shard-000001.tar")
    (folder / "other.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    with pytest.raises(UserError, match=r"shards\.json: lacks other\.tar"):
        open_shards(folder)
    (folder / "shards.json").write_text("[]")
    with pytest.raises(UserError, match=r"shards\.json: not a list of shards"):
        open_shards(folder)


def test_shards_are_replaced_only_when_asked(tmp_path):
    folder = write(tmp_path / "out")
    with pytest.raises(UserError, match=r"out: already holds shards .*overwrite"):
        write(folder)
    assert open_shards(folder).num_samples == (2, 2, 1)
    assert open_shards(write(folder, 1, overwrite=True)).num_samples == (1,)
    assert not (folder / "shard-000001.index.json").exists()
    (folder / "others.tar").touch()
    with pytest.raises(UserError, match=r"others\.tar"):
        write(folder, overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_writing_leaves_nothing(tmp_path, error):
    with pytest.raises(error), ShardWriter(tmp_path, samples_per_shard=1) as writer:
        writer.write(*sample(0))
        writer.write(*sample(1))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_full_disk_names_folder_free_and_needed_bytes(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no room for shard-000000\.tar.*\d+ bytes are free.*needs \d+") as error:
        write(tmp_path / "out", 1)
    assert str(tmp_path / "out") in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_written_after_a_failed_write(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="after a write that failed"), ShardWriter(tmp_path) as writer:
        with pytest.raises(UserError, match="stands twice"):
            writer.write(*sample(0))
            writer.write(*sample(0))
        writer.write(*sample(1))
    assert list(tmp_path.iterdir()) == []


def test_samples_that_do_not_fit_their_conversation(tmp_path):
    conversation, members, info = sample(0)
    for wrong, said in (({"0.mp4": b""}, "names the visuals"), ({**members, "0.pyd": b""}, "not allowed")):
        with pytest.raises(UserError, match=said), ShardWriter(tmp_path) as writer:
            writer.write(conversation, wrong, info)
    dotted = Conversation("a.b", conversation.messages, conversation.visuals, conversation.answer_kinds)
    with pytest.raises(UserError, match=r"'a\.b'"), ShardWriter(tmp_path) as writer:
        writer.write(dotted, members, info)
    with pytest.raises(UserError, match="no sample was written"), ShardWriter(tmp_path):
        pass
    with pytest.raises(UserError, match="samples_per_shard must be at least 1, got 0"):
        ShardWriter(tmp_path, samples_per_shard=0)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from test_shards import ShardWriter, UserError, sample
import resource
try:
    with ShardWriter({out!r}, samples_per_shard=2) as writer:
        if {limit}:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        for i in range(10**6):
            writer.write(*sample(i, 200_000))
            sys.stdout.write(f"{{i}}\\n")
            sys.stdout.flush()
except UserError as error:
    sys.stderr.write(str(error))
"""


def child(out, limit):
    code = CHILD.format(tests=str(Path(__file__).parent), out=str(out), limit=limit)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def test_size_limit_of_the_system_is_told_and_leaves_nothing(tmp_path):
    with child(tmp_path / "out", limit=300_000) as process:
        said = process.communicate()[1]
    assert "no room for shard-000000.tar" in said and str(tmp_path / "out") in said
    assert "Exception ignored" not in said and "Traceback" not in said
    assert list((tmp_path / "out").iterdir()) == []


def test_killed_writer_leaves_whole_shards_and_a_folder_that_does_not_open(tmp_path):
    out = tmp_path / "out"
    with child(out, limit=0) as process:
        for line in process.stdout:
            if int(line) == 4:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.communicate()
    tars = sorted(out.glob("*.tar"))
    assert len(tars) >= 2
    for path in tars:
        assert len(build_index(path).entries) == len(read_index(path).entries) == 2
    with pytest.raises(UserError, match="did not finish"):
        open_shards(out)
    with pytest.raises(UserError, match="overwrite"):
        write(out)
    assert open_shards(write(out, 1, overwrite=True)).num_samples == (1,)
