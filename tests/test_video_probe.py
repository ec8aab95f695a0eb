import io

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_tar import Window
from lightning_crosslmm.video_probe import check_visual, probe_video
from tests.clips import encode_image, mux, numbered_frames
from tests.tars import clip

PNG = encode_image(numbered_frames(1)[0], "png", "rgb24")


@pytest.mark.parametrize("fmt", ["mp4", "matroska", "mpegts"])
def test_a_file_within_a_file_is_probed_like_one_of_its_own(tmp_path, fmt):
    data = mux(tmp_path / "clip", range(0, 2400, 40), fmt).read_bytes()
    outer = io.BytesIO(b"x" * 700 + data + b"y" * 9000)
    assert probe_video(Window(outer, 700, len(data)), "clip") == probe_video(data, "clip")
    check_visual(Window(outer, 700, len(data)), "clip", "video")
    if fmt != "mpegts":  # which does not tell how long it is to be
        with pytest.raises(UserError, match="^clip: "):
            probe_video(Window(outer, 700, len(data) // 2), "clip")


def test_all_of_a_clip_is_decoded():
    data = clip(30)
    check_visual(data, "clip", "video")
    check_visual(PNG, "picture", "image")
    for at in (len(data) // 3, len(data) // 2, len(data) - 1500):
        broken = data[:at] + bytes(300) + data[at + 300 :]
        with pytest.raises(UserError, match="^clip: "):
            check_visual(broken, "clip", "video")
    with pytest.raises(UserError, match="^clip: "):
        check_visual(data[:-200], "clip", "video")


@pytest.mark.parametrize(("data", "kind"), [(PNG[:60], "image"), (PNG, "video"), (clip(1), "image"), (b"", "video")])
def test_what_is_no_visual_of_its_kind_is_told(data, kind):
    with pytest.raises(UserError, match="^it: "):
        check_visual(data, "it", kind)
