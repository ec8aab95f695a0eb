"""Padded tensors become the batch they came from, and each token finds its place in the LLM's rows."""

from typing import Any

import pytest
import torch

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, VideoBatch
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.hf.inputs import Inputs, place_of_tokens
from tests.tiny import IMAGE_SIZE, tiny_batch, tiny_model

IMAGE, VIDEO = 901, 902
SAMPLES = (["look", 3, "and", 1, 2, "what?", "=cat", "and?", "=dog"], ["no picture", "=ok"], [2, "?", "=z"], ["end", 1])


def padded(batch: VideoBatch, side: str) -> Inputs:
    """Write a batch as the processor would."""
    lengths = batch.text_offsets.diff().tolist()

    def rows(flat: torch.Tensor, fill: int) -> torch.Tensor:
        out = torch.full((len(lengths), max(lengths)), fill)
        for row, piece in enumerate(flat.split(lengths)):
            out[row, slice(len(piece)) if side == "right" else slice(-len(piece), None)] = piece
        return out

    return Inputs(
        input_ids=rows(batch.ids_L.masked_fill(batch.ids_L == VISUAL_MARK, VIDEO), 7),
        attention_mask=rows(torch.ones_like(batch.ids_L), 0),
        pixel_values=batch.frames_FCHW,
        num_frames=batch.visual_offsets.diff(),
        frame_time_ns=(batch.frame_time_s_F.double() * 1e9).round().long(),
        answer_index=None,
        labels=rows(batch.labels_L, IGNORED),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_the_batch_again(side: str) -> None:
    batch = tiny_batch(*SAMPLES)
    found = padded(batch, side).batch((IMAGE, VIDEO), IMAGE_SIZE)
    found.validate()
    for name in vars(batch):
        mine, theirs = getattr(batch, name), getattr(found, name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs), name


def test_images_are_told_from_videos() -> None:
    ids, counts = torch.tensor([[VIDEO, 1, IMAGE]]), torch.tensor([2, 1])
    frames_FCHW = torch.zeros(3, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    given = {"pixel_values": frames_FCHW, "num_frames": counts, "frame_time_ns": torch.zeros(3, dtype=torch.int64)}
    found = Inputs(ids, **given).batch((IMAGE, VIDEO), IMAGE_SIZE)
    assert found.picture_V4.tolist() == [[0, 0, 0, 0], [IMAGE_SIZE, IMAGE_SIZE, 0, 0]]


def test_answers_are_numbered_over_all_texts() -> None:
    inputs = Inputs(
        torch.ones(2, 6, dtype=torch.int64), answer_index=torch.tensor([[-1, 0, 0, -1, 1, 1], [0, 0, 1, 1, -1, 2]])
    )
    found = inputs.batch((IMAGE, VIDEO), IMAGE_SIZE).answer_L
    assert found.tolist() == [-1, 0, 0, -1, 1, 1, 2, 2, 3, 3, -1, 4]


def test_tokens_find_their_places() -> None:
    batch = tiny_batch(*SAMPLES)
    model = tiny_model()
    layout = model.prompt(batch).layout
    place_M = place_of_tokens(batch, layout)
    is_mark_M = batch.ids_L == VISUAL_MARK
    assert torch.equal(place_M[~is_mark_M], layout.text_position)
    assert torch.isin(place_M[is_mark_M], layout.pooled_position_P).all()
    assert torch.equal(place_M[1:][batch.labels_L[1:] != IGNORED] - 1, layout.predict_position_Y)
    marks = is_mark_M.nonzero().flatten()
    assert place_M[marks[0]] + 1 == place_M[marks[0] + 1]  # before "and"
    assert place_M[marks[1]] == place_M[marks[2]] == place_M[marks[2] + 1] - 1  # two in a row, before "what?"
    assert place_M[marks[-1]] == layout.pooled_position_P[-1]  # nothing follows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "holds 5 marks .* num_frames tells of 0 visuals with 0 frames, pixel_values holds 0"),
        ({"num_frames": torch.tensor([9])}, "num_frames tells of 1 visuals with 9 frames"),
        ({"frame_time_ns": torch.zeros(2, dtype=torch.int64)}, "give every text of the batch together"),
        ({"pixel_values": torch.zeros(9, 3, 16, 16)}, "pixel_values is torch.float32; it must be uint8"),
        ({"frame_time_ns": None}, "come with num_frames and frame_time_ns"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    given = {**vars(padded(tiny_batch(*SAMPLES), "left")), **change}
    with pytest.raises(UserError, match=message):
        Inputs(**given).batch((IMAGE, VIDEO), IMAGE_SIZE)
