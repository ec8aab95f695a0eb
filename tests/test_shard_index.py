import json

import pytest
from webdataset.tariterators import base_plus_ext

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_index import (
    MAX_MEMBER_BYTES,
    Member,
    SampleEntry,
    SampleInfo,
    ShardIndex,
    index_path,
    is_read,
    split_member,
    too_large,
)
from lightning_crosslmm.video import VideoInfo

VIDEO = VideoInfo(
    duration_s=2.0,
    num_frames=50,
    fps_hz=25.0,
    height=8,
    width=8,
    rotation_deg=0,
    codec="h264",
    keyframe_times_s=(0.0, 1.1),
)
ENTRY = SampleEntry(
    "é", {"json": Member(512, 7, "ab"), "0.mp4": Member(1536, 9, "cd")}, 2.0, 50, ((0.0, 1.1),), 5, ("",)
)
INDEX = ShardIndex("shard-000000.tar", 10240, (ENTRY,))


def test_index_survives_json_and_file(tmp_path):
    assert ShardIndex.from_json(INDEX.to_json(), "x") == INDEX
    INDEX.save(tmp_path / "shard-000000.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.index.json"]
    assert index_path(tmp_path / "shard-000000.tar").read_bytes() == INDEX.to_json()


def test_facts_of_a_sample_sum_over_its_visuals():
    info = SampleInfo.of([VIDEO, None, VIDEO])
    assert (info.duration_s, info.num_frames) == (4.0, 101)
    assert info.keyframe_times_s == ((0.0, 1.1), (), (0.0, 1.1))


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"entries": [{}]}, {"num_bytes": "x"}, {"num_bytes": 100}, {"entries": 3}],
)
def test_wrong_index_is_named(change):
    with pytest.raises(UserError, match="a.index.json: not an index"):
        ShardIndex.from_json(json.dumps({**json.loads(INDEX.to_json()), **change}).encode(), "a.index.json")


@pytest.mark.parametrize(
    "name",
    ["/k.json", "../k.json", "a/../k.json", "..", "a/..", "k.pyd", "k.0.PKL", "k.pth", "k.pickle.gz", "a\nb.json"],
)
def test_members_that_lead_out_or_run_code_are_refused(name):
    with pytest.raises(UserError, match="shard.tar: the member .* is not allowed"):
        split_member(name, "shard.tar")


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("./a.b/k.0.MP4", "./a.b/k", "0.mp4"),
        ("k.mp4", "k", "mp4"),
        ("k.front.jpg", "k", "front.jpg"),
        ("k.txt", "k", "txt"),
        ("k.pydantic.json", "k", "pydantic.json"),
    ],
)
def test_members_split_where_webdataset_splits(name, key, extension):
    assert split_member(name, "") == (key, extension) == base_plus_ext(name.replace("MP4", "mp4"))


@pytest.mark.parametrize("name", ["._k.mp4", "a/.DS_Store", "README", "__meta__/k.json", "k/"])
def test_members_that_webdataset_skips_are_skipped(name):
    assert split_member(name, "") is None


@pytest.mark.parametrize(
    ("extension", "expected"),
    [(name, True) for name in ("json", "txt", "0.mp4", "mp4", "front.webp")]
    + [(name, False) for name in ("m4a", "cls", "a.json", "mp4.gz", "npy", "0.mp4.1", "a.b.mp4", "")],
)
def test_texts_and_visuals_are_read(extension, expected):
    assert is_read(extension) is expected


def test_members_have_a_largest_size():
    assert "has 2147483648 bytes" in too_large("0.mp4", 2 << 30) and not too_large("0.mp4", MAX_MEMBER_BYTES)
    assert too_large("json", MAX_MEMBER_BYTES) and not too_large("txt", 1000)
    entry = SampleEntry("k", {"0.mp4": Member(512, 2 << 30, "ab")}, 0.0, 0, (), 5, ("",))
    with pytest.raises(UserError, match="a.index.json: not an index"):
        ShardIndex.from_json(ShardIndex("a.tar", 3 << 30, (entry,)).to_json(), "a.index.json")
