import json

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_index import (
    Member,
    SampleEntry,
    SampleInfo,
    ShardIndex,
    index_path,
    read_text,
    split_member,
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
    ["/k.json", "../k.json", "a/../k.json", "k.pyd", "k.0.pkl", "k", ".json", "k.mp4", "k.0.mp4.gz", "k.00.mp4", ".."],
)
def test_members_outside_the_layout_are_refused(name):
    with pytest.raises(UserError, match="shard.tar: the member"):
        split_member(name, "shard.tar")


def test_members_split_where_webdataset_splits():
    assert split_member("./a.b/k.0.MP4", "") == ("./a.b/k", "0.mp4")


@pytest.mark.parametrize(
    ("blobs", "said"),
    [
        ({"0.mp4": b""}, "no 'json'"),
        ({"json": b"[]"}, "no conversation"),
        ({"json": b"\xff"}, "no conversation"),
        ({"json": b'{"messages":[],"visuals":[{"kind":"video","member":"0.mp4"}],"answer_kinds":[]}'}, r"\['0.mp4'\]"),
    ],
)
def test_json_is_held_against_members(blobs, said):
    with pytest.raises(UserError, match=said):
        read_text(blobs, "shard.tar: sample 'k'")
