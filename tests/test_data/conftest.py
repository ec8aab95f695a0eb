"""Real shards of tiny clips, written once for all tests of the data side."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.shards import SampleInfo, ShardWriter
from lightning_crosslmm.video import encode_video

NUM_SAMPLES = 26


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads cost more than they save on tensors of a few numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _conversation(number: int, has_visuals: bool) -> tuple[Conversation, dict[str, bytes]]:
    """Every fifth sample has an image too, every seventh no visual at all; grey tells which sample it is."""
    frames_FHWC = np.full((4, 32, 32, 3), number * 8, dtype=np.uint8)
    kinds = ["video", "image"] if number % 5 == 4 else ["video"]
    kinds = [] if number % 7 == 6 or not has_visuals else kinds
    marks = "".join(f"<{kind}>" for kind in kinds)
    messages = [Message("user", f"{marks}Which sample?"), Message("assistant", str(number))]
    if number % 2:
        messages += [Message("user", "Sure?"), Message("assistant", "yes")]
    visuals = tuple(Visual(kind, "x.mp4" if kind == "video" else "x.png") for kind in kinds)
    answer_kinds = ("number", "surety")[: len(messages) // 2]
    conversation = Conversation(f"s{number:02d}", tuple(messages), visuals, answer_kinds)
    picture = io.BytesIO()
    Image.fromarray(frames_FHWC[0]).save(picture, "PNG")
    files = {"video": encode_video(frames_FHWC, fps_hz=4), "image": picture.getvalue()} if kinds else {}
    return conversation, {m: files[v.kind] for m, v in zip(conversation.members, visuals, strict=True)}


def _write(folder: Path, has_visuals: bool) -> Path:
    with ShardWriter(folder, samples_per_shard=6) as writer:
        for number in range(NUM_SAMPLES):
            conversation, members = _conversation(number, has_visuals)
            writer.write(conversation, members, SampleInfo(1.0, 4, tuple((0.0,) for _ in members)))
    return folder


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of conversations about clips and pictures."""
    return _write(tmp_path_factory.mktemp("shards") / "clips", has_visuals=True)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversations without clips: for trials that count batches, many times over."""
    return _write(tmp_path_factory.mktemp("shards") / "text", has_visuals=False)
