from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.video import FrameSampling, encode_video, probe_video, read_clip
from tests.clips import numbered_frames


def test_clips_of_all_shapes_in_turns_and_in_threads_look_as_each_alone():
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 48, 3), dtype=np.uint8)
    shapes = ((64, 48, "yuv420p", 32), (64, 48, "yuv444p", 32), (32, 48, "yuv420p", (20, 40)), (64, 48, "yuv420p", 48))
    four = FrameSampling("uniform", num_frames=4)
    clips = [(encode_video(noise[:, :high, :wide], 4.0, pix_fmt=pix_fmt), size) for high, wide, pix_fmt, size in shapes]

    def read(number):
        return read_clip(clips[number][0], "clip", four, clips[number][1]).frames_FCHW

    alone = []
    for number in range(len(clips)):
        with ThreadPoolExecutor(1) as fresh:  # a thread that has read nothing
            alone += fresh.map(read, [number])
    order = np.random.default_rng(1).integers(0, len(clips), 40).tolist()
    with ThreadPoolExecutor(4) as pool:
        for found in map(read, order), pool.map(read, order):
            assert all(torch.equal(frames, alone[number]) for frames, number in zip(found, order, strict=True))


def test_encoding_settings_reach_the_encoder():
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    assert probe_video(encode_video(noise, 23.976, gop=6), "c").keyframe_times_s == pytest.approx(
        [0, 0.25, 0.5, 0.75], abs=0.01
    )
    assert len(encode_video(noise, 25.0, crf=40)) < 0.5 * len(encode_video(noise, 25.0))
    assert encode_video(noise, 25.0, preset="slow") != encode_video(noise, 25.0)
    assert probe_video(encode_video(noise, 25.0, "libx265"), "c").codec == "hevc"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codec": "prores"}, "prores"),
        ({"preset": "warp"}, "warp"),
        ({"pix_fmt": "rgb999"}, "rgb999"),
        ({"fps_hz": 0}, "fps_hz"),
        ({"frames_FHWC": np.zeros((0, 8, 8, 3), np.uint8)}, r"\(0, 8, 8, 3\)"),
        ({"frames_FHWC": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
        ({"frames_FHWC": np.zeros((2, 7, 9, 3), np.uint8)}, r"\(7, 9\)"),
    ],
)
def test_encoding_mistakes_are_named(change, named):
    with pytest.raises(UserError, match=named):
        encode_video(**({"frames_FHWC": numbered_frames(2), "fps_hz": 4.0} | change))
