"""Order: a pure function that covers everything once, whatever the number of ranks; position: a validated record."""

import hashlib

import numpy as np
import pytest

from data.order import EpochOrder, GlobalBatches, Position, SampleRef
from lightning_crosslmm.errors import UserError

SIZES = [5, 3, 7, 1, 4, 6, 2, 8]  # 36 samples
ALL = [SampleRef(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]


def order(seed=3, epoch=0, fingerprint="f", sizes=SIZES, window_shards=3, shuffle=True):
    return EpochOrder(seed, epoch, fingerprint, sizes, window_shards, shuffle)


@pytest.mark.parametrize("window_shards", [1, 3, 8, 50])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_stands_once(window_shards, shuffle):
    refs = list(order(window_shards=window_shards, shuffle=shuffle))
    assert sorted(refs) == ALL
    assert (refs == ALL) is not shuffle


def test_empty_shards_are_passed_over():
    refs = list(order(sizes=[0, 2, 0, 0, 3, 0], window_shards=2))
    assert sorted(refs) == [(1, 0), (1, 1), (4, 0), (4, 1), (4, 2)]


def test_order_is_a_function_of_its_name_and_can_be_read_anywhere():
    refs = list(order())
    again = order()
    assert [again[place] for place in (35, 0, 17, 4, 35)] == [refs[place] for place in (35, 0, 17, 4, 35)]
    others = [order(seed=4), order(epoch=1), order(fingerprint="g")]
    assert all(list(other) != refs for other in others)
    assert len({tuple(other) for other in others}) == 3
    with pytest.raises(IndexError):
        again[36]


def test_order_never_changes_between_releases():
    refs = np.array(list(order()), dtype=np.int64)
    assert hashlib.sha256(refs.tobytes()).hexdigest()[:16] == "3c754acf4b9e7fab"


def test_a_window_holds_few_shards_and_mixes_them():
    refs = list(order(window_shards=3))
    start, seen = 0, set()
    for _ in range(3):  # windows of 3, 3 and 2 shards
        shards = set()
        while start < len(refs) and (refs[start].shard in shards or len(shards) < 3) and refs[start].shard not in seen:
            shards.add(refs[start].shard)
            start += 1
        seen |= shards
    assert start == len(refs) and seen == set(range(8))
    changes = sum(a.shard != b.shard for a, b in zip(refs, refs[1:], strict=False))
    assert changes > len(SIZES) + 4  # samples of a window's shards are mixed, not one shard after the other


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start_batch", [0, 2])
def test_ranks_together_read_the_global_batches(world, accumulate, start_batch):
    refs = list(order())
    ranks = [list(GlobalBatches(order(), 8, rank, world, start_batch, True, accumulate)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {(4 - start_batch) * accumulate}
    for step in range(4 - start_batch):
        read = [
            ref
            for piece in range(accumulate)
            for rank in range(world)
            for ref in ranks[rank][step * accumulate + piece]
        ]
        assert read == refs[(start_batch + step) * 8 : (start_batch + step + 1) * 8]


def test_length_is_the_epochs_also_when_it_starts_later():
    assert len(GlobalBatches(order(), 8, 0, 1)) == len(GlobalBatches(order(), 8, 0, 1, start_batch=3)) == 4
    assert len(GlobalBatches(order(), 8, 0, 2, accumulate=2)) == 8


@pytest.mark.parametrize(("world", "sizes"), [(1, [10, 10, 10, 6]), (4, [3, 3, 3, 2]), (7, [2, 2, 2])])
def test_the_rest_is_shared_out_and_no_rank_stays_empty(world, sizes):
    ranks = [list(GlobalBatches(order(), 10, rank, world, drop_last=False)) for rank in range(world)]
    assert sorted(ref for batches in ranks for batch in batches for ref in batch) == ALL
    assert [max(len(batches[step]) for batches in ranks) for step in range(len(ranks[0]))][: len(sizes) - 1] == sizes[
        :-1
    ]
    for step in range(len(ranks[0])):
        counts = [len(batches[step]) for batches in ranks]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert {len(batches) for batches in ranks} == {len(GlobalBatches(order(), 10, 0, world, drop_last=False))}


def test_too_few_samples_for_one_batch_are_refused():
    with pytest.raises(UserError, match="data.global_batch_size: 36 samples make no batch of 40"):
        GlobalBatches(order(), 40, 0, 1)
    with pytest.raises(UserError, match=r"36 samples .* 50 rank"):
        GlobalBatches(order(), 50, 0, 50, drop_last=False)


def test_position_goes_on_and_comes_back_from_its_record():
    position = Position(seed=1, epoch=2, batch=3, global_batch=8, fingerprint="f")
    assert Position.from_dict(position.to_dict()) == position
    assert position.advance().batch == 4 and position.advance(5).epoch == 2
    assert position.advance(5).next_epoch() == Position(1, 3, 0, 8, "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epoch": -1}, "epoch"), ({"batch": 1.0}, "batch"), ({"fingerprint": 5}, "fingerprint"), ({"version": 9}, "9"),
     ({"more": 1}, "more"), ({"seed": True}, "seed")],
)  # fmt: skip
def test_a_wrong_record_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Position.from_dict(Position(1, 2, 3, 8, "f").to_dict() | change)
