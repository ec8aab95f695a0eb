import io
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lightning_crosslmm import video_file
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.video import FrameSampling, encode_video, probe_video, read_clip
from tests.clips import EIGHT, FrameSamplingAt, mux, numbered_frames, numbers, refused

# Each keyframe but the first is followed by B-frames that are shown before it.
OPEN_GROUPS = "open-gop=1:keyint=13:min-keyint=13:scenecut=0:bframes=4:b-adapt=0"


# -- seeking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": OPEN_GROUPS}),
        ("libx265", {"x265-params": "log-level=none:" + OPEN_GROUPS}),
    ],
)
def test_open_groups_of_pictures_give_whole_frames(tmp_path, codec, options):
    path = mux(tmp_path / "clip", range(60), codec=codec, options=options, time_base=Fraction(1, 25))
    every = read_clip(path, "clip", FrameSampling("uniform", num_frames=60))
    assert numbers(every) == list(range(60))
    for i in range(60):  # one moment alone: a seek to each place of a group
        alone = FrameSamplingAt((i + 0.5) / 25)
        assert torch.equal(read_clip(path, "clip", alone).frames_FCHW[0], every.frames_FCHW[i])


def test_each_group_of_pictures_is_decoded_once_and_skipped_ones_never(tmp_path, monkeypatch):
    decoded = []
    plain = video_file.VideoFile.frames

    def counted(self):
        for shown in plain(self):
            decoded.append(shown.pts)
            yield shown

    monkeypatch.setattr(video_file.VideoFile, "frames", counted)
    for fmt in ("mp4", "matroska"):
        decoded.clear()
        path = mux(
            tmp_path / fmt,
            range(0, 9600, 40),
            fmt,
            options={"g": "60", "keyint_min": "60", "sc_threshold": "0"},
            frames=np.tile(numbered_frames(60), (4, 1, 1, 1)),
        )
        read_clip(path, "clip", FrameSampling("uniform", num_frames=30))
        assert len(decoded) == len(set(decoded)), fmt
        decoded.clear()
        read_clip(path, "clip", FrameSamplingAt(7.3))
        assert len(decoded) < 10, fmt


@pytest.mark.parametrize(
    ("fmt", "options"), [("mp4", {}), ("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("mov", {})]
)
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_what_the_header_of_an_mp4_tells_is_what_looking_into_it_finds(tmp_path, monkeypatch, fmt, options, codec):
    times = [500, *range(530, 2900, 40)]
    path = mux(tmp_path / "clip", times, fmt, codec, {"bf": "3"}, container_options=options, audio_s=1.0)
    opened = []
    monkeypatch.setattr(video_file.av, "open", lambda *a, plain=av.open, **k: opened.append(k) or plain(*a, **k))
    quick, told = read_clip(path, "clip", EIGHT), probe_video(path, "clip")
    is_quick = len(opened) == 3 and all("codec_whitelist" in each["container_options"] for each in opened)
    assert is_quick == (not options)  # in fragments it tells too little
    monkeypatch.setattr(video_file, "_TOLD_BY_MP4", set())
    slow = read_clip(path, "clip", EIGHT)
    assert torch.equal(quick.frames_FCHW, slow.frames_FCHW) and torch.equal(quick.frame_time_s_F, slow.frame_time_s_F)
    assert told == probe_video(path, "clip") and len(set(numbers(quick))) >= 7


# -- how they look ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_colours_survive(codec, pix_fmt):
    colours = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 90, 30]], np.uint8)
    frames = np.ascontiguousarray(np.broadcast_to(colours[:, None, None], (6, 32, 32, 3)))
    video = encode_video(torch.from_numpy(frames), 2.0, codec, crf=8, pix_fmt=pix_fmt)
    seen = read_clip(video, "clip", FrameSampling("uniform", num_frames=6)).frames_FCHW.permute(0, 2, 3, 1).numpy()
    assert np.abs(seen.astype(int) - frames).max() <= 3


def test_matrix_and_range_in_the_header_are_obeyed(tmp_path):
    rgb = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (200, 90, 30), np.uint8))
    for matrix, full in ((1, False), (1, True), (6, True)):  # BT.709 and BT.601, studio and full range
        path, range_ = tmp_path / f"{matrix}{full}.mp4", 2 if full else 1
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=4, options={"crf": "1"})
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, range_
            frame = rgb.reformat(
                format="yuv420p", dst_colorspace={1: "ITU709", 6: "ITU601"}[matrix], dst_color_range=range_
            )
            frame.pts = 0
            container.mux(stream.encode(frame) + stream.encode())
        seen_CHW = read_clip(path, "clip", FrameSampling("uniform", num_frames=1)).frames_FCHW[0]
        assert np.abs(seen_CHW.float().mean((1, 2)).numpy() - (200, 90, 30)).max() <= 3, (matrix, full)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation_deg", [0, 90, 180, 270])
def test_rotation_turns_frames_upright(tmp_path, rotation_deg, mirrored):
    corners = np.zeros((4, 32, 64, 3), np.uint8)
    corners[:, :16, :32], corners[:, :16, 32:], corners[:, 16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = mux(tmp_path / "clip.mp4", range(0, 160, 40), frames=corners, rotation_deg=rotation_deg, mirrored=mirrored)
    expected = np.rot90(corners[0], -rotation_deg // 90)
    expected = np.ascontiguousarray(expected[:, ::-1] if mirrored else expected)
    info = probe_video(path, "clip")
    assert (info.height, info.width) == expected.shape[:2]
    if not mirrored:
        assert info.rotation_deg == rotation_deg
    seen = read_clip(path, "clip", EIGHT).frames_FCHW[0].permute(1, 2, 0).numpy()
    assert np.abs(seen.astype(int) - expected).mean() < 4
    assert read_clip(path, "clip", EIGHT, (20, 30)).frames_FCHW.shape == (8, 3, 20, 30)


def test_resizing_is_antialiased_and_stretches():
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 192, 3), dtype=np.uint8)
    video = encode_video(noise, 4.0, crf=1, pix_fmt="yuv444p")
    sampling = FrameSampling("uniform", num_frames=4)
    full, small = read_clip(video, "c", sampling).frames_FCHW, read_clip(video, "c", sampling, 32).frames_FCHW
    reference = torch.nn.functional.interpolate(full.float(), (32, 32), mode="bicubic", antialias=True)
    assert small.shape == (4, 3, 32, 32) and small.is_contiguous()
    assert (small.float() - reference).abs().mean() < 1.5
    assert read_clip(video, "c", sampling, (48, 80)).frames_FCHW.shape[2:] == (48, 80)


# -- bad files ----------------------------------------------------------------------------------------------------


def cut_clip(tmp_path, fmt):
    """A clip of 120 noisy frames whose header comes first, so that a cut hits pictures."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 64, 64, 3), dtype=np.uint8)
    start = {"movflags": "faststart"} if fmt == "mp4" else {}
    return mux(tmp_path / f"clip.{fmt}", range(0, 4800, 40), fmt, frames=noise, container_options=start).read_bytes()


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("fmt", ["mp4", "matroska", "flv"])
def test_a_cut_is_never_papered_over(tmp_path, fmt, share):
    blob = cut_clip(tmp_path, fmt)
    refused(blob[: int(share * len(blob))], FrameSampling("uniform", num_frames=24))
    with pytest.raises(UserError, match="clip"):
        probe_video(blob[: int(share * len(blob))], "clip")


@pytest.mark.parametrize("fmt", ["mp4", "matroska"])
def test_a_cut_at_every_packet_border_is_noticed(tmp_path, fmt):
    blob = cut_clip(tmp_path, fmt)
    with av.open(io.BytesIO(blob)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size][40:100:9]
    for end in ends:
        refused(blob[:end], FrameSampling("uniform", num_frames=24))


@pytest.mark.parametrize(("fmt", "codec"), [("avi", "mpeg4"), ("mpegts", "libx264")])
def test_half_a_frame_at_the_end_is_no_frame(tmp_path, fmt, codec):
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    blob = mux(tmp_path / "clip", range(30), fmt, codec, {"bf": "0"}, Fraction(1, 25), frames=noise).read_bytes()
    with av.open(io.BytesIO(blob)) as container:
        middle = [packet.pos + packet.size // 2 for packet in container.demux(video=0) if packet.size][20]
    refused(blob[:middle], FrameSampling("uniform", num_frames=100))


def test_probing_notices_three_missing_bytes(tmp_path):
    with pytest.raises(UserError, match="clip: is damaged or cut off at 4.7"):
        probe_video(cut_clip(tmp_path, "mp4")[:-3], "clip")


def test_a_clip_cut_out_at_an_open_group_starts_at_its_keyframe(tmp_path):
    options = {"x264-params": OPEN_GROUPS}
    path = mux(tmp_path / "whole", range(0, 2400, 40), "matroska", options=options)
    with av.open(str(path)) as whole, av.open(str(tmp_path / "part"), "w", format="matroska") as part:
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        stream = part.add_stream_from_template(whole.streams.video[0])
        first = [i for i, packet in enumerate(packets) if packet.is_keyframe][2]
        assert any(packet.pts < packets[first].pts for packet in packets[first:])
        for packet in packets[first:]:
            packet.stream = stream
            part.mux(packet)
    expected = round(packets[first].pts / 40)
    clip = read_clip(tmp_path / "part", "part", FrameSampling("uniform", num_frames=60))
    assert numbers(clip)[0] == expected and numbers(clip)[-1] == 59


@pytest.mark.parametrize("fmt", ["mp4", "matroska"])
def test_frames_before_a_cut_are_still_read(tmp_path, fmt):
    blob = cut_clip(tmp_path, fmt)
    whole = read_clip(blob, "clip", FrameSamplingAt(1.0))
    assert torch.equal(read_clip(blob[: len(blob) // 2], "clip", FrameSamplingAt(1.0)).frames_FCHW, whole.frames_FCHW)


def test_damage_on_the_way_to_a_wanted_frame_is_noticed(tmp_path):
    blob = bytearray(cut_clip(tmp_path, "mp4"))
    blob[len(blob) // 2 : len(blob) // 2 + 3000] = bytes(3000)
    refused(bytes(blob), FrameSampling("uniform", num_frames=120))


def test_files_that_are_no_videos_say_what_they_are(tmp_path):
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(16000))
    (tmp_path / "words.mp4").write_text("these are words " * 100)
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(stream.encode(silence) + stream.encode())
    assert "no video" in refused(tmp_path / "sound.mp4") and "audio" in refused(tmp_path / "sound.mp4")
    assert "formats: mov" in refused(sound.getvalue())
    assert "Invalid data found" in refused(tmp_path / "words.mp4")
    assert "empty (0 bytes)" in refused(b"")
    assert "no file at" in refused(tmp_path / "missing.mp4")
    assert "no file at" in refused(tmp_path / "folder.mp4")
    refused(bytes(5000))
    empty = io.BytesIO()
    with av.open(empty, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.height = stream.width = 64
        container.start_encoding()
    refused(empty.getvalue())


def test_names_are_never_resolved_by_ffmpeg(tmp_path):
    video = tmp_path / "clip.mp4"
    video.write_bytes(encode_video(numbered_frames(8), 4.0))
    for name in (f"file:{video}", f"concat:{video}", "pipe:0", "http://localhost/clip.mp4", "testsrc=size=64x64"):
        assert "no file at" in refused(Path(name))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{video}\n#EXT-X-ENDLIST\n"
    for listing in (playlist, f"ffconcat version 1.0\nfile '{video}'\n"):
        (tmp_path / "list.mp4").write_text(listing)
        refused(tmp_path / "list.mp4")
        refused(listing.encode())


def test_files_are_closed_after_success_and_failure(tmp_path):
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("needs /proc to count open files")
    (tmp_path / "good").write_bytes(encode_video(numbered_frames(8), 4.0))
    (tmp_path / "bad").write_bytes(encode_video(numbered_frames(8), 4.0)[:900])
    before = len(list(open_files.iterdir()))
    for _ in range(5):
        read_clip(tmp_path / "good", "good", EIGHT)
        refused(tmp_path / "bad")
    assert len(list(open_files.iterdir())) == before


def test_tags_in_another_encoding_than_utf8_do_no_harm(tmp_path):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for frame_HWC in numbered_frames(3, (32, 32)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC)))
        container.mux(stream.encode())
    assert b"TITLE" in buffer.getvalue()
    assert probe_video(buffer.getvalue().replace(b"TITLE", b"\xe9t\xe9\xff\xfe"), "clip").num_frames == 3
