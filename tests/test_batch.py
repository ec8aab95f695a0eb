import math
from dataclasses import fields, replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from lightning_crosslmm.batch import IGNORED, SHARED_BYTES, VISUAL_MARK, blank_prompt, prompts_for, question_mask
from tests.tiny import TOKENIZER, tiny_batch


def mixed():
    return tiny_batch(
        ["a", 2, "b", 1, "c?", "=no", 3, "d?", "=yes"], ["plain?", "=so"], [4, "e?", "=f"], kinds=["k", "", "", "m"]
    )


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        (
            "visual_offsets",
            lambda t: t[:-1],
            r"visual_offsets and frames: offsets \[0, 2, 3, 6\] must rise from 0 to 10",
        ),
        ("visual_offsets", lambda t: t.int(), "must be int64 on the CPU, got torch.int32"),
        ("text_offsets", lambda t: t + 1, "text_offsets and ids"),
        ("text_offsets", lambda t: t[[0, 2, 1, 3]], "text_offsets and ids"),
        ("frames_FCHW", lambda t: t.float(), "frames must be uint8"),
        ("frames_FCHW", lambda t: t.flatten(1), "frames must be uint8"),
        ("frame_time_s_F", lambda t: t[1:], "9 frame times for 10 frames"),
        ("row_of_sample", lambda t: t[1:], "3 keys, 3 texts, 2 rows"),
        ("keys", lambda t: t[1:], "2 keys, 3 texts"),
        ("labels_L", lambda t: t[1:], "labels"),
        (
            "sample_of_visual",
            lambda t: torch.tensor([0, 0, 2, 2]),
            r"marks per sample \[3, 0, 1\] but visuals .* \[2, 0, 2\]",
        ),
        ("sample_of_visual", lambda t: torch.tensor([0, 2, 0, 0]), "sample_of_visual decreases"),
    ],
)
def test_a_batch_that_disagrees_with_itself_is_refused(field, change, message):
    batch = mixed()
    with pytest.raises(ValueError, match=message) as caught:
        replace(batch, **{field: change(getattr(batch, field))}).validate()
    assert "s2" in str(caught.value)


def test_only_frames_move():
    moved = mixed().to("meta")
    assert moved.frames_FCHW.device.type == "meta"
    assert {moved.ids_L.device.type, moved.visual_offsets.device.type, moved.frame_time_s_F.device.type} == {"cpu"}


def test_prompts_end_where_the_answer_begins():
    batch = mixed()
    prompts = prompts_for(batch, [1, 0, 3, 2])
    prompts.validate()
    assert prompts.keys == ("s0", "s0", "s2", "s1")
    texts = [prompts.ids_L[start:end] for start, end in prompts.text_offsets.unfold(0, 2, 1).tolist()]
    said = [TOKENIZER.decode([i for i in text.tolist() if i != VISUAL_MARK]) for text in texts]
    assert said == ["abc?no<|end|>d?", "abc?", "e?", "plain?"]
    assert (prompts.labels_L == IGNORED).all()
    asked = prompts.ids_L[question_mask(prompts)]
    assert TOKENIZER.decode(asked) == "abc?" + "abc?" + "e?" + "plain?", "the first question, also of a later turn"
    assert torch.equal(asked[:4], batch.ids_L[question_mask(batch)][:4])
    assert prompts.row_of_sample.tolist() == [0, 1, 2, 3]


def test_prompts_carry_the_visuals_marked_before_the_answer_and_no_later_one():
    batch = mixed()
    prompts = prompts_for(batch, [1, 0, 3, 2])
    assert prompts.sample_of_visual.tolist() == [0, 0, 0, 1, 1, 2]
    assert prompts.visual_offsets.tolist() == [0, 2, 3, 6, 8, 9, 13]
    taken = [*range(6), *range(3), *range(6, 10)]
    assert torch.equal(prompts.frames_FCHW, batch.frames_FCHW[taken])
    assert torch.equal(prompts.frame_time_s_F, batch.frame_time_s_F[taken])


def test_a_prompt_without_visuals():
    prompts = prompts_for(mixed(), [2])
    prompts.validate()
    assert prompts.frames_FCHW.shape == (0, 3, 16, 16) and prompts.visual_offsets.tolist() == [0]


def test_a_blank_prompt_is_a_batch_that_asks_nothing():
    blank = blank_prompt(tiny_batch(["see", 2, "what?", "=cat"]))
    blank.validate()
    assert len(blank.ids_L) == 1 and len(blank.frames_FCHW) == 0 and blank.frames_FCHW.dtype == torch.uint8
    assert blank.answer_kinds == () and (blank.labels_L == IGNORED).all()


def test_pictures_are_counted_and_go_with_their_visuals():
    batch = tiny_batch(["see", 3, "and", 1, "?", "=a"], [2, "?", "=b"])
    pictures = torch.tensor([[30, 40, 1, 2], [9, 9, 0, 0], [0, 0, 0, 0]])
    told = replace(batch, picture_V4=pictures)
    told.validate()
    assert prompts_for(told, [1]).picture_V4.tolist() == [[0, 0, 0, 0]]
    assert prompts_for(told, [1, 0]).picture_V4.tolist() == [[0, 0, 0, 0], [30, 40, 1, 2], [9, 9, 0, 0]]
    with pytest.raises(ValueError, match="2 pictures for 3 visuals"):
        replace(batch, picture_V4=pictures[:2]).validate()
    with pytest.raises(ValueError, match=r"\[3, 1, 2\] frames for images of 1 \+ \[4, 0, 0\] tiles"):
        replace(batch, picture_V4=pictures * torch.tensor([1, 1, 2, 1])).validate()


@pytest.mark.parametrize("num_bytes", [SHARED_BYTES - 12, SHARED_BYTES])
def test_few_frames_travel_by_value_and_many_in_shared_memory(num_bytes):
    frames_FCHW = torch.randint(256, (math.ceil(num_bytes / 12), 3, 2, 2), dtype=torch.uint8)
    batch = replace(mixed(), frames_FCHW=frames_FCHW)
    sent = bytes(ForkingPickler.dumps(batch))
    assert (len(sent) < 20_000) == (num_bytes >= SHARED_BYTES)
    arrived = ForkingPickler.loads(sent)
    for field in fields(batch):
        value, other = getattr(batch, field.name), getattr(arrived, field.name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, field.name
