"""Tars as others write them, and as they become when something goes wrong."""

import io
import json
import tarfile

import numpy as np

from lightning_crosslmm.video import encode_video

BLOCK = 512
TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A book."}]
LLAVA = json.dumps({"id": "x", "video": "clips/x.mp4", "conversations": TURNS}).encode()


def clip(num_frames=6, fps_hz=4.0, seed=0):
    frames_FHWC = np.random.default_rng(seed).integers(0, 255, (num_frames, 32, 48, 3), dtype=np.uint8)
    return encode_video(frames_FHWC, fps_hz, gop=3)


def write_tar(path, members, tar_format=tarfile.GNU_FORMAT, mode="w"):
    """Write members (name, bytes), or TarInfos for what is no plain file."""
    with tarfile.open(path, mode, format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def headers(path):
    """Offset of each member's header, and where the zeros at the end begin."""
    with tarfile.open(path) as tar:
        return [*(info.offset for info in tar), tar.offset]


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


def claim(name, size):
    """A header that says its member has so many bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)
