"""Collating: samples one after the other, with boundaries that say which is which."""

import pytest
import torch

from data.collate import collate
from data.stream import Sample
from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, Skipped
from lightning_crosslmm.text import Text


def sample(key, frames_per_visual, num_answers):
    num_frames = sum(frames_per_visual)
    ids = [VISUAL_MARK] * len(frames_per_visual) + [7]
    labels, answer = [IGNORED] * len(ids), [-1] * len(ids)
    for number in range(num_answers):
        ids, labels, answer = [*ids, 50, 51], [*labels, 50, IGNORED], [*answer, number, -1]
    return Sample(
        key=key,
        frames_FCHW=torch.full((num_frames, 3, 4, 4), ord(key), dtype=torch.uint8),
        frame_time_s_F=torch.arange(num_frames, dtype=torch.float32),
        frames_per_visual=frames_per_visual,
        text=Text(ids, labels, answer),
        answer_kinds=tuple(f"{key}{number}" for number in range(num_answers)),
        questions=tuple(f"{key}{number}?" for number in range(num_answers)),
        answer_facts=tuple({"item": f"{key}{number}"} for number in range(num_answers)),
    )


SAMPLES = [sample("a", (2, 1), 2), sample("b", (), 1), sample("c", (4,), 1)]
APART = list(enumerate(SAMPLES))


def test_boundaries_tell_samples_visuals_and_frames_apart():
    batch = collate(APART, 4)
    batch.validate()
    assert batch.keys == ("a", "b", "c")
    assert batch.visual_offsets.tolist() == [0, 2, 3, 7]
    assert batch.sample_of_visual.tolist() == [0, 0, 2]
    assert batch.frames_FCHW[:, 0, 0, 0].tolist() == [97] * 3 + [99] * 4
    assert batch.text_offsets.tolist() == [0, 7, 10, 14]
    assert batch.ids_L[7:10].tolist() == [7, 50, 51]
    assert batch.frame_time_s_F.tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_labels_point_at_the_batchs_answers():
    batch = collate(APART, 4)
    assert batch.answer_kinds == ("a0", "a1", "b0", "c0")
    assert batch.questions == ("a0?", "a1?", "b0?", "c0?")
    assert batch.answer_facts == ({"item": "a0"}, {"item": "a1"}, {"item": "b0"}, {"item": "c0"})
    assert batch.answer_L[batch.answer_L >= 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.answer_L >= 0, batch.labels_L != IGNORED)


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 1], [0, 0, 0]])
def test_samples_share_the_rows_they_were_planned_for(rows):
    assert collate(list(zip(rows, SAMPLES, strict=True)), 4).row_of_sample.tolist() == rows


@pytest.mark.parametrize(
    ("rows", "lost", "left"),
    [([0, 0, 1], 1, [0, 1]), ([0, 1, 2], 1, [0, 1]), ([0, 0, 1], 2, [0, 0]), ([0, 1, 1], 0, [0, 0])],
)
def test_a_sample_that_is_left_out_leaves_no_gap(rows, lost, left):
    told = Skipped("a.tar", "x", "damaged")
    items = [
        (row, told if number == lost else sample)
        for number, (row, sample) in enumerate(zip(rows, SAMPLES, strict=True))
    ]
    batch = collate(items, 4)
    batch.validate()
    assert batch.row_of_sample.tolist() == left and batch.skipped == (told,)
    assert batch.keys == tuple(key for number, key in enumerate("abc") if number != lost)


@pytest.mark.parametrize("items", [[], [(0, Skipped("a.tar", "x", "damaged"))]])
def test_a_token_stands_for_a_batch_of_which_nothing_is_left(items):
    batch = collate(items, 4)
    batch.validate()
    assert batch.keys == ("",) and batch.answer_kinds == () and batch.row_of_sample.tolist() == [0]
    assert batch.frames_FCHW.shape == (0, 3, 4, 4) and batch.ids_L.tolist() == [0]
    assert batch.labels_L.tolist() == [IGNORED] and len(batch.skipped) == len(items)


def test_a_batch_without_visuals_is_ordinary():
    batch = collate([(0, SAMPLES[1])], 4)
    batch.validate()
    assert batch.frames_FCHW.shape == (0, 3, 4, 4) and batch.visual_offsets.tolist() == [0]
    assert batch.sample_of_visual.dtype == torch.int64
