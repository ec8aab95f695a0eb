import bz2
import gzip
import io
import lzma
import random
import tarfile

import pytest

from lightning_crosslmm.shard_tar import BLOCK, Damage, Window, walk
from tests.tars import claim, cut, flip, headers, special, write_tar

MEMBERS = [(f"k{i}.{ext}", bytes([i]) * size) for i in range(3) for ext, size in (("json", 7), ("0.mp4", 1500))]


def walked(path):
    with open(path, "rb") as file:
        return list(walk(file))


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "a.tar", MEMBERS)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_tarfile_says(tmp_path, tar_format):
    names = ["a/" * 40 + "k.json", "日本語/k.0.mp4", "k.json"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + ".json", "é" * 90 + ".0.mp4"]
    members = [(name, b"x" * (700 * i)) for i, name in enumerate(names)]
    folder = special("some/folder", tarfile.DIRTYPE)
    path = write_tar(tmp_path / "a.tar", [folder, *members, special("l", tarfile.SYMTYPE, "k" * 90)], tar_format)
    with tarfile.open(path) as tar:
        expected = [(i.name, i.offset_data, i.size, i.isdir(), i.isreg()) for i in tar]
    assert [tuple(member) for member in walked(path)] == expected


def test_sizes_that_a_header_has_no_room_for_stand_in_pax_records(tmp_path):
    info = tarfile.TarInfo("k.json")
    info.pax_headers = {"size": "5"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
        tar.fileobj.write(b"12345" + bytes(BLOCK - 5))
    assert [member.size for member in walked(tmp_path / "a.tar")] == [5]


def test_files_with_holes_are_no_plain_files(tmp_path):
    info = tarfile.TarInfo("k.json")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    (member,) = walked(write_tar(tmp_path / "a.tar", [info], tarfile.PAX_FORMAT))
    assert not member.is_file


@pytest.mark.parametrize(("kind", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_tars_are_told(tar, kind, pack):
    tar.write_bytes(pack(tar.read_bytes()))
    (damage,) = walked(tar)
    assert damage.what.startswith(f"is compressed ({kind})")


@pytest.mark.parametrize("content", [b"", b"no tar" * 500, b"x" * 100])
def test_what_is_no_tar_is_told(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    (damage,) = walked(tmp_path / "a.tar")
    assert isinstance(damage, Damage) and damage.offset == 0


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("at", [0, 100, 124, 150, 257])
def test_a_damaged_header_costs_its_member_and_no_other(tar, number, at):
    start = headers(tar)[number]
    flip(tar, start + at)
    found = walked(tar)
    (damage,) = (each for each in found if isinstance(each, Damage))
    assert damage.offset == start
    names = [each.name for each in found if not isinstance(each, Damage)]
    assert names == [name for i, (name, _) in enumerate(MEMBERS) if i != number]


def test_many_damaged_headers_are_all_found(tar):
    starts = headers(tar)
    for number in (1, 2, 4):
        flip(tar, starts[number] + 3)
    found = walked(tar)
    assert [each.offset for each in found if isinstance(each, Damage)] == [starts[1], starts[4]]  # 2 follows 1 at once
    assert [each.name for each in found if not isinstance(each, Damage)] == ["k0.json", "k1.0.mp4", "k2.0.mp4"]


@pytest.mark.parametrize(
    ("number", "beyond", "said"),
    [
        (2, 0, "zeros at its end are missing"),
        (3, 0, "zeros at its end are missing"),
        (3, 100, "inside a header"),
        (3, 700, "inside the member 'k1.0.mp4'"),
        (6, 0, "zeros at its end are missing"),
        (6, BLOCK, "without the second"),
    ],
    ids=["between samples", "within a sample", "in a header", "in data", "before the end marks", "in the end marks"],
)
def test_every_cut_is_told(tar, number, beyond, said):
    cut(tar, headers(tar)[number] + beyond)
    *_, damage = walked(tar)
    assert isinstance(damage, Damage) and said in damage.what


def test_what_follows_the_end_is_told_and_read(tar):
    data = tar.read_bytes()
    tar.write_bytes(data * 2)
    found = walked(tar)
    (damage,) = (each for each in found if isinstance(each, Damage))
    assert damage.offset == headers(tar)[6] and "more follows" in damage.what
    assert len(found) == 2 * len(MEMBERS) + 1
    start = headers(tar)[2]
    tar.write_bytes(data[:start] + bytes(BLOCK) + data[start + BLOCK :])  # a hole where a header was
    assert [each.offset for each in walked(tar) if isinstance(each, Damage)] == [start]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize(
    "text", [b"", b"5", b"99 path=x\n", b"x path=y\n", b"12 path=\xff\xfe\n", b"17 size=" + b"9" * 8]
)
def test_nonsense_in_long_names_never_breaks_the_walk(tmp_path, kind, text):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, len(text)
    data = info.tobuf(tarfile.GNU_FORMAT) + text.ljust(BLOCK, b"\0") + claim("k.json", 0) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    assert walked(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(data[: 2 * BLOCK])
    assert isinstance(walked(tmp_path / "a.tar")[-1], Damage)


def test_no_damage_anywhere_in_the_headers_passes_for_a_whole_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{'n' * 120}{i}.json", b"x" * 600) for i in range(3)])
    data, whole = path.read_bytes(), walked(path)
    random_offsets = random.Random(0).sample(range(3 * 4 * BLOCK), 150)
    starts = [member.offset for member in whole]
    for offset in random_offsets:
        if any(start <= offset < start + 1024 for start in starts):
            continue  # a member's bytes: their sha256 tells
        flip(path, offset)
        assert walked(path) != whole or data[offset] == 0, offset  # padding of a long name may change
        path.write_bytes(data)


def test_a_window_is_the_member_and_no_more(tar):
    with open(tar, "rb") as file:
        _, member, *_ = walk(file)
        window = Window(file, member.offset, member.size)
        assert window.read() == MEMBERS[1][1] and window.read(1) == b""
        assert window.seek(-3, io.SEEK_END) == 1497 and window.read(10) == bytes(3)
        assert window.seek(5) == window.tell() == 5 and len(window.read(9)) == 9
        assert window.seek(2, io.SEEK_CUR) == 16 and window.seek(9999) == 9999 and window.read() == b""
