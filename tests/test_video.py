from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lightning_crosslmm import video_file
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.video import FrameSampling, encode_video, probe_video, read_clip, read_image
from tests.clips import EIGHT, FrameSamplingAt, encode_image, mux, numbered_frames, numbers, refused

MEDIA = Path(__file__).parents[2] / "shared" / "media"


# -- which moments ------------------------------------------------------------------------------------------------


def test_uniform_takes_the_middles_of_equal_parts():
    assert FrameSampling("uniform", num_frames=4).times_s(8.0) == [1.0, 3.0, 5.0, 7.0]
    assert FrameSampling("uniform", num_frames=2).times_s(4.0, start_s=10.0) == [11.0, 13.0]


def test_rate_steps_from_the_start_until_the_cap_spreads_it():
    sampling = FrameSampling("rate", rate_hz=2, max_frames=6)
    assert sampling.times_s(2.0) == [0.0, 0.5, 1.0, 1.5]
    assert sampling.times_s(0.1, start_s=3.0) == [3.0]
    assert sampling.times_s(12.0) == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "unifrom", "num_frames": 8}, "did you mean 'uniform'"),
        ({"mode": "uniform"}, "num_frames: .* got None"),
        ({"mode": "uniform", "num_frames": 0}, "num_frames: .* got 0"),
        ({"mode": "uniform", "num_frames": 8.5}, "num_frames: .* got 8.5"),
        ({"mode": "uniform", "num_frames": True}, "num_frames: .* got True"),
        ({"mode": "uniform", "num_frames": 8, "rate_hz": 1.0}, "rate_hz: 1.0 has no effect"),
        ({"mode": "rate", "rate_hz": 1.0}, "max_frames: .* got None"),
        ({"mode": "rate", "rate_hz": float("nan"), "max_frames": 4}, "rate_hz: .* got nan"),
        ({"mode": "rate", "rate_hz": 1.0, "max_frames": 4, "num_frames": 8}, "num_frames: 8 has no effect"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        FrameSampling(**settings)


# -- which frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_uniform_and_rate_return_the_frames_on_screen(codec):
    video = encode_video(numbered_frames(40), 10.0, codec, preset="medium")
    clip = read_clip(video, "clip", EIGHT)
    assert numbers(clip) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert clip.frame_time_s_F.dtype == torch.float32
    assert clip.frame_time_s_F.tolist() == pytest.approx([0.2, 0.7, 1.2, 1.7, 2.2, 2.7, 3.2, 3.7])
    assert numbers(read_clip(video, "clip", FrameSampling("rate", rate_hz=2.5, max_frames=99))) == list(range(0, 40, 4))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_keyframes_gives_the_nearest_ones_at_their_own_times(codec):
    video = encode_video(numbered_frames(40), 10.0, codec, preset="medium", gop=8)
    keys = [round(10 * time_s) for time_s in probe_video(video, "clip").keyframe_times_s]
    assert len(keys) > 4
    clip = read_clip(video, "clip", FrameSampling("keyframes", num_frames=8))
    nearest = [
        min(keys, key=lambda key, t=wanted: abs(key - t)) for wanted in (2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 32.5, 37.5)
    ]
    assert numbers(clip) == nearest
    assert clip.frame_time_s_F.tolist() == pytest.approx([key / 10 for key in nearest])


@pytest.mark.parametrize(("fmt", "codec"), [("matroska", "libx264"), ("mpegts", "libx264"), ("webm", "libvpx-vp9")])
def test_keyframes_in_other_containers(tmp_path, fmt, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    options = {"deadline": "realtime", "cpu-used": "8", "b": "1M"} if "vpx" in codec else {"preset": "medium"}
    path = mux(tmp_path / "clip", range(0, 2400, 40), fmt, codec, options | {"g": "10"})
    keys = probe_video(path, "clip").keyframe_times_s
    clip = read_clip(path, "clip", FrameSampling("keyframes", num_frames=4))
    assert len(keys) > 3 and clip.frame_time_s_F.tolist() == pytest.approx(
        [min(keys, key=lambda key, t=wanted: abs(key - t)) for wanted in (0.3, 0.9, 1.5, 2.1)], abs=2e-3
    )


def test_keyframes_decodes_nothing_between_them(monkeypatch):
    video = encode_video(numbered_frames(60), 10.0, preset="medium", gop=20)
    decoded = []
    plain = video_file.VideoFile._keyframe_at
    monkeypatch.setattr(
        video_file.VideoFile, "_keyframe_at", lambda file, pts, goal: decoded.append(pts) or plain(file, pts, goal)
    )
    clip = read_clip(video, "clip", FrameSampling("keyframes", num_frames=30))
    assert len(clip.frames_FCHW) == 30 and len(decoded) == len(set(numbers(clip))) == 3


def test_path_and_bytes_read_alike(tmp_path):
    video = encode_video(numbered_frames(8), 4.0)
    (tmp_path / "clip.mp4").write_bytes(video)
    from_path = read_clip(tmp_path / "clip.mp4", "clip", EIGHT)
    assert torch.equal(from_path.frames_FCHW, read_clip(video, "clip", EIGHT).frames_FCHW)


@pytest.mark.parametrize(("fmt", "codec"), [("webm", "libvpx-vp9"), ("matroska", "libsvtav1"), ("mp4", "libsvtav1")])
def test_vp9_and_av1(tmp_path, fmt, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    options = {"deadline": "realtime", "cpu-used": "8", "b": "1M"} if "vpx" in codec else {"preset": "12", "crf": "20"}
    path = mux(tmp_path / "clip", range(0, 2400, 40), fmt, codec, options)
    assert numbers(read_clip(path, "clip", FrameSampling("uniform", num_frames=6))) == [5, 15, 25, 35, 45, 55]


@pytest.mark.parametrize(
    ("fmt", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": "3"}),
        ("matroska", "libx264", {"bf": "3"}),
        ("mpegts", "libx264", {"bf": "3"}),
        ("mp4", "libx265", {}),
        ("flv", "libx264", {"bf": "0"}),  # its header tells a B-frame's delay as length
        ("avi", "mpeg4", {"b": "9M"}),
    ],
)
def test_sparse_sampling_equals_full_decoding(tmp_path, fmt, codec, options):
    path = mux(tmp_path / "clip", range(60), fmt, codec, options, Fraction(1, 25))
    every = read_clip(path, "clip", FrameSampling("uniform", num_frames=60))
    assert numbers(every) == list(range(60))
    for count in (1, 3, 7, 20):
        sparse = read_clip(path, "clip", FrameSampling("uniform", num_frames=count))
        expected = [int((i + 0.5) * 60 / count) for i in range(count)]
        assert numbers(sparse) == expected
        assert torch.equal(sparse.frames_FCHW, every.frames_FCHW[expected])


@pytest.mark.parametrize("fmt", ["mp4", "matroska"])
def test_variable_frame_rate(tmp_path, fmt):
    pts_ms = [0, 40, 80, 1000, 1040, 3000, 3900, 4000]
    path = mux(tmp_path / "clip", pts_ms, fmt)
    info = probe_video(path, "clip")
    assert info.num_frames == 8
    sampling = FrameSampling("rate", rate_hz=2, max_frames=99)
    shown = [max(i for i, pts in enumerate(pts_ms) if pts <= t * 1000) for t in sampling.times_s(info.duration_s)]
    assert numbers(read_clip(path, "clip", sampling)) == shown


@pytest.mark.parametrize("fmt", ["mp4", "matroska", "mpegts"])
def test_time_counts_from_the_first_frame(tmp_path, fmt):
    path = mux(tmp_path / "clip", range(5000, 7400, 40), fmt)
    info = probe_video(path, "clip")
    assert info.duration_s == pytest.approx(2.4, abs=0.05)
    assert info.keyframe_times_s[0] == 0
    clip = read_clip(path, "clip", FrameSampling("uniform", num_frames=6))
    assert numbers(clip) == [5, 15, 25, 35, 45, 55]
    assert clip.frame_time_s_F.tolist() == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8, 2.2], abs=2e-3)


def test_sound_longer_than_the_video_neither_stretches_nor_breaks_it(tmp_path):
    for fmt in ("mp4", "matroska"):
        path = mux(tmp_path / fmt, range(0, 2000, 40), fmt, audio_s=4.0)
        assert probe_video(path, fmt).duration_s == pytest.approx(2.0, abs=0.05)
        assert numbers(read_clip(path, fmt, FrameSampling("uniform", num_frames=5))) == [5, 15, 25, 35, 45]
        assert numbers(read_clip(path, fmt, FrameSamplingAt(3.5))) == [49]


def test_fewer_frames_than_moments_repeats_what_is_on_screen():
    clip = read_clip(encode_video(numbered_frames(2), 1.0), "clip", FrameSampling("uniform", num_frames=6))
    assert numbers(clip) == [0, 0, 0, 1, 1, 1]
    assert clip.frame_time_s_F.tolist() == [0, 0, 0, 1, 1, 1]


# -- probing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["mp4", "matroska", "mpegts"])
def test_probe_counts_frames_and_finds_keyframes(tmp_path, fmt):
    path = mux(tmp_path / "clip", range(60), fmt, options={"sc_threshold": "0"}, time_base=Fraction(1, 25))
    info = probe_video(path, "clip")
    assert (info.num_frames, info.height, info.width, info.rotation_deg, info.codec) == (60, 64, 64, 0, "h264")
    assert info.fps_hz == pytest.approx(25) and info.duration_s == pytest.approx(2.4, abs=0.05)
    assert info.keyframe_times_s == pytest.approx([0, 0.48, 0.96, 1.44, 1.92], abs=2e-3)


# -- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("png", "rgb24"), ("png", "gray"), ("png", "rgba"), ("mjpeg", "yuvj444p"), ("libwebp", "yuv420p")],
)
def test_images(codec, pix_fmt, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    picture = np.full((48, 32, 3), 120, np.uint8)
    picture[:24] = 200
    blob = encode_image(picture, codec, pix_fmt)
    (tmp_path / "picture").write_bytes(blob)
    for source in (blob, tmp_path / "picture"):
        clip = read_image(source, "picture")
        assert clip.frames_FCHW.shape == (1, 3, 48, 32) and clip.frame_time_s_F.tolist() == [0.0]
        assert np.abs(clip.frames_FCHW[0].permute(1, 2, 0).numpy().astype(int) - picture).mean() < 2
    assert read_image(blob, "picture", 16).frames_FCHW.shape == (1, 3, 16, 16)


def test_camera_orientation_of_a_photograph_is_obeyed():
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 255
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6: turn clockwise
    jpeg = encode_image(picture, "mjpeg", "yuvj444p")
    jpeg = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    upright = read_image(jpeg, "photo").frames_FCHW[0]
    assert upright.shape == (3, 64, 32)
    assert upright[:, :30].min() > 240 and upright[:, 34:].max() < 15


def test_damaged_images_and_videos_in_their_place_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    png, jpeg = encode_image(noise, "png", "rgb24"), encode_image(noise, "mjpeg", "yuvj444p")
    for blob in (
        png[: len(png) // 2],
        jpeg[: len(jpeg) // 2],
        b"",
        b"words " * 99,
        encode_video(numbered_frames(2), 1.0),
    ):
        with pytest.raises(UserError, match="shard 3, picture 7"):
            read_image(blob, "shard 3, picture 7")
    with pytest.raises(UserError, match="photo"):
        read_clip(png, "photo", EIGHT)


# -- real clips ---------------------------------------------------------------------------------------------------

REAL = {  # name: frames, height, width, codec
    "nasa_13013.mp4": (325, 180, 320, "h264"),
    "drummer.mp4": (146, 360, 640, "h264"),
    "h265_video.mp4": (10, 128, 128, "hevc"),
    "av1_video.mkv": (125, 360, 640, "av1"),
    "testsrc2_vp9.webm": (30, 720, 1280, "vp9"),
}


@pytest.mark.parametrize("file_name", REAL)
def test_real_clips_sampled_sparsely_equal_full_decoding(file_name):
    if not MEDIA.is_dir():
        pytest.skip(f"no folder of real clips at {MEDIA}")
    info = probe_video(MEDIA / file_name, file_name)
    assert (info.num_frames, info.height, info.width, info.codec) == REAL[file_name]
    clip = read_clip(MEDIA / file_name, file_name, EIGHT, 64)
    with av.open(str(MEDIA / file_name)) as container:
        times_s = [frame.time for frame in container.decode(video=0)]
    wanted_s = EIGHT.times_s(info.duration_s)
    expected = [max(t for t in times_s if t <= wanted + 5e-4) for wanted in wanted_s]
    assert clip.frame_time_s_F.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({frame.numpy().tobytes() for frame in clip.frames_FCHW}) == 8


def test_a_real_clip_cut_in_transfer_is_refused():
    if not MEDIA.is_dir():
        pytest.skip(f"no folder of real clips at {MEDIA}")
    refused(MEDIA / "truncated.mp4")
    with pytest.raises(UserError, match="truncated.mp4"):
        probe_video(MEDIA / "truncated.mp4", "truncated.mp4")


def test_moments_shift_by_a_part_of_the_step_between_them():
    uniform = FrameSampling("uniform", num_frames=4)
    assert uniform.times_s(8.0, offset=0.0) == [0.0, 2.0, 4.0, 6.0] and uniform.times_s(
        8.0, offset=0.5
    ) == uniform.times_s(8.0)
    rate = FrameSampling("rate", rate_hz=2.0, max_frames=6)
    assert rate.times_s(2.0, start_s=1.0, offset=0.5) == [1.25, 1.75, 2.25, 2.75]
    assert rate.times_s(1.6, offset=0.9) == pytest.approx([0.45, 0.95, 1.45]), "the last one that fits"
    assert rate.times_s(0.1, offset=0.5) == [0.05], "within a clip shorter than a step"
    assert rate.times_s(12.0, offset=0.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


@pytest.mark.parametrize("offset", [None, 0.0, 0.3, 0.99])
def test_frames_are_bounded_by_the_duration_of_all_videos(offset):
    rate = FrameSampling("rate", rate_hz=2.0, max_frames=8)
    for durations_s in ([0.3], [1.0, 2.6], [100.0, 0.1, 3.0]):
        taken = sum(len(rate.times_s(duration_s, offset=offset)) for duration_s in durations_s)
        assert taken <= rate.most_frames(sum(durations_s), len(durations_s)) <= 8 * len(durations_s)
    assert rate.most_frames(0.0, 3) == 24 and FrameSampling(num_frames=5).most_frames(9.0, 2) == 10


def test_a_clip_that_takes_too_long_is_given_up_on():
    video = encode_video(numbered_frames(30), 10.0)
    assert len(read_clip(video, "clip", EIGHT, timeout_s=60.0).frames_FCHW) == 8
    with pytest.raises(UserError, match=r"clip: is not decoded after 1e-09 s; allow more \(data.sample_timeout_s\)"):
        read_clip(video, "clip", EIGHT, timeout_s=1e-9)
