"""Plan: the same global batches for every number of ranks and accumulated batches, from any place on."""

import pytest

import data.packing
from data.order import EpochOrder, SampleRef
from data.packing import Row, Rows
from data.plan import EvalPlan, TrainPlan
from data.position import Place
from lightning_crosslmm.errors import UserError
from tests.test_data.test_packing import Index, estimate

SIZES = [5, 3, 7, 1, 4, 6, 2, 9]  # 37 samples
ALL = [SampleRef(shard, sample, 0) for shard, size in enumerate(SIZES) for sample in range(size)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(data.packing, "CHUNK_SAMPLES", 10)


def order(shuffle=True):
    return EpochOrder(3, 0, "f", SIZES, 3, shuffle)


def rows(pack_slots=300):
    return Rows(order(), Index(), estimate(), pack_slots, (3, 0, "f"))


def global_batches(pack_slots, size):
    """What any plan has to come to: the rows of all chunks, one after the other."""
    planned = rows(pack_slots)
    every = [row for chunk in range(planned.num_chunks) for row in planned.chunk(chunk)]
    return [every[begin : begin + size] for begin in range(0, len(every), size)]


def read(plans, accumulate):
    """Rows of each global batch, from what the ranks were given."""
    ranks = [list(plan) for plan in plans]
    assert len({len(batches) for batches in ranks}) == 1
    steps = []
    for begin in range(0, len(ranks[0]), accumulate):
        found = []
        for batch in [batches[begin + piece] for piece in range(accumulate) for batches in ranks]:
            numbers = [planned.row for planned in batch]
            assert numbers == sorted(numbers) and set(numbers) == set(range(len(set(numbers))))
            found += [tuple(p.ref for p in batch if p.row == number) for number in sorted(set(numbers))]
        steps.append(sorted(found))
    return steps


@pytest.mark.parametrize("pack_slots", [None, 300])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_global_batches_from_any_of_them_on(world, accumulate, pack_slots):
    expected = [sorted(row.samples for row in batch) for batch in global_batches(pack_slots, 8)]
    assert sorted(ref for batch in expected for row in batch for ref in row) == ALL, "each sample once"
    place = Place()
    for start in range(len(expected)):
        # each start stands where a run of another number of ranks would have stopped
        plans = [TrainPlan(rows(pack_slots), 8, rank, world, accumulate, place, start) for rank in range(world)]
        assert read(plans, accumulate) == expected[start:]
        walked = TrainPlan(rows(pack_slots), 8, 0, 1, 1, place, start)
        next(iter(walked))
        place = walked.place(start + 1)
    assert list(TrainPlan(rows(pack_slots), 8, 0, world, accumulate, place, len(expected))) == []


@pytest.mark.parametrize(("pack_slots", "accumulate"), [(None, 1), (None, 2), (300, 1), (300, 4)])
def test_the_end_is_told_with_the_last_batch(pack_slots, accumulate):
    plan = TrainPlan(rows(pack_slots), 8, 0, 1, accumulate)
    ends = [plan.hand_out() for _ in plan]
    assert ends[-1] and sum(ends) == 1 and len(ends) <= len(plan)
    assert len(plan) == 5 * accumulate
    assert (len(ends) == len(plan)) is (pack_slots is None)
    num_batches = len(ends) // accumulate
    plan.place(num_batches)
    with pytest.raises(KeyError):  # places that nobody asks for any more are forgotten
        plan.place(num_batches - 2)


def test_planning_ahead_keeps_the_places_that_are_not_trained():
    plan = TrainPlan(rows(None), 8, 0, 1, 2)
    ahead = list(plan)
    assert len(ahead) == 10
    for handed_out in range(1, 11):
        plan.hand_out()
        trained = (handed_out - 1) // 2
        assert plan.place(trained) == Place(*divmod(trained * 8, 10)) or plan.place(trained).row == 10
        plan.place(handed_out // 2)


class Uneven:
    """Rows of very different weight."""

    num_samples, num_chunks = 16, 1

    def chunk(self, number):
        return [Row((SampleRef(0, place, 0),), 1000 if place < 4 else 10 * place) for place in range(16)]


def test_ranks_get_equally_many_rows_and_nearly_equally_many_slots():
    ranks = [list(TrainPlan(Uneven(), 16, rank, 4)) for rank in range(4)]
    assert all(len(batch) == 4 for batches in ranks for batch in batches)
    slots = {row.samples[0]: row.slots for row in Uneven().chunk(0)}
    loads = [sum(slots[planned.ref] for planned in batches[0]) for batches in ranks]
    assert max(loads) - min(loads) < 0.03 * max(loads)


@pytest.mark.parametrize(("world", "sizes"), [(1, [10, 10, 10, 7]), (4, [3, 3, 3, 2]), (8, [2, 2, 3])])
def test_what_is_measured_keeps_its_order_and_no_rank_stays_empty(world, sizes):
    ranks = [list(EvalPlan(order(shuffle=False), 10, rank, world)) for rank in range(world)]
    assert [p.ref for step in zip(*ranks, strict=True) for batch in step for p in batch] == ALL
    assert [max(map(len, step)) for step in zip(*ranks, strict=True)] == sizes
    for step in zip(*ranks, strict=True):
        assert min(map(len, step)) >= 1 and max(map(len, step)) - min(map(len, step)) <= 1
        assert all([planned.row for planned in batch] == list(range(len(batch))) for batch in step)
    assert {len(batches) for batches in ranks} == {len(EvalPlan(order(), 10, 0, world))}


def test_too_few_samples_for_one_batch_are_refused():
    with pytest.raises(UserError, match="data.global_batch_size: 37 samples make no batch of 40"):
        TrainPlan(rows(), 40, 0, 1)
    with pytest.raises(UserError, match=r"37 samples .* 50 rank"):
        EvalPlan(order(), 50, 0, 50)
