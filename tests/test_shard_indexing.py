import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_crosslmm.conversation_members import conversation_of
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pack import pack
from lightning_crosslmm.shard_build import build_index
from lightning_crosslmm.shard_files import read_index
from lightning_crosslmm.shard_index import index_path
from lightning_crosslmm.shard_indexing import index_shards
from lightning_crosslmm.shards import open_shards
from lightning_crosslmm.video import FrameSampling, probe_video, read_clip
from tests.tars import LLAVA, clip, cut, flip, write_tar

ROOT = Path(__file__).parents[1]
CLIP = clip()


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        write_tar(
            tmp_path / f"{name}.tar",
            [(f"{name}{i}.{e}", d) for i in range(2) for e, d in (("json", LLAVA), ("mp4", CLIP))],
        )
    return tmp_path


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_a_folder_of_others_opens_like_ours(folder):
    report = index_shards(folder, num_workers=2)
    assert (report.num_shards, report.num_samples, report.num_kept) == (3, 6, 0)
    assert (report.skipped, report.left_out, report.failed) == ((), {}, ())
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.{kind}" for name in "abc" for kind in ("tar", "index.json")),
        "shards.json",
    }
    shards = open_shards(folder)
    assert shards.num_samples == (2, 2, 2)
    assert shards.index(1) == build_index(folder / "b.tar", probe_video)
    entry = shards.index(1).entries[1]
    blobs = shards.read(1, entry)
    conversation = conversation_of(entry.key, blobs, "b.tar")
    (visual,) = conversation.visuals
    shown = read_clip(blobs[visual.path], entry.key, FrameSampling(num_frames=3), 16)
    assert len(shown.frames_FCHW) == 3 and entry.num_frames == 6


def test_indexes_that_fit_are_kept(folder):
    index_shards(folder)
    before = stamps(folder)
    assert index_shards(folder).num_kept == 3
    assert {**stamps(folder), "shards.json": 0} == {**before, "shards.json": 0}
    assert index_shards(folder, overwrite=True).num_kept == 0
    assert all(stamps(folder)[name] > stamp for name, stamp in before.items())


@pytest.mark.parametrize("stale", ["broken", "older", "other size", "without durations"])
def test_indexes_that_do_not_fit_are_written_anew(folder, stale):
    index_shards(folder)
    path, right = folder / "b.tar", index_path(folder / "b.tar").read_bytes()
    if stale == "broken":
        index_path(path).write_bytes(right[:-100])
    elif stale == "older":
        later = time.time() + 10
        os.utime(path, (later, later))
        index_path(path).write_bytes(right.replace(b'"num_frames":6', b'"num_frames":7'))
    elif stale == "other size":
        index_path(path).write_bytes(index_path(folder / "a.tar").read_bytes())
    else:
        build_index(path).save(path)
    assert index_shards(folder).num_kept == 2
    assert index_path(path).read_bytes() == right


def test_a_manifest_comes_with_the_last_index(folder):
    index_shards(folder / "a.tar")
    assert not (folder / "shards.json").exists() and index_path(folder / "a.tar").exists()
    report = index_shards(f"{folder}/{{b,c}}.tar")
    assert report.num_samples == 4 and open_shards(folder).num_samples == (2, 2, 2)


def test_a_shard_that_fails_keeps_no_other_from_its_index(folder):
    cut(folder / "b.tar", 1000)
    report = index_shards(folder)
    (failed,) = report.failed
    assert f"{folder / 'b.tar'}: is cut off" in failed and report.num_shards == 2
    assert index_path(folder / "c.tar").exists() and not index_path(folder / "b.tar").exists()
    assert not (folder / "shards.json").exists()


def test_damaged_samples_are_listed_and_left_out_when_asked(folder):
    flip(folder / "b.tar", 512)  # the first byte of a json
    (failed,) = index_shards(folder).failed
    assert "b.tar: sample 'b0': the member 'json': not JSON" in failed
    report = index_shards(folder, skip_bad=True)
    assert (report.skipped, report.num_samples, report.num_kept, report.failed) == ((failed,), 5, 2, ())
    assert open_shards(folder).num_samples == (2, 1, 2)


def test_a_folder_that_is_being_written_is_left_alone(folder):
    (folder / "shards.json.partial").touch()
    with pytest.raises(UserError, match="did not finish"):
        index_shards(folder)


def test_an_index_killed_at_any_moment_is_gone_on_with(folder):
    code = f"from lightning_crosslmm.shard_indexing import index_shards; index_shards({str(folder)!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        while process.poll() is None and not index_path(folder / "a.tar").exists():
            time.sleep(0.001)
        process.kill()
    for path in folder.glob("*.index.json"):
        assert read_index(path.with_name(path.name.replace(".index.json", ".tar"))).entries
    assert index_shards(folder).num_kept >= 1
    assert open_shards(folder).num_samples == (2, 2, 2)


def test_shards_of_our_own_keep_index_and_manifest_to_the_byte(tmp_path):
    (tmp_path / "x.mp4").write_bytes(CLIP)
    (tmp_path / "data.json").write_bytes(b"[" + LLAVA.replace(b"clips/", b"") + b"]")
    pack(tmp_path / "data.json", tmp_path, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert index_shards(tmp_path / "out").num_kept == 1
    assert index_shards(tmp_path / "out", overwrite=True).num_kept == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
