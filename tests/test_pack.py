import json
from pathlib import Path

import numpy as np
import pytest

from lightning_crosslmm.conversation import Conversation
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pack import pack
from lightning_crosslmm.shards import open_shards, read_sample
from lightning_crosslmm.video import encode_video

MEDIA = Path(__file__).parents[2] / "shared" / "media"
ANSWER = {"from": "gpt", "value": "Yes."}


def entry(name, **visuals):
    marks = "".join(f"<{field.rstrip('s')}>\n" for field, paths in visuals.items() for _ in paths)
    return {"id": name, **visuals, "conversations": [{"from": "human", "value": f"{marks}Is it?"}, ANSWER]}


def place(tmp_path, *entries):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    frames_FHWC = np.random.default_rng(0).integers(0, 255, (10, 32, 48, 3), dtype=np.uint8)
    (folder / "a.mp4").write_bytes(encode_video(frames_FHWC, 5.0))
    (folder / "deep" / "b.mp4").write_bytes(encode_video(frames_FHWC[:4], 8.0))
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:-900])
    (folder / "bad.png").write_bytes(b"\x89PNG no picture")
    return folder


def test_packed_samples_hold_the_files_and_their_facts(tmp_path, clips):
    data = place(tmp_path, entry("one", videos=["a.mp4"]), entry("two", videos=["deep/b.mp4", "a.mp4"]), entry("text"))
    report = pack(data, clips, tmp_path / "out", samples_per_shard=2)
    assert (report.num_samples, report.num_shards, report.skipped) == (3, 2, ())
    shards = open_shards(tmp_path / "out")
    assert report.num_bytes == sum(path.stat().st_size for path in shards.paths)
    one, two = shards.index(0).entries
    assert one.duration_s == pytest.approx(2.0, abs=0.1) and one.num_frames == 10
    assert two.num_frames == 14 and len(two.keyframe_times_s) == 2
    (text,) = shards.index(1).entries
    assert (set(text.members), text.num_frames, text.duration_s) == ({"json"}, 0, 0.0)
    blobs = read_sample(shards.paths[0], two)
    assert blobs["0.mp4"] == (clips / "deep" / "b.mp4").read_bytes()
    assert blobs["1.mp4"] == (clips / "a.mp4").read_bytes()
    conversation = Conversation.from_json(blobs["json"], str(shards.paths[0]), two.key)
    assert [visual.path for visual in conversation.visuals] == ["0.mp4", "1.mp4"]


@pytest.mark.parametrize("bad", [{"videos": ["cut.mp4"]}, {"videos": ["gone.mp4"]}, {"images": ["bad.png"]}])
def test_bad_file_stops_or_is_listed(tmp_path, clips, bad):
    data = place(tmp_path, entry("good", videos=["a.mp4"]), entry("bad one", **bad))
    (path,) = next(iter(bad.values()))
    with pytest.raises(UserError) as error:
        pack(data, clips, tmp_path / "out")
    assert str(clips / path) in str(error.value) and "conversation 'bad_one'" in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []
    report = pack(data, clips, tmp_path / "out", on_bad="skip")
    assert report.num_samples == 1
    ((key, reason),) = report.skipped
    assert key == "bad_one" and path in reason
    assert [e.key for e in open_shards(tmp_path / "out").index(0).entries] == ["good"]


def test_nothing_left_is_an_error(tmp_path, clips):
    with pytest.raises(UserError, match=r"data\.json: none of 1 conversations.*gone\.mp4"):
        pack(place(tmp_path, entry("x", videos=["gone.mp4"])), clips, tmp_path / "out", on_bad="skip")


@pytest.mark.parametrize("path", ["../clips/a.mp4", "deep/../a.mp4", "/clips/a.mp4", "http://host/a.mp4"])
def test_paths_out_of_the_folder_are_refused_even_when_skipping(tmp_path, clips, path):
    with pytest.raises(UserError, match="conversation 'x': the path .* leads out of"):
        pack(place(tmp_path, entry("x", videos=[path])), clips, tmp_path / "out", on_bad="skip")
    assert not (tmp_path / "out").exists()


def test_settings_are_checked_and_shards_kept(tmp_path, clips):
    data = place(tmp_path, entry("one", videos=["a.mp4"]))
    with pytest.raises(UserError, match="on_bad: 'skp' .*did you mean 'skip'"):
        pack(data, clips, tmp_path / "out", on_bad="skp")
    with pytest.raises(UserError, match="video_dir: there is no folder"):
        pack(data, clips / "none", tmp_path / "out")
    pack(data, clips, tmp_path / "out")
    with pytest.raises(UserError, match="already holds shards"):
        pack(data, clips, tmp_path / "out")
    assert pack(data, clips, tmp_path / "out", overwrite=True).num_samples == 1


@pytest.mark.skipif(not MEDIA.is_dir(), reason="the real clips of shared/media are not here")
def test_real_clips_pack_and_the_truncated_one_is_listed(tmp_path):
    entries = json.loads((MEDIA / "conversations.json").read_text())
    data = place(tmp_path, *entries, entry("cut", videos=["truncated.mp4"]))
    with pytest.raises(UserError, match=r"truncated\.mp4 \(conversation 'cut'\)"):
        pack(data, MEDIA, tmp_path / "out")
    report = pack(data, MEDIA, tmp_path / "out", on_bad="skip")
    assert report.num_samples == len(entries) and [key for key, _ in report.skipped] == ["cut"]
    durations_s = {e.key: e.duration_s for e in open_shards(tmp_path / "out").index(0).entries}
    assert durations_s["nasa_13013"] == pytest.approx(13.0, abs=0.1)
