"""Order: a pure function that covers everything once, alone or mixed by weight; and what is drawn for a sample."""

import hashlib
from collections import Counter
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest

from data.order import EpochOrder, MixedOrder, SampleRef, Share, drawn, proportions

SIZES = [5, 3, 7, 1, 4, 6, 2, 8]  # 36 samples
ALL = [SampleRef(shard, sample, 0) for shard, size in enumerate(SIZES) for sample in range(size)]


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
    assert sorted(ref[:2] for ref in refs) == [(1, 0), (1, 1), (4, 0), (4, 1), (4, 2)]


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
    refs = np.array([ref[:2] for ref in order()], dtype=np.int64)
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


SETS = [(Fraction("0.5"), [4, 6]), (Fraction(3), [5, 3, 9]), (Fraction("1.25"), [2])]  # 10, 17 and 2 samples


def mixed(epoch=0, sets=SETS, seed=3):
    firsts = [0, *accumulate(len(sizes) for _, sizes in sets)]
    shares = [Share(first, sizes, weight) for first, (weight, sizes) in zip(firsts, sets, strict=False)]
    return MixedOrder(seed, epoch, "f", shares, window_shards=2)


@pytest.mark.parametrize("sets", [SETS, SETS[:2], SETS[::-1], [(Fraction(1), [3])] * 5])
def test_sets_have_their_shares_and_every_pass_is_whole(sets):
    owner = [number for number, (_, sizes) in enumerate(sets) for _ in sizes]
    total = sum(sum(sizes) for _, sizes in sets)
    share = proportions(total, [weight for weight, _ in sets])
    read = [ref for epoch in range(7) for ref in mixed(epoch, sets)]
    assert len(read) == 7 * total
    for number, (_, sizes) in enumerate(sets):
        own = [ref for ref in read if owner[ref.shard] == number]
        assert len(own) == 7 * share[number]
        size = sum(sizes)
        for start in range(0, len(own), size):
            one_pass = own[start : start + size]
            assert {ref.epoch for ref in one_pass} == {start // size}
            assert len({ref[:2] for ref in one_pass}) == len(one_pass), "no sample twice in a pass"


def test_sets_are_evenly_spread():
    refs = list(mixed())
    owner = [0, 0, 1, 1, 1, 2]
    for number, (weight, _) in enumerate(SETS):
        exact = weight / sum(weight for weight, _ in SETS)
        for place in range(1, len(refs) + 1):
            count = sum(owner[ref.shard] == number for ref in refs[:place])
            assert abs(count - exact * place) < len(SETS)


def test_a_mixed_order_can_be_read_anywhere_and_never_changes():
    refs = list(mixed(epoch=2))
    again = mixed(epoch=2)
    assert [again[place] for place in (28, 0, 13, 28)] == [refs[place] for place in (28, 0, 13, 28)]
    assert list(mixed(epoch=2, seed=4)) != refs
    digest = hashlib.sha256(np.array(refs, dtype=np.int64).tobytes()).hexdigest()
    assert digest[:16] == "99ae7ee609c0febd"
    with pytest.raises(IndexError):
        again[29]


def test_ten_million_samples_are_named_at_once():
    large = [(Fraction(2), [1000] * 6000), (Fraction(1), [1000] * 4000)]
    order = mixed(epoch=5, sets=large)
    assert len(order) == 10_000_000
    counts = Counter(order[place].shard < 6000 for place in range(9_999_000, 10_000_000))
    assert abs(counts[True] - 667) <= 1


def test_shares_are_rounded_by_largest_remainders():
    assert proportions(10, [Fraction(1), Fraction(1), Fraction(1)]) == [4, 3, 3]
    assert proportions(7, [Fraction("0.1"), Fraction("0.9")]) == [1, 6]


def test_what_is_drawn_depends_on_the_name_alone():
    ref = SampleRef(3, 4, 5)
    assert drawn(1, ref, "turn") == drawn(1, ref, "turn") == pytest.approx(0.7675273633437466)
    others = [
        drawn(2, ref, "turn"),
        drawn(1, ref, "offset 0"),
        *(drawn(1, ref._replace(**{f: 9}), "turn") for f in ref._fields),
    ]
    assert len({drawn(1, ref, "turn"), *others}) == 6
    spread = [drawn(0, SampleRef(0, place, 0), "turn") for place in range(2000)]
    assert min(spread) >= 0 and max(spread) < 1 and abs(sum(spread) / 2000 - 0.5) < 0.03
