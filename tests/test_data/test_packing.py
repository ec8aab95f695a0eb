"""Packing: full rows, every sample in one of them, and pieces of equal weight."""

import random

import pytest

from data.order import EpochOrder, SampleRef
from data.packing import CHUNK_SAMPLES, Rows, SlotEstimate, balanced, best_fit
from lightning_crosslmm.shards import Member, SampleEntry
from lightning_crosslmm.video import FrameSampling


def entry(members, text_bytes=100, answers=1, duration_s=0.0):
    offsets = {name: Member(0, 1, "") for name in ("json", *members)}
    return SampleEntry("s", offsets, duration_s, 0, (), text_bytes, ("",) * answers)


def estimate(sampling=None, bytes_per_token=1.0):
    return SlotEstimate(
        bytes_per_token, lambda answers: 10 * answers, sampling or FrameSampling(num_frames=8), tokens_per_frame=9
    )


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        (entry(()), 110),
        (entry((), answers=3), 130),
        (entry(("0.mp4",)), 110 + 8 * 9),
        (entry(("0.mp4", "1.png", "2.gif")), 110 + 17 * 9),
    ],
)
def test_slots_are_text_template_and_frames(given, slots):
    assert estimate().of(given) == slots


def test_text_counts_by_bytes_per_token_and_is_rounded_up():
    assert estimate(bytes_per_token=3.5).of(entry((), text_bytes=8)) == 3 + 10


@pytest.mark.parametrize(
    ("duration_s", "videos", "frames"), [(10.0, 1, 21), (10.0, 2, 22), (100.0, 1, 32), (0.0, 2, 64), (0.4, 1, 2)]
)
def test_frames_at_a_rate_follow_the_duration_and_are_bounded(duration_s, videos, frames):
    sampling = FrameSampling("rate", rate_hz=2.0, max_frames=32)
    members = [f"{number}.mp4" for number in range(videos)]
    assert estimate(sampling).of(entry(members, duration_s=duration_s)) == 110 + frames * 9
    assert frames >= len(sampling.times_s(duration_s / videos)) * videos


def lengths(count, seed=0):
    noise = random.Random(seed)
    return [min(4096, round(noise.lognormvariate(5.5, 0.9)) + 20) for _ in range(count)]


@pytest.mark.parametrize("slots", [lengths(300), [5], [10, 10, 10], [11, 4, 6, 10, 1], [3] * 7])
@pytest.mark.parametrize("capacity", [10, 4096])
def test_rows_hold_every_item_once_and_no_more_than_they_can(slots, capacity):
    rows = best_fit(slots, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(slots)))
    assert all(sum(slots[item] for item in row) <= capacity or len(row) == 1 for row in rows)
    assert best_fit(slots, capacity) == rows


def test_rows_of_mixed_lengths_are_nearly_full():
    slots = lengths(CHUNK_SAMPLES)
    rows = best_fit(slots, 4096)
    assert sum(slots) / (4096 * len(rows)) > 0.98
    one_by_one, room = 1, 4096  # in the order they come: each row closed when the next sample does not fit
    for count in slots:
        one_by_one, room = (one_by_one, room - count) if count <= room else (one_by_one + 1, 4096 - count)
    assert len(rows) < one_by_one


@pytest.mark.parametrize(("num_rows", "pieces"), [(16, 4), (64, 8), (7, 4), (3, 8), (1, 1), (512, 64)])
def test_pieces_are_equally_many_rows_of_nearly_equal_weight(num_rows, pieces):
    slots = lengths(num_rows, seed=num_rows)
    cut = balanced(slots, pieces)
    assert sorted(row for piece in cut for row in piece) == list(range(num_rows))
    sizes = [len(piece) for piece in cut]
    assert max(sizes) - min(sizes) <= 1 and all(piece == sorted(piece) for piece in cut)
    if num_rows % pieces == 0 and num_rows > pieces:
        loads = [sum(slots[row] for row in piece) for piece in cut]
        in_order = [sum(slots[begin : begin + num_rows // pieces]) for begin in range(0, num_rows, num_rows // pieces)]
        assert max(loads) - min(loads) < 0.5 * (max(in_order) - min(in_order))


class Index:
    """Text samples whose length is their number."""

    def __init__(self):
        self.asked = []

    def entry(self, ref):
        self.asked.append(ref.shard)
        return entry((), text_bytes=1 + (ref.shard * 37 + ref.sample * 11) % 90)


def rows_of(index, pack_slots, num_shards=30, per_shard=100):
    order = EpochOrder(0, 0, "f", [per_shard] * num_shards, 8, shuffle=True)
    return Rows(order, index, estimate(), pack_slots, (0, 0, "f"))


def test_chunks_are_planned_by_themselves_and_hold_consecutive_samples():
    rows = rows_of(Index(), 200)
    assert rows.num_chunks == 3
    order = EpochOrder(0, 0, "f", [100] * 30, 8, shuffle=True)
    for number in (2, 0, 1):
        planned = rows.chunk(number)
        refs = [ref for row in planned for ref in row.samples]
        begin = number * CHUNK_SAMPLES
        assert sorted(refs) == sorted(order[place] for place in range(begin, min(begin + CHUNK_SAMPLES, 3000)))
        assert planned == rows_of(Index(), 200).chunk(number)
        assert all(row.slots <= 200 for row in planned)
        first = [order[begin + place] for place in range(20)]
        assert any(ref not in first for row in planned[:5] for ref in row.samples), "rows are permuted"


def test_each_shards_index_is_looked_up_in_one_go():
    index = Index()
    rows_of(index, 200).chunk(0)
    changes = sum(a != b for a, b in zip(index.asked, index.asked[1:], strict=False))
    assert changes == len(set(index.asked)) - 1


def test_without_packing_each_sample_is_a_row_in_the_order():
    rows = rows_of(Index(), None)
    order = EpochOrder(0, 0, "f", [100] * 30, 8, shuffle=True)
    assert [row.samples for row in rows.chunk(1)] == [(order[CHUNK_SAMPLES + n],) for n in range(CHUNK_SAMPLES)]
    assert Rows(order, Index(), None, None, ()).chunk(2)[0] == ((SampleRef(*order[2 * CHUNK_SAMPLES]),), 1)
