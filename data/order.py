"""Order: the place of every sample in every epoch, as pure functions of a handful of integers.

Nothing is drawn from a running generator and nothing is buffered, so any place of any epoch can be named without
walking there. That is what makes resuming exact, and independent of the number of ranks and workers.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class SampleRef(NamedTuple):
    """Names a sample and the pass over the data in which it is read.

    Args:
        shard: the number of its shard in the set.
        sample: its place in the shard.
        epoch: how often its set was gone through before; what is drawn for the sample depends on it.
    """

    shard: int
    sample: int
    epoch: int


class EpochOrder(Sequence[SampleRef]):
    """The order of one epoch: shards permuted, cut into windows, samples permuted inside each window.

    A reader has at most ``window_shards`` shards open at a time. Memory grows with the number of shards, not samples:
    a window's permutation is made when it is reached, and two are kept.

    Args:
        seed: of the run.
        epoch: counted from 0.
        fingerprint: of the shard set; other data, other order.
        samples_per_shard: how many samples each shard holds.
        window_shards: shards that are mixed with one another, at least 1. More mix better and read less locally.
        shuffle: False keeps the order of the shards and of the samples in them.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        fingerprint: str,
        samples_per_shard: Sequence[int],
        window_shards: int,
        shuffle: bool,
    ) -> None:
        self._name, self._epoch = (seed, epoch, fingerprint), epoch
        self._shuffle = shuffle
        sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self._shards = permutation(len(sizes), *self._name, "shards") if shuffle else np.arange(len(sizes))
        self._ends = np.cumsum(sizes[self._shards])
        self._window_shards = window_shards
        self._window_ends = [*self._ends[window_shards - 1 :: window_shards].tolist()]
        if len(sizes) % window_shards:
            self._window_ends.append(int(self._ends[-1]))
        self._samples_of_window = lru_cache(maxsize=2)(self._read_window)

    def __len__(self) -> int:
        """Samples of the epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> SampleRef:
        """Name the sample at this place of the epoch."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        window = bisect_right(self._window_ends, index)
        start = self._window_ends[window - 1] if window else 0
        place = index if not self._shuffle else start + int(self._samples_of_window(window)[index - start])
        slot = int(np.searchsorted(self._ends, place, side="right"))
        first = int(self._ends[slot - 1]) if slot else 0
        return SampleRef(int(self._shards[slot]), place - first, self._epoch)

    def _read_window(self, window: int) -> np.ndarray:
        start = self._window_ends[window - 1] if window else 0
        return permutation(self._window_ends[window] - start, *self._name, window)


def permutation(length: int, *name: int | str) -> np.ndarray:
    """Permute 0..length-1, the same for ever: numpy promises its bit generators' words, not what ``shuffle`` does."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return np.argsort(np.random.PCG64(int.from_bytes(digest)).random_raw(length), kind="stable")


class Share(NamedTuple):
    """What one set brings to a mixture.

    Args:
        first_shard: number of its first shard among those of all sets.
        samples_per_shard: how many samples each of its shards holds.
        weight: of the set among the others, above 0.
    """

    first_shard: int
    samples_per_shard: Sequence[int]
    weight: Fraction


class MixedOrder(Sequence[SampleRef]):
    """The order of one epoch of a mixture: every set in its proportion, evenly spread, each in passes of its own.

    An epoch has N places, as many as all sets have samples, and set i gets ``n_i = N w_i / sum(w)`` of them, rounded
    by largest remainders. The first ``t`` places hold ``(t n_0 + phase_0) // N`` samples of set 0, the places that are
    left are shared out among the other sets in the same way: counts never stray more than the number of sets from
    their shares, and no place needs those before it. Set i begins an epoch e where it stopped, at its ``e n_i``-th
    sample; whenever it was gone through once, its next pass has another order.

    Args:
        seed: of the run.
        epoch: counted from 0.
        fingerprint: of the mixture; other data, other order.
        shares: of the sets.
        window_shards: as for ``EpochOrder``, within each set.
    """

    def __init__(self, seed: int, epoch: int, fingerprint: str, shares: Sequence[Share], window_shards: int) -> None:
        self._sizes = [sum(share.samples_per_shard) for share in shares]
        self._length = sum(self._sizes)
        self._counts = proportions(self._length, [share.weight for share in shares])
        self._shares, self._epoch = shares, epoch
        name = (seed, epoch, fingerprint, "phase")
        self._phases = [_whole(*name, number) for number in range(len(shares))]
        # at a pass's end the next one's order is asked for as well
        self._pass = lru_cache(maxsize=2 * len(shares))(
            lambda number, count: EpochOrder(
                seed, count, f"{fingerprint}/{number}", shares[number].samples_per_shard, window_shards, shuffle=True
            )
        )

    def __len__(self) -> int:
        """Places of the epoch."""
        return self._length

    def __getitem__(self, index: int) -> SampleRef:
        """Name the sample at this place of the epoch."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        number, place = self._set_at(index)
        passes, place = divmod(self._epoch * self._counts[number] + place, self._sizes[number])
        ref = self._pass(number, passes)[place]
        return ref._replace(shard=self._shares[number].first_shard + ref.shard)

    def _set_at(self, index: int) -> tuple[int, int]:
        # the set whose turn it is, and how many of its samples came before
        places = self._length
        for number, (count, phase) in enumerate(zip(self._counts, self._phases, strict=True)):
            before, now = ((t * count + phase % places) // places for t in (index, index + 1))
            if now > before:
                return number, before
            index, places = index - before, places - count
        raise AssertionError("the last set takes every place that is left")


def proportions(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Share out a whole number by weights: rounded down, and what is left to the largest remainders, first ones first.

    Args:
        total: what is shared out, at least 0.
        weights: above 0.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (counts[number] - exact[number], number))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def drawn(seed: int, ref: SampleRef, what: str) -> float:
    """Draw a number in [0, 1) for a sample: the same wherever, whenever and by whomever it is read in this pass.

    Args:
        seed: of the run.
        ref: the sample and its pass.
        what: the name of the choice, so that a sample's choices do not depend on each other.
    """
    return (_whole(seed, *ref, what) >> 11) / 2**53


def _whole(*name: int | str) -> int:
    """A whole number of 64 bits, the same for ever."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8])
