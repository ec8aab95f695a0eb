import io
import json
import os
import pickle
import tarfile
from types import SimpleNamespace

import pytest

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_build import build_index, hash_bytes, index_tar
from lightning_crosslmm.shard_files import read_index, read_sample
from lightning_crosslmm.video import probe_video
from tests.tars import LLAVA, claim, clip, cut, flip, headers, special, write_tar

JSON = Conversation(
    "k", (Message("user", "<video>?"), Message("assistant", "yes")), (Visual("video", "v.mp4"),), ("what",)
).to_json()
CLIP = bytes(range(256)) * 3


@pytest.fixture
def shard(tmp_path):
    members = [(f"k{i}.{ext}", data) for i in range(3) for ext, data in (("0.mp4", CLIP), ("json", JSON))]
    return write_tar(tmp_path / "others.tar", members)


def test_index_of_a_tar_that_others_wrote(shard):
    def probe(file, name):
        assert file.read() == CLIP and "'k" in name
        return SimpleNamespace(duration_s=1.5, num_frames=30, keyframe_times_s=[0, 1])

    index = build_index(shard, probe)
    assert [entry.key for entry in index.entries] == ["k0", "k1", "k2"]
    assert index.num_bytes == shard.stat().st_size
    entry = index.entries[2]
    assert (entry.duration_s, entry.num_frames, entry.keyframe_times_s) == (1.5, 30, ((0.0, 1.0),))
    assert (entry.text_bytes, entry.answer_kinds) == (len("<video>?yes"), ("what",))
    assert read_sample(shard, entry) == {"0.mp4": CLIP, "json": JSON}
    index.save(shard)
    assert read_index(shard) == index


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_layouts_of_others_are_indexed_with_real_clips(tmp_path, tar_format):
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    members = [
        special("data", tarfile.DIRTYPE),
        ("data/a.json", LLAVA),
        ("data/a.mp4", clip()),
        ("data/._a.mp4", b"of a Mac"),
        ("data/b.json", json.dumps(messages).encode()),
        ("data/b.jpg", b"jpg"),
        ("data/c.json", b'{"url": "x", "caption": "two clips"}'),
        ("data/c.0.mp4", clip(4)),
        ("data/c.1.mp4", clip(8)),
        ("data/c.m4a", b"sound"),
        ("data/" + "日" * 120 + ".txt", b"A dog."),
        ("data/" + "日" * 120 + ".mp4", clip(2)),
        ("README", b"hello"),
    ]
    built = index_tar(write_tar(tmp_path / "a.tar", members, tar_format), probe_video)
    a, b, c, d = built.index.entries
    assert [entry.key for entry in (a, b, c)] == ["data/a", "data/b", "data/c"] and d.key == "data/" + "日" * 120
    assert (a.duration_s, a.num_frames, a.keyframe_times_s) == (1.5, 6, ((0.0, 0.75),))
    assert (b.num_frames, b.keyframe_times_s, b.text_bytes) == (1, ((),), len("<image>\nWhat?A cat."))
    assert (c.num_frames, len(c.keyframe_times_s), c.text_bytes) == (12, 2, len("<video>\n<video>\ntwo clips"))
    assert d.members["txt"].size == 6
    assert (built.left_out, built.skipped) == ({"m4a": 1}, ())


def test_members_that_are_left_out_are_told(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [("k.json", LLAVA), ("k.mp4", CLIP), ("k.npy", b"")])
    assert set(build_index(path).entries[0].members) == {"json", "mp4"}
    assert f"{path}: members of other kinds are left out: {{'npy': 1}}" in caplog.text


@pytest.mark.parametrize(
    ("number", "beyond"),
    [(2, 0), (3, 0), (3, 100), (4, 700), (6, 0)],
    ids=["sample", "member", "header", "data", "end"],
)
def test_cut_tar_is_refused_wherever_it_is_cut(shard, number, beyond):
    cut(shard, headers(shard)[number] + beyond)
    with pytest.raises(UserError, match=r"others\.tar: is cut off .*after the sample 'k\d', at byte \d+"):
        build_index(shard)


def test_damaged_header_in_the_middle_is_refused(shard):
    flip(shard, headers(shard)[2] + 150)
    with pytest.raises(UserError, match="damaged header .* after the sample 'k0'"):
        build_index(shard)


def test_two_tars_in_one_file_are_refused(shard):
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(UserError, match="more follows .* after the sample 'k2'"):
        build_index(shard)


class Boom:
    def __reduce__(self):
        return os.mkdir, (os.environ["CROSSLMM_BOOM"],)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pth", "0.pickle"])
def test_pickles_are_refused_and_never_opened(tmp_path, monkeypatch, extension):
    monkeypatch.setenv("CROSSLMM_BOOM", str(tmp_path / "boom"))
    members = [("k.json", JSON), ("k.0.mp4", CLIP), (f"k.{extension}", pickle.dumps(Boom()))]
    with pytest.raises(UserError, match=rf"a\.tar: the member 'k\.{extension}' is not allowed: to unpickle"):
        build_index(write_tar(tmp_path / "a.tar", members))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("../k.json", JSON)], "'../k.json'"),
        ([("/k.json", JSON)], "'/k.json'"),
        ([("k\x1b[2J.json", JSON)], r"'k\x1b[2J.json'"),
        ([("k.json", JSON)], "sample 'k': its text names the visuals ['0.mp4']"),
        ([("k.json", LLAVA)], "sample 'k': 1 <video> mark(s)"),
        ([("k.0.mp4", CLIP)], "sample 'k': has neither 'json' nor 'txt'"),
        ([("k.v2.mp4", CLIP), ("k.v2.json", LLAVA)], "a key ends at the first dot"),
        ([("k.json", JSON), ("k.json", JSON)], "sample 'k': the member 'k.json' stands twice"),
        ([("k.json", LLAVA), ("k.JSON", LLAVA)], "sample 'k': the member 'k.JSON' stands twice"),
        (
            [("k.json", LLAVA), ("l.json", LLAVA), ("k.mp4", CLIP), ("l.mp4", CLIP)],
            "sample 'k': the member 'k.mp4' lies",
        ),
        ([special("k.json", tarfile.SYMTYPE, "elsewhere")], "'k.json' is a link"),
        ([special("k.json", tarfile.LNKTYPE, "elsewhere")], "'k.json' is a link"),
        ([special("k.mp4", tarfile.FIFOTYPE)], "'k.mp4' is a link, a device"),
        ([("README", b"")], "holds no sample"),
        ([], "holds no sample"),
    ],
)
def test_tar_with_anything_else_is_refused(tmp_path, members, said):
    with pytest.raises(UserError) as error:
        build_index(write_tar(tmp_path / "a.tar", members))
    assert str(error.value).startswith(f"{tmp_path / 'a.tar'}: ") and said in str(error.value)


@pytest.mark.parametrize("rest", [b"", CLIP], ids=["nothing behind it", "some bytes behind it"])
def test_a_member_of_2_gb_is_refused_by_its_header(tmp_path, rest):
    path = tmp_path / "a.tar"
    path.write_bytes(claim("k.json", 0) + claim("k.0.mp4", 2 << 30) + rest)
    with pytest.raises(
        UserError, match=r"a\.tar: sample 'k': the member 'k\.0\.mp4' has 2147483648 bytes, and 1073741824"
    ):
        build_index(path)


def test_what_is_no_tar_is_told(tmp_path):
    (tmp_path / "text.tar").write_text("no tar" * 500)
    with pytest.raises(UserError, match=r"text\.tar: is not a tar"):
        build_index(tmp_path / "text.tar")
    with pytest.raises(UserError, match=r"none\.tar: cannot be read"):
        build_index(tmp_path / "none.tar")
    with pytest.raises(UserError, match=r"a\.tar: is compressed \(gzip\).*unpack it"):
        build_index(write_tar(tmp_path / "a.tar", [("k.json", JSON)], mode="w:gz"))


def test_damaged_samples_may_be_left_out(tmp_path):
    whole = clip()
    members = [
        *(("a.json", LLAVA), ("a.mp4", whole)),
        *(("b.json", LLAVA), ("b.mp4", whole[:-400])),
        *(("c.json", b"{"), ("c.mp4", whole)),
        ("d.mp4", whole),
        *(("e.json", LLAVA), ("e.mp4", whole)),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="sample 'b', member 'mp4'"):
        index_tar(path, probe_video)
    built = index_tar(path, probe_video, skip_bad=True)
    assert [entry.key for entry in built.index.entries] == ["a", "e"]
    assert [key for key, reason in built.skipped if f"{path}: sample '{key}'" in reason] == ["b", "c", "d"]
    with pytest.raises(UserError, match="holds no sample that can be read; the first: .*sample 'd'"):
        index_tar(write_tar(tmp_path / "b.tar", members[6:7]), probe_video, skip_bad=True)


def test_a_tar_that_is_cut_off_is_refused_even_so(shard):
    cut(shard, headers(shard)[4])
    with pytest.raises(UserError, match="cut off"):
        index_tar(shard, skip_bad=True)


def test_large_members_are_never_whole_in_memory(tmp_path):
    class Counting(io.FileIO):
        largest = 0

        def readinto(self, buffer):
            Counting.largest = max(Counting.largest, len(buffer))
            return super().readinto(buffer)

    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.truncate(40 << 20)  # a hole: no disk is taken
    with io.BufferedReader(Counting(path)) as file:
        hash_bytes(file, 512, 39 << 20)
    assert 0 < Counting.largest <= 1 << 20
