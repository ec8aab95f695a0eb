"""The plan: which rows make which batch of which rank, for training and for everything else.

A batch is a list of ``Planned`` samples; workers are handed these lists and know nothing of ranks or epochs.
"""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from data.order import SampleRef
from data.packing import Row, Rows, balanced
from data.position import Place
from lightning_crosslmm.errors import UserError


class Planned(NamedTuple):
    """A sample to read, and the row of its batch that it goes into."""

    ref: SampleRef
    row: int


class TrainPlan:
    """One rank's batches of an epoch; a batch sampler.

    The rows of the epoch's chunks follow one another, and each ``global_batch`` of them are one global batch, whoever
    computes it; the last may be smaller. A global batch is cut into ``accumulate * world`` pieces of equally many rows
    and nearly as many slots; rank r reads pieces r, r + world, ... one after the other. How many rows an epoch has is
    known when its last chunk is planned, so the end is told with the last global batch and not before.

    Args:
        rows: of the epoch.
        global_batch: rows of one optimizer step over all ranks.
        rank: of this process among those that read different data.
        world: how many there are.
        accumulate: pieces of a global batch that a rank takes one after the other.
        start: where the first global batch to give begins.
        start_batch: its number in the epoch.
    """

    def __init__(
        self,
        rows: Rows,
        global_batch: int,
        rank: int,
        world: int,
        accumulate: int = 1,
        start: Place = Place(),  # noqa: B008 (immutable)
        start_batch: int = 0,
    ) -> None:
        if rows.num_samples < global_batch:
            raise UserError(
                f"data.global_batch_size: {rows.num_samples} samples make no batch of {global_batch}; "
                "lower the setting or give more samples"
            )
        self._rows, self._global_batch = rows, global_batch
        self._rank, self._world, self._accumulate = rank, world, accumulate
        self._start, self._start_batch = start, start_batch
        self._places = {start_batch: start}
        self._handed_out = start_batch * accumulate
        self._num_batches: int | None = None

    def __len__(self) -> int:
        """Most batches of this rank in the whole epoch, also when it starts later; exact where each row is a sample."""
        return ceil(self._rows.num_samples / self._global_batch) * self._accumulate

    def __iter__(self) -> Iterator[list[Planned]]:
        """Give this rank's batches, from the start on."""
        batches, batch = self._global_batches(), self._start_batch
        following = next(batches, None)
        while following is not None:
            (rows, end), following = following, next(batches, None)
            batch += 1
            self._places[batch] = end
            if following is None:
                self._num_batches = batch * self._accumulate
            pieces = balanced([row.slots for row in rows], self._accumulate * self._world)
            for piece in pieces[self._rank :: self._world]:
                yield [Planned(ref, row) for row, place in enumerate(piece) for ref in rows[place].samples]

    def _global_batches(self) -> Iterator[tuple[list[Row], Place]]:
        """Give the rows of each global batch, and where the next one begins."""
        rows: list[Row] = []
        for chunk in range(self._start.chunk, self._rows.num_chunks):
            planned = self._rows.chunk(chunk)
            row = self._start.row if chunk == self._start.chunk else 0
            while row < len(planned):
                taken = planned[row : row + self._global_batch - len(rows)]
                rows, row = rows + taken, row + len(taken)
                if len(rows) == self._global_batch:
                    yield rows, Place(chunk, row)
                    rows = []
        if rows:
            yield rows, Place(self._rows.num_chunks, 0)

    def place(self, batch: int) -> Place:
        """Say where a global batch begins that is being trained or comes next."""
        return self._places[batch]

    def hand_out(self) -> bool:
        """Note that one more batch was handed out; tells whether it is the epoch's last."""
        self._handed_out += 1
        trained = self._handed_out // self._accumulate - 1
        self._places = {batch: place for batch, place in self._places.items() if batch >= trained}
        return self._handed_out == self._num_batches


class EvalPlan:
    """One rank's batches of a split that is measured or answered: one sample per row, in the order of its shards.

    Global batch b is cut into contiguous pieces, one per rank; sizes differ by at most one. The samples that fill no
    global batch are the last one; if they are fewer than the ranks they join the batch before, because a rank without
    a sample would have nothing to answer.

    Args:
        order: of the split.
        global_batch: samples of a batch over all ranks.
        rank: of this process among those that read different data.
        world: how many there are.
    """

    def __init__(self, order: Sequence[SampleRef], global_batch: int, rank: int, world: int) -> None:
        self._order, self._global_batch, self._rank, self._world = order, global_batch, rank, world
        full, rest = divmod(len(order), global_batch)
        self._num_batches = full + (rest >= world)
        if self._num_batches == 0:
            raise UserError(
                f"data.global_batch_size: {len(order)} samples make no batch of {global_batch} for {world} rank(s); "
                "lower the setting or give more samples"
            )

    def __len__(self) -> int:
        """Batches of this rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[Planned]]:
        """Give this rank's batches."""
        for batch in range(self._num_batches):
            start = batch * self._global_batch
            is_last = batch == self._num_batches - 1
            size = len(self._order) - start if is_last else self._global_batch
            begin, end = (piece * size // self._world for piece in (self._rank, self._rank + 1))
            yield [Planned(self._order[start + place], place - begin) for place in range(begin, end)]

    def hand_out(self) -> bool:
        """Say that nobody needs to be told of the last batch: their number is known."""
        return False
