import io
import logging
import tarfile
from types import SimpleNamespace

import pytest

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_files import build_index, find_index, read_index, read_sample
from lightning_crosslmm.shard_index import index_path

JSON = Conversation(
    "k", (Message("user", "<video>?"), Message("assistant", "yes")), (Visual("video", "v.mp4"),), ("what",)
).to_json()
CLIP = bytes(range(256)) * 3


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path):
    members = [(f"k{i}.{ext}", data) for i in range(3) for ext, data in (("0.mp4", CLIP), ("json", JSON))]
    return write_tar(tmp_path / "others.tar", members)


def test_index_of_a_tar_that_others_wrote(shard):
    def probe(data, name):
        assert data == CLIP and "'k" in name
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


def test_tar_without_index_is_read_with_a_warning(shard, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(find_index(shard).entries) == 3
    assert f"{shard} has no index" in caplog.text
    assert not index_path(shard).exists()


def ends(shard):
    with tarfile.open(shard) as tar:
        return [info.offset for info in tar]


@pytest.mark.parametrize(
    "place", ["between samples", "within a sample", "in a header", "in data", "before the end marks"]
)
def test_cut_tar_is_refused_wherever_it_is_cut(shard, place):
    offsets = ends(shard)
    last = offsets[5] + 512 + 512
    cut = {
        "between samples": offsets[2],
        "within a sample": offsets[3],
        "in a header": offsets[3] + 100,
        "in data": offsets[4] + 700,
        "before the end marks": last,
    }[place]
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"others\.tar"):
        build_index(shard)


def test_damaged_header_in_the_middle_is_refused(shard):
    data = bytearray(shard.read_bytes())
    data[ends(shard)[2] + 150] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match="damaged after the sample 'k0'"):
        build_index(shard)


def test_two_tars_in_one_file_are_refused(shard):
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(UserError, match="damaged after the sample 'k2'"):
        build_index(shard)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("k.json", JSON), ("k.0.pyd", b"x")], "k.0.pyd"),
        ([("../k.json", JSON)], "'../k.json'"),
        ([("/k.json", JSON)], "'/k.json'"),
        ([("k.json", JSON)], "names the visuals"),
        ([("k.0.mp4", CLIP)], "no 'json'"),
        ([("k.json", JSON), ("k.json", JSON)], "stands twice"),
        ([("k.json", JSON), ("k.0.mp4", CLIP), ("l.json", JSON), ("l.0.mp4", CLIP), ("k.1.mp4", CLIP)], "stands twice"),
        ([], "holds no sample"),
    ],
)
def test_tar_with_anything_else_is_refused(tmp_path, members, said):
    with pytest.raises(UserError, match=said) as error:
        build_index(write_tar(tmp_path / "a.tar", members))
    assert "a.tar" in str(error.value)


def test_links_and_foreign_files_are_refused(tmp_path):
    link = tmp_path / "link.tar"
    with tarfile.open(link, "w") as tar:
        info = tarfile.TarInfo("k.json")
        info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"link\.tar: the member 'k\.json' is a link"):
        build_index(link)
    (tmp_path / "text.tar").write_text("no tar" * 500)
    with pytest.raises(UserError, match=r"text\.tar: cannot be read"):
        build_index(tmp_path / "text.tar")
    with pytest.raises(UserError, match=r"none\.tar: cannot be read"):
        build_index(tmp_path / "none.tar")


def test_index_of_another_tar_names_both(shard):
    build_index(shard).save(shard)
    with open(shard, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError) as error:
        read_index(shard)
    assert str(shard) in str(error.value) and str(index_path(shard)) in str(error.value)


def test_changed_bytes_name_shard_key_and_member(shard):
    entry = build_index(shard).entries[1]
    data = bytearray(shard.read_bytes())
    data[entry.members["0.mp4"].offset + 5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"others\.tar: sample 'k1', member '0\.mp4'"):
        read_sample(shard, entry)
    shard.write_bytes(data[: entry.members["json"].offset])
    with pytest.raises(UserError, match="sample 'k1'"):
        read_sample(shard, entry)
    shard.unlink()
    with pytest.raises(UserError, match=r"others\.tar: sample 'k1' cannot be read"):
        read_sample(shard, entry)
