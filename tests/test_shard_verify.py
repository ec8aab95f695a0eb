"""Every way in which a shard can be damaged, and that each damaged member is named, not only the first."""

import json
import tarfile

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_build import index_tar
from lightning_crosslmm.shard_files import ShardRecord, read_index
from lightning_crosslmm.shard_index import index_path
from lightning_crosslmm.shard_indexing import index_shards
from lightning_crosslmm.shard_verify import check_shard, verify_shards
from lightning_crosslmm.shards import open_shards, read_sample
from lightning_crosslmm.video import probe_video
from tests.tars import BLOCK, LLAVA, claim, clip, cut, flip, headers, special, write_tar

CLIP = clip()


@pytest.fixture
def shard(tmp_path):
    """Samples k0 to k3 of a json and an mp4 each, with an index."""
    members = [(f"k{i}.{ext}", data) for i in range(4) for ext, data in (("json", LLAVA), ("mp4", CLIP))]
    path = write_tar(tmp_path / "a.tar", members)
    index_tar(path, probe_video).index.save(path)
    return path


def found(path, record=None):
    """Key and message of each finding, the tar's name taken out of the message after it was looked for."""
    findings = check_shard(path, record).findings
    assert all(str(path.with_suffix("")) in finding.message for finding in findings)
    return [(finding.key, finding.message.replace(f"{path}: ", "")) for finding in findings]


def verify(spec, **settings):
    findings = []
    report = verify_shards(spec, findings.append, **settings)
    assert report.num_findings == len(findings)
    return report, [finding.message for finding in findings]


def test_a_whole_shard_has_no_findings(shard):
    report = check_shard(shard, ShardRecord.of(read_index(shard)))
    assert (report.findings, report.num_samples, report.num_members, report.has_index) == ([], 4, 8, True)
    assert [(visual.key, visual.member) for visual in report.visuals] == [(f"k{i}", "mp4") for i in range(4)]
    index_path(shard).unlink()
    report = check_shard(shard)
    assert (report.findings, len(report.visuals), report.has_index) == ([], 4, False)


def test_flipped_bytes_are_named_member_by_member(shard):
    entries = read_index(shard).entries
    for entry, name in ((entries[0], "mp4"), (entries[2], "json"), (entries[3], "mp4")):
        flip(shard, entry.members[name].offset + 20)
    assert found(shard) == [
        (key, f"sample '{key}', member '{name}': its {size} bytes do not have the sha256 of the index")
        for key, name, size in (("k0", "mp4", len(CLIP)), ("k2", "json", len(LLAVA)), ("k3", "mp4", len(CLIP)))
    ]
    assert [(visual.key) for visual in check_shard(shard).visuals] == ["k1", "k2"]


@pytest.mark.parametrize(
    ("number", "beyond", "lost"),
    [
        (4, 0, ["k2.json", "k2.mp4", "k3.json", "k3.mp4"]),
        (5, 0, ["k2.mp4", "k3.json", "k3.mp4"]),
        (5, 100, ["k2.mp4", "k3.json", "k3.mp4"]),
        (5, 700, ["k2.mp4", "k3.json", "k3.mp4"]),
        (8, 0, []),
    ],
    ids=["at a sample", "at a header", "inside a header", "inside a member", "at the end marks"],
)
def test_a_cut_names_every_lost_member(shard, number, beyond, lost):
    cut(shard, headers(shard)[number] + beyond)
    findings = found(shard)
    named = [message for _, message in findings if "is cut off, the tar ends at" in message]
    assert [message.split("'")[1] + "." + message.split("'")[3] for message in named] == lost
    assert any(f"is cut off {what}" in message for _, message in findings for what in ("inside", "(the"))
    assert any("bytes, but its index was made of" in message for _, message in findings)


def test_damaged_headers_are_named_and_those_behind_them_are_read(shard):
    starts = headers(shard)
    flip(shard, starts[0] + 5)
    flip(shard, starts[5] + 150)
    flip(shard, starts[5] + BLOCK + 50)
    messages = [message for _, message in found(shard)]
    assert messages[0].startswith("is not a tar, or its first header is damaged, at byte 0")
    assert f"after the sample 'k2', at byte {starts[5]}; copy" in messages[1] and "has a damaged header" in messages[1]
    assert messages[2:] == [
        "sample 'k0', member 'json': its bytes are right, but its header is damaged",
        f"sample 'k2', member 'mp4': its {len(CLIP)} bytes do not have the sha256 of the index",
    ]


def test_the_same_size_with_another_content_is_found_here_and_on_reading(shard):
    before = index_path(shard).read_bytes()
    entry = read_index(shard).entries[1]
    members = [(f"k{i}.{ext}", data) for i in range(4) for ext, data in (("json", LLAVA), ("mp4", CLIP[::-1]))]
    write_tar(shard, members)
    assert index_path(shard).read_bytes() == before and read_index(shard).entries[1] == entry
    assert [key for key, message in found(shard) if "sha256" in message] == ["k0", "k1", "k2", "k3"]
    with pytest.raises(UserError, match=r"a\.tar: sample 'k1', member 'mp4': its \d+ bytes do not have the sha256"):
        read_sample(shard, entry)


def test_an_index_older_than_its_shard_is_told(shard):
    write_tar(shard, [("k0.json", LLAVA), ("k0.mp4", CLIP + b"x" * BLOCK), ("k1.json", LLAVA), ("k1.mp4", CLIP)])
    messages = dict(found(shard))
    assert "bytes, but its index was made of" in messages[""]
    assert f"lies at byte 1536 with {len(CLIP) + BLOCK}, the index says byte 1536 with {len(CLIP)}" in messages["k0"]
    assert "k3" in messages
    with pytest.raises(UserError, match="delete the index"):
        read_index(shard)


def test_without_an_index_texts_and_visuals_are_held_against_each_other(tmp_path):
    members = [
        ("a.json", LLAVA),
        ("b.mp4", CLIP),
        ("c.json", b"{"),
        ("c.mp4", CLIP),
        ("d.json", LLAVA),
        ("d.mp4", CLIP),
    ]
    messages = found(write_tar(tmp_path / "a.tar", members))
    assert [key for key, _ in messages] == ["a", "b", "c"]
    for (_, message), said in zip(messages, ("1 <video> mark(s)", "neither 'json' nor 'txt'", "not JSON"), strict=True):
        assert said in message


def test_what_is_not_allowed_is_named_one_by_one(tmp_path):
    members = [
        ("a.json", LLAVA),
        ("a.mp4", CLIP),
        ("../b.json", LLAVA),
        ("/c.json", LLAVA),
        ("a.pyd", b"x"),
        special("d.json", tarfile.SYMTYPE, "/etc/passwd"),
        ("a.json", LLAVA),
    ]
    messages = [message for _, message in found(write_tar(tmp_path / "a.tar", members))]
    for message, said in zip(messages, ("'../b.json'", "'/c.json'", "'a.pyd'", "is a link", "twice"), strict=True):
        assert said in message


def test_a_member_of_2_gb_is_named_and_those_behind_it_are_read(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(claim("a.json", 0) + claim("a.mp4", 2 << 30))
        file.seek(2 << 30, 1)  # a hole: no disk is taken
        file.write(claim("b.json", 0) + bytes(2 * BLOCK))
    messages = found(path)
    assert [key for key, _ in messages] == ["a", "a", "b"]
    assert "the member 'a.mp4' has 2147483648 bytes, and 1073741824 are allowed" in messages[0][1]


def test_an_index_that_is_none_and_a_manifest_that_disagrees(shard):
    record = ShardRecord.of(read_index(shard))
    assert "is not the index that shards.json names" in found(shard, record._replace(index_sha256="ab"))[0][1]
    assert "is not the index that shards.json names" in found(shard, record._replace(num_samples=5))[0][1]
    index_path(shard).write_text("{}")
    assert "not an index of a shard" in found(shard)[0][1]
    index_path(shard).unlink()
    assert "is not there, but shards.json names it" in found(shard, record)[0][1]


def test_members_that_an_index_lacks(shard):
    index = json.loads(index_path(shard).read_text())
    del index["entries"][1]["members"]["mp4"], index["entries"][0]
    index_path(shard).write_text(json.dumps(index))
    assert found(shard) == [("k1", "sample 'k1', member 'mp4': is not in the index")]
    assert check_shard(shard).num_unlisted == 1


def test_a_folder_is_held_against_its_manifest(tmp_path):
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"{name}.tar", [("k.json", LLAVA), ("k.mp4", CLIP)])
    index_shards(tmp_path)
    report, messages = verify(tmp_path)
    assert (report.num_shards, report.num_samples, report.num_members, messages) == (3, 3, 6, [])
    assert report.num_bytes == 3 * (tmp_path / "a.tar").stat().st_size and report.unindexed == []
    (tmp_path / "b.tar").rename(tmp_path / "d.tar")
    flip(tmp_path / "c.tar", 2000)
    report, messages = verify(tmp_path, num_workers=2)
    for message, said in zip(
        messages,
        ("b.tar: is not there, but shards.json", "d.tar: is not in shards.json", "c.tar: sample 'k', member 'mp4'"),
        strict=True,
    ):
        assert f"{tmp_path}/{said}" in message
    assert report.unindexed == [tmp_path / "d.tar"]
    assert len(verify(tmp_path / "a.tar")[1]) == 0  # not asked: what else is wrong in its folder
    (tmp_path / "shards.json").write_text("[]")
    (tmp_path / "shards.json.partial").touch()
    assert ["did not finish" in verify(tmp_path)[1][0], "not a list of shards" in verify(tmp_path)[1][1]] == [True] * 2


def test_specs_that_name_nothing_are_a_users_mistake(tmp_path):
    for spec, said in (
        (tmp_path, "holds no .tar file"),
        (tmp_path / "a.tar", "there is no shard"),
        ("pipe:cat a.tar", "is not opened"),
        (f"{tmp_path}/{{a,b}}.tar", "there is no shard"),
        ("s3://bucket/a.tar", "lies in a store"),
    ):
        with pytest.raises(UserError, match=said):
            verify(spec)
        with pytest.raises(UserError, match=said):
            index_shards(spec)
        if said != "lies in a store":
            with pytest.raises(UserError, match=said):
                open_shards(spec)
    with pytest.raises(UserError, match="timeout_s must be above 0, got 0"):
        verify(tmp_path, timeout_s=0)
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="workers must be at least 1, got 0"):
        verify(tmp_path, num_workers=0)


def test_decoding_finds_what_no_checksum_can(tmp_path):
    at = len(CLIP) // 2
    broken = CLIP[:at] + bytes(300) + CLIP[at + 300 :]
    members = [("a.json", LLAVA), ("a.mp4", CLIP), ("b.json", LLAVA), ("b.mp4", broken)]
    members += [("c.txt", b"a cat"), ("c.jpg", b"no picture"), ("d.json", LLAVA), ("d.mp4", CLIP[:-300])]
    path = write_tar(tmp_path / "a.tar", members)
    assert verify(path)[1] == []
    assert [message.split("'")[1] for message in verify(path, decode=True)[1]] == ["b", "c", "d"]


def test_a_clip_whose_decoding_does_not_end_is_given_up_on(tmp_path):
    members = [("a.json", LLAVA), ("a.mp4", clip(1200)), ("b.json", LLAVA), ("b.mp4", clip(1))]
    report, messages = verify(write_tar(tmp_path / "a.tar", members), decode=True, timeout_s=0.01)
    assert messages[0].endswith("a.tar: sample 'a', member 'mp4': decoding it did not end within 0.01 s")
    assert report.num_samples == 2
