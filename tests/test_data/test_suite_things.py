"""Needle, patch, select and recall: every answer stands in the pixels, and nowhere else."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from data import suite_things
from data.probe_scene import COLOURS, PLACES
from data.suite_things import Needle, Patch, Recall, Select
from lightning_crosslmm.errors import UserError
from tests.suite_pixels import things, where


def clips(task, num_frames=9, count=5, seed=0):
    random = np.random.default_rng(seed)
    return [task.draw(random, num_frames, 64) for _ in range(count)]


@pytest.mark.parametrize("task", [Needle(4, 3), Needle(1, 0), Needle(7, 1)])
@pytest.mark.parametrize("num_frames", [7, 12])
def test_a_needle_stands_in_one_frame_with_its_colour(task, num_frames):
    for drawn in clips(task, num_frames):
        seen = [things(picture) for picture in drawn.frames_FHWC]
        assert (
            sum(map(len, seen))
            == num_frames * task.others + task.needles
            == num_frames * task.others + len(drawn.items)
        )
        for item in drawn.items:
            shape = item.question.rstrip("?")
            found = [(frame, thing.colour) for frame, here in enumerate(seen) for thing in here if thing.shape == shape]
            assert found == [(item.frame, item.answer)]


@pytest.mark.parametrize("task", [Patch(0.125, 4, 4), Patch(1 / 32, 2, 0), Patch(0.25, 1, 3)])
def test_a_patch_is_what_differs_from_the_usual_frame(task):
    for drawn in clips(task):
        still_HWC = np.median(drawn.frames_FHWC, axis=0)
        changed_FHW = (drawn.frames_FHWC != still_HWC).any(axis=-1)
        assert len(things(still_HWC)) == task.things and changed_FHW.any(axis=(1, 2)).sum() == task.edits
        for item in drawn.items:
            rows, columns = np.nonzero(changed_FHW[item.frame])
            assert len(rows) == round(task.size * 64) ** 2
            place = PLACES[2 * (rows[0] // 32) + columns[0] // 32]
            pixels = drawn.frames_FHWC[item.frame][rows, columns]
            colour = next(name for name in COLOURS if where(pixels, name).all())
            assert (f"{place} patch?", colour) == (item.question, item.answer)


@pytest.mark.parametrize("num_things", [2, 8])
def test_select_asks_for_each_of_many_things(num_things):
    for drawn in clips(Select(num_things), num_frames=2):
        assert np.array_equal(*drawn.frames_FHWC)
        # cells are 21 pixels wide, the last column and row of pixels is nobody's
        seen = {f"{thing.shape}?": thing.colour for thing in things(drawn.frames_FHWC[0, :63, :63], suite_things.CELLS)}
        assert seen == {item.question: item.answer for item in drawn.items} and len(seen) == num_things


@pytest.mark.parametrize("task", [Recall(6, 2), Recall(2, 1), Recall(8, 2)])
def test_a_key_has_one_value_beside_it_wherever_it_stands(task):
    for drawn in clips(task):
        values = {}
        for seen in map(things, drawn.frames_FHWC):
            assert len(seen) == 2 * task.pairs
            for key, value in zip(seen[::2], seen[1::2], strict=True):
                assert (key.colour, value.shape) == ("grey", "square") and key.top == value.top
                values.setdefault(f"{key.shape} key?", set()).add(value.colour)
        assert values == {item.question: {item.answer} for item in drawn.items} and len(values) == task.keys


@pytest.mark.parametrize("task", [Needle(4, 3), Patch(0.125, 4, 4), Select(8), Recall(6, 2)])
def test_no_answer_is_likelier_than_another(task):
    answers = Counter(item.answer for drawn in clips(task, 8, 150) for item in drawn.items)
    total = answers.total()
    assert set(answers) == set(COLOURS)
    assert max(answers.values()) / total < 1 / 8 + 4 * math.sqrt(1 / 8 * 7 / 8 / total)


@pytest.mark.parametrize(("count", "ceiling"), [(4, 0.412), (8, 0.325)])
def test_a_bag_of_colours_gets_the_ceiling_that_docstrings_tell(count, ceiling):
    """The most frequent of independent colours; bags are counted with their number of orders."""
    bags = itertools.combinations_with_replacement(range(len(COLOURS)), count)
    told = [Counter(bag).values() for bag in bags]
    orders = [math.factorial(count) // math.prod(map(math.factorial, bag)) for bag in told]
    most = sum(number * max(bag) / count for number, bag in zip(orders, told, strict=True)) / len(COLOURS) ** count
    assert most == pytest.approx(ceiling, abs=5e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Needle(0, 1), "data.difficulty.needle.needles: must be a whole number from 1 to 7, got 0"),
        (lambda: Needle(6, 3), "needle.others: must be a whole number from 0 to 2, got 3"),
        (lambda: Needle(True, 3), "needle.needles: must be .* got True"),
        (lambda: Patch(0.5, 1, 1), "patch.size: must be from 0.03125 to 0.25 of a frame's side, got 0.5"),
        (lambda: Patch(0.1, 5, 1), "patch.edits: must be a whole number from 1 to 4, got 5"),
        (lambda: Patch(0.1, 1, -1), "patch.things: must be a whole number from 0 to 4, got -1"),
        (lambda: Select(9), "select.things: must be a whole number from 2 to 8, got 9"),
        (lambda: Recall(1, 1), "recall.keys: must be a whole number from 2 to 8, got 1"),
        (lambda: Recall(2, 3), "recall.pairs: must be a whole number from 1 to 2, got 3"),
    ],
)
def test_difficulties_that_cannot_be_drawn(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_questions_are_short():
    tasks = (Needle(4, 3), Patch(0.125, 4, 4), Select(8), Recall(6, 2))
    assert all(re.fullmatch(r"[a-z ]+\?", item.question) for t in tasks for d in clips(t, count=2) for item in d.items)
