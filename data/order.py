"""Order and position: which samples make which batch, as pure functions of a handful of integers.

Nothing is drawn from a running generator and nothing is buffered, so any batch of any epoch can be named without
making those before it. That is what makes resuming exact, and independent of the number of ranks and workers.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np

from lightning_crosslmm.errors import UserError


class SampleRef(NamedTuple):
    """Names a sample: the number of its shard in the set, and its place in the shard."""

    shard: int
    sample: int


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
        self._name = (seed, epoch, fingerprint)
        self._shuffle = shuffle
        sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self._shards = _permutation(len(sizes), *self._name, "shards") if shuffle else np.arange(len(sizes))
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
        return SampleRef(int(self._shards[slot]), place - first)

    def _read_window(self, window: int) -> np.ndarray:
        start = self._window_ends[window - 1] if window else 0
        return _permutation(self._window_ends[window] - start, *self._name, window)


def _permutation(length: int, *name: int | str) -> np.ndarray:
    """Permute 0..length-1, the same for ever: numpy promises its bit generators' words, not what ``shuffle`` does."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return np.argsort(np.random.PCG64(int.from_bytes(digest)).random_raw(length), kind="stable")


class GlobalBatches:
    """One rank's share of an epoch's global batches; a batch sampler.

    Global batch b is ``order[b * G : (b + 1) * G]``, whoever computes it. It is cut into ``accumulate * world``
    contiguous pieces, piece i from ``i * G // pieces``, so sizes differ by at most one; rank r reads pieces r,
    r + world, ... one after the other. For every world and every accumulation the pieces make up the same batch.

    Args:
        order: of the epoch.
        global_batch: samples of one optimiser step over all ranks, G.
        rank: of this process among those that read different data.
        world: how many there are.
        start_batch: first global batch to give.
        drop_last: leave out the samples that fill no batch. Otherwise they are the last one; if they are fewer than its
            pieces they join the batch before, because a rank without a sample would have nothing to run.
        accumulate: pieces of a global batch that a rank takes one after the other.
    """

    def __init__(
        self,
        order: Sequence[SampleRef],
        global_batch: int,
        rank: int,
        world: int,
        start_batch: int = 0,
        drop_last: bool = True,
        accumulate: int = 1,
    ) -> None:
        self._order = order
        self._global_batch = global_batch
        self._rank, self._world, self._accumulate = rank, world, accumulate
        self._start_batch = start_batch
        full, rest = divmod(len(order), global_batch)
        keeps_rest = not drop_last and rest >= world * accumulate
        self.num_global_batches = full + keeps_rest
        self._end = full * global_batch if drop_last else len(order)
        if self.num_global_batches == 0:
            raise UserError(
                f"data.global_batch_size: {len(order)} samples make no batch of {global_batch} for {world} rank(s); "
                "lower the setting or give more samples"
            )

    def __len__(self) -> int:
        """Batches of this rank in the whole epoch, also when it starts later: Lightning counts from the beginning."""
        return self.num_global_batches * self._accumulate

    def __iter__(self) -> Iterator[list[SampleRef]]:
        """Give this rank's samples, from ``start_batch`` on."""
        pieces = self._accumulate * self._world
        for batch in range(self._start_batch, self.num_global_batches):
            start = batch * self._global_batch
            is_last = batch == self.num_global_batches - 1
            size = self._end - start if is_last else self._global_batch
            for piece in range(self._rank, pieces, self._world):
                begin, end = piece * size // pieces, (piece + 1) * size // pieces
                yield [self._order[start + place] for place in range(begin, end)]


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: equal on every rank, whatever their number, as long as the batch stays.

    Args:
        seed: of the order.
        epoch: counted from 0.
        batch: global batches of this epoch that have been trained.
        global_batch: samples per batch over all ranks.
        fingerprint: of the shard set.
        version: of this record.
    """

    seed: int
    epoch: int
    batch: int
    global_batch: int
    fingerprint: str
    version: int = 1

    def advance(self, batches: int = 1) -> Self:
        """Stand that many batches later in the same epoch."""
        return replace(self, batch=self.batch + batches)

    def next_epoch(self) -> Self:
        """Stand at the beginning of the following epoch."""
        return replace(self, epoch=self.epoch + 1, batch=0)

    def to_dict(self) -> dict[str, int | str]:
        """Write the record with plain types, as a checkpoint that runs no code can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: a field is absent, unknown, of another type or negative, or the version is another.
        """
        names = {field.name: field.type for field in fields(cls)}
        if not isinstance(record, dict) or set(record) != set(names):
            raise UserError(
                f"data position in the checkpoint: expected the fields {sorted(names)}, got {record!r:.200}"
            )
        for name, kind in names.items():
            if type(record[name]) is not kind or (kind is int and name != "seed" and record[name] < 0):
                raise UserError(
                    f"data position in the checkpoint: '{name}' must be {kind.__name__}, got {record[name]!r}"
                )
        if record["version"] != cls.version:
            raise UserError(
                f"data position in the checkpoint: its version is {record['version']}, this code reads {cls.version}"
            )
        return cls(**record)
