"""Order, count and motion: answers follow from frames taken together, and no single frame tells them."""

import math
from collections import Counter

import numpy as np
import pytest

from data.probe_scene import COLOURS, PLACES
from data.suite_time import DIRECTIONS, Count, Motion, Order
from lightning_crosslmm.errors import UserError
from tests.suite_pixels import best_place, things, where


def clips(task, num_frames=9, count=5, seed=0):
    random = np.random.default_rng(seed)
    return [task.draw(random, num_frames, 64) for _ in range(count)]


@pytest.mark.parametrize("task", [Order(3, 2), Order(2, 1), Order(8, 4)])
def test_order_is_that_of_the_frames_in_a_quadrant(task):
    for drawn in clips(task):
        shown = {place: [] for place in PLACES}
        for frame, seen in enumerate(map(things, drawn.frames_FHWC)):
            for thing in seen:
                shown[PLACES[2 * (thing.top // 32) + thing.left // 32]].append((thing.shape, frame))
        assert sorted(map(len, shown.values())) == [0] * (4 - task.places) + [task.events] * task.places
        for item in drawn.items:
            place, event = item.question.rstrip("?").split(" e")
            assert shown[place][int(event) - 1] == (item.answer, item.frame)
            assert sorted(shape for shape, _ in shown[place]) == list(item.choices)


@pytest.mark.parametrize("task", [Count(4, 2, 3), Count(9, 1, 1), Count(2, 4, 4)])
def test_count_is_the_number_of_frames_with_a_shape(task):
    for drawn in clips(task):
        seen = [[thing.shape for thing in things(picture)] for picture in drawn.frames_FHWC]
        assert {len(here) for here in seen} == {len(set(here)) for here in seen} == {task.things}
        times = Counter(shape for here in seen for shape in here)
        for item in drawn.items:
            assert str(times[item.question.removesuffix(" times?")]) == item.answer


@pytest.mark.parametrize("task", [Motion(2, 0.125), Motion(4, 1 / 32), Motion(1, 0.4)])
def test_motion_is_the_shift_from_frame_to_frame(task):
    step = round(task.speed * 64)
    for drawn in clips(task, num_frames=6, count=3):
        answers = {item.question: item.answer for item in drawn.items}
        for colour in COLOURS:
            masks = [where(picture, colour) for picture in drawn.frames_FHWC]
            if not any(mask.any() for mask in masks):
                continue
            # movers hide one another at times: the shift that explains most pixels, the shape that fits best
            explained = {
                way: sum((np.roll(one, (down * step, right * step), (0, 1)) & other).sum() for one, other in pairs)
                for way, (down, right) in DIRECTIONS.items()
                for pairs in [list(zip(masks, masks[1:], strict=False))]
            }
            fits = {asked: max(best_place(mask, asked.split()[0]) for mask in masks) for asked in answers}
            asked = max(fits, key=fits.get)
            assert answers.pop(asked) == max(explained, key=explained.get)
        assert not answers


def test_a_mover_is_as_likely_anywhere_whatever_its_way():
    """What a first frame tells of the way: nothing, so halves of the frame hold as many of each."""
    counts = Counter()
    for drawn in clips(Motion(1, 0.125), num_frames=2, count=400):
        rows, _ = np.nonzero((drawn.frames_FHWC[0] != drawn.frames_FHWC[0, 0, 0]).any(axis=-1))
        counts[drawn.items[0].answer, bool(np.median(rows) < 32)] += 1
    for way in DIRECTIONS:
        share = counts[way, True] / (counts[way, True] + counts[way, False])
        assert abs(share - 0.5) < 0.25  # 4 standard deviations of 100 draws, and edges that wrap


@pytest.mark.parametrize(
    ("task", "chance"),
    [(Order(3, 2), 1 / 8), (Count(4, 2, 3), 1 / 4), (Count(6, 1, 3), 1 / 6), (Motion(2, 0.125), 1 / 4)],
)
def test_no_answer_is_likelier_than_another(task, chance):
    answers = Counter(item.answer for drawn in clips(task, 8, 200) for item in drawn.items)
    total = answers.total()
    assert len(answers) == round(1 / chance)
    assert max(answers.values()) / total < chance + 4 * math.sqrt(chance * (1 - chance) / total)


def test_who_knows_the_events_and_not_their_order_gets_one_in_three():
    task = Order(3, 1)
    right = [drawn.items[0].answer == drawn.items[0].choices[0] for drawn in clips(task, 8, 300)]
    assert np.mean(right) == pytest.approx(1 / 3, abs=0.11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Order(1, 1), "data.difficulty.order.events: must be a whole number from 2 to 8, got 1"),
        (lambda: Order(2, 0), "order.places: must be a whole number from 1 to 4, got 0"),
        (lambda: Count(10, 1, 1), "count.most: must be a whole number from 2 to 9, got 10"),
        (lambda: Count(2, 3, 2), "count.asked: must be a whole number from 1 to 2, got 3"),
        (lambda: Count(2, 1, 5), "count.things: must be a whole number from 1 to 4, got 5"),
        (lambda: Motion(5, 0.1), "motion.movers: must be a whole number from 1 to 4, got 5"),
        (lambda: Motion(1, 0.5), "motion.speed: must be from 0.03125 to 0.4375 of a frame's side, got 0.5"),
        (lambda: Motion(1, "fast"), "motion.speed: must be .* got 'fast'"),
    ],
)
def test_difficulties_that_cannot_be_drawn(make, message):
    with pytest.raises(UserError, match=message):
        make()
