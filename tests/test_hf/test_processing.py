"""The processor gives what the run's own decoding and tokenising give, and refuses what does not fit together."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_crosslmm.batch import VISUAL_MARK
from lightning_crosslmm.conversation import Message
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.hf.processing import CrossLMMProcessor
from lightning_crosslmm.text import load_tokenizer, tokenise
from lightning_crosslmm.video import FrameSampling, encode_video, read_clip

SAMPLING = {"mode": "uniform", "num_frames": 3}


@pytest.fixture
def processor() -> CrossLMMProcessor:
    return CrossLMMProcessor(load_tokenizer("byte"), 16, SAMPLING, 100)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    frames_FHWC = np.random.default_rng(0).integers(0, 255, (8, 48, 32, 3), dtype=np.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_video(frames_FHWC, 4.0))
    return tmp_path / "clip.mp4"


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def test_a_conversation_has_the_ids_of_training(processor: CrossLMMProcessor, video: Path) -> None:
    turns = [
        user({"type": "video", "path": str(video)}, "what?"),
        {"role": "assistant", "content": "cat"},
        user("and?", {"type": "image", "image": torch.zeros(3, 20, 20, dtype=torch.uint8)}),
    ]
    inputs = processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
    contents = ("<video>\nwhat?", "cat", "and?<image>\n")
    messages = [Message(turn["role"], content) for turn, content in zip(turns, contents, strict=True)]
    text = tokenise(SimpleNamespace(key="k", messages=messages), load_tokenizer("byte"), 100, add_answer_prompt=True)
    ids = inputs["input_ids"][0]
    marks = [processor.video_token_id, processor.image_token_id]
    assert [each for each in ids.tolist() if each in marks] == marks
    assert torch.where(torch.isin(ids, torch.tensor(marks)), VISUAL_MARK, ids).tolist() == text.ids
    assert inputs["answer_index"][0].tolist() == text.answer and inputs["attention_mask"].all()
    clip = read_clip(video, "", FrameSampling(**SAMPLING), 16)
    assert torch.equal(inputs["pixel_values"][:3], clip.frames_FCHW) and inputs["num_frames"].tolist() == [3, 1]
    assert torch.equal((inputs["frame_time_ns"].double() / 1e9).float()[:3], clip.frame_time_s_F)
    rendered = processor.apply_chat_template(turns, add_generation_prompt=True)
    again = processor(text=rendered, videos=[video], images=[torch.zeros(20, 20, 3, dtype=torch.uint8)])
    assert all(torch.equal(again[name], inputs[name]) for name in again)


def test_texts_of_unequal_length_are_padded_on_the_side_that_is_asked_for(processor: CrossLMMProcessor) -> None:
    left, right = (processor(text=["a", "bcd"], padding_side=side) for side in ("left", "right"))
    assert left["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert left["input_ids"][0, 2] == right["input_ids"][0, 0] and set(left) == {"input_ids", "attention_mask"}
    pair = [[user("a")], [user("bcd")]]
    assert len(processor.apply_chat_template(pair)) == 2
    assert processor.apply_chat_template(pair, tokenize=True)["input_ids"].shape[0] == 2


class Pil:
    """What is used of a PIL image."""

    def __init__(self, pixels_HWC: np.ndarray) -> None:
        self.pixels_HWC = pixels_HWC

    def convert(self, mode: str) -> np.ndarray:
        assert mode == "RGB"
        return self.pixels_HWC


def test_frames_that_are_decoded_already(processor: CrossLMMProcessor) -> None:
    frames_FHWC = np.random.default_rng(1).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    kinds: list[Any] = [
        frames_FHWC,
        torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2),
        [Pil(each) for each in frames_FHWC],
    ]
    for frames in kinds:
        inputs = processor(text="<video>?", videos=[frames], fps_hz=4.0)
        assert torch.equal(inputs["pixel_values"], torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2))
        assert inputs["frame_time_ns"].tolist() == [0, 250_000_000]
    assert processor(text="<image>", images=np.zeros((50, 20, 3), np.uint8))["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "<video>"}, "videos: the texts hold 1 marks <video>, given are 0"),
        ({"text": "a", "images": ["x.png"]}, "images: the texts hold 0 marks <image>, given are 1"),
        ({"text": "<video>", "videos": ["nowhere.mp4"]}, "nowhere.mp4"),
        ({"text": "<video>", "videos": [np.zeros((1, 4, 4, 3), np.uint8)]}, "frames without times; .*fps_hz"),
        (
            {"text": "<image>", "images": [np.zeros((4, 4), np.uint8)]},
            r"must be uint8 RGB, .* got \['uint8 \(4, 4\)'\]",
        ),
        ({"text": "<image>", "images": [np.zeros((4, 4, 3), np.float32)]}, "must be uint8 RGB"),
        ({"text": None}, "the processor wants text"),
        ({"text": "a", "return_tensors": "np"}, 'return_tensors="pt"'),
    ],
)
def test_what_does_not_fit_is_refused(processor: CrossLMMProcessor, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processor(**given)


def test_parts_of_a_message_that_are_none_are_refused(processor: CrossLMMProcessor) -> None:
    with pytest.raises(UserError, match="parts are text, image and video"):
        processor.apply_chat_template([user({"type": "audio", "path": "a.wav"})])
    with pytest.raises(UserError, match="its text has .* tokens and data.max_tokens is 100"):
        processor.apply_chat_template([user("a" * 200)], tokenize=True)
    with pytest.raises(UserError, match="apply_chat_template takes no fps; did you mean 'fps_hz'?"):
        processor.apply_chat_template([user("a")], processor_kwargs={"fps": 1})
    with pytest.raises(UserError, match="return_dict=True"):
        processor.apply_chat_template([user("a")], tokenize=True, return_dict=False)
