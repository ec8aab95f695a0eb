"""Packing: samples into rows up to a number of slots, planned from the index and not while samples arrive.

A slot is a position of the LLM's batch: a text token or a pooled token.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import ceil
from typing import NamedTuple, Protocol

from data.order import SampleRef, permutation
from lightning_crosslmm.conversation_members import TEXTS, visual_kind
from lightning_crosslmm.shards import SampleEntry
from lightning_crosslmm.video import FrameSampling

CHUNK_SAMPLES = 1024
"""Consecutive samples of an epoch's order whose rows are planned together; resuming plans one chunk."""

PLAN_VERSION = 1
"""Changes when the same settings and data would give other rows."""


class Row(NamedTuple):
    """Samples that share a row of the LLM's batch, and the slots they are estimated to take."""

    samples: tuple[SampleRef, ...]
    slots: int


class Index(Protocol):
    """Where entries are looked up; ``mixture.Mixture`` is one."""

    def entry(self, ref: SampleRef) -> SampleEntry:
        """Give the entry of a sample."""


@dataclass(frozen=True)
class SlotEstimate:
    """How many slots a sample takes, judged by its index entry alone.

    ``slots = ceil(text_bytes / bytes_per_token) + template(answers) + frames * tokens_per_frame``. With one byte per
    token and a count of tokens per frame that is no less than the pooler's, it is an upper bound.

    Args:
        bytes_per_token: UTF-8 bytes of text per token, above 0; 1 bounds any tokenizer that knows bytes.
        template: tokens that the chat template puts around a conversation of so many answers.
        sampling: which moments of a video become frames.
        tokens_per_frame: pooled tokens of a frame.
    """

    bytes_per_token: float
    template: Callable[[int], int]
    sampling: FrameSampling
    tokens_per_frame: int

    def of(self, entry: SampleEntry) -> int:
        """Estimate a sample's slots, at least 1."""
        kinds = [visual_kind(member) for member in entry.members if member not in TEXTS]
        num_images, num_videos = kinds.count("image"), kinds.count("video")
        num_frames = num_images + (self.sampling.most_frames(entry.duration_s, num_videos) if num_videos else 0)
        text = ceil(entry.text_bytes / self.bytes_per_token) + self.template(len(entry.answer_kinds))
        return max(1, text + num_frames * self.tokens_per_frame)


class Rows:
    """The rows of one epoch, chunk by chunk of its order; any chunk can be planned without those before it.

    Args:
        order: of the epoch.
        index: tells what a sample holds.
        estimate: judges a sample's slots; None where nobody asks, then every sample counts as one.
        pack_slots: most slots of a row of several samples; None puts every sample into a row of its own.
        name: names the epoch; rows of a chunk are permuted by it.
        prefetch: is told what is read next, when a chunk is planned: its samples and those of the following one.
    """

    def __init__(
        self,
        order: Sequence[SampleRef],
        index: Index,
        estimate: SlotEstimate | None,
        pack_slots: int | None,
        name: tuple[int | str, ...],
        prefetch: Callable[[Iterable[SampleRef]], None] | None = None,
    ) -> None:
        self._order, self._index, self._estimate = order, index, estimate
        self._pack_slots, self._name, self._prefetch = pack_slots, name, prefetch

    @property
    def num_samples(self) -> int:
        """Samples of the epoch: as many rows as there can be."""
        return len(self._order)

    @property
    def num_chunks(self) -> int:
        """Chunks of the epoch."""
        return ceil(self.num_samples / CHUNK_SAMPLES)

    def chunk(self, number: int) -> list[Row]:
        """Plan the rows of a chunk: at least one, every sample of the chunk in one of them."""
        refs = self._refs(number)
        if self._prefetch is not None:
            self._prefetch([*refs, *self._refs(number + 1)])
        slots = self._slots(refs)
        if self._pack_slots is None:
            return [Row((ref,), count) for ref, count in zip(refs, slots, strict=True)]
        rows = best_fit(slots, self._pack_slots)
        planned = [Row(tuple(refs[place] for place in row), sum(slots[place] for place in row)) for row in rows]
        return [planned[place] for place in permutation(len(planned), *self._name, "rows", number)]

    def _refs(self, number: int) -> list[SampleRef]:
        begin = number * CHUNK_SAMPLES
        return [self._order[place] for place in range(begin, min(begin + CHUNK_SAMPLES, self.num_samples))]

    def _slots(self, refs: Sequence[SampleRef]) -> list[int]:
        slots = [1] * len(refs)
        if self._estimate is not None:
            for place in sorted(range(len(refs)), key=refs.__getitem__):  # each shard's index is looked up once
                slots[place] = self._estimate.of(self._index.entry(refs[place]))
        return slots


def best_fit(slots: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into rows: the largest first, each into the fullest row that still has room for it, else a new one.

    An item larger than a row gets one to itself.

    Args:
        slots: of each item, above 0.
        capacity: of a row, above 0.

    Returns:
        For each row the places of its items, rising; rows by their first item.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (slots left, row), rising
    for item in sorted(range(len(slots)), key=lambda place: (-slots[place], place)):
        found = bisect_left(room, (slots[item], -1))
        left, row = room.pop(found) if found < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        if left > slots[item]:
            insort(room, (left - slots[item], row))
    return sorted(sorted(row) for row in rows)


def balanced(slots: Sequence[int], pieces: int) -> list[list[int]]:
    """Cut rows into pieces of equally many rows, so that their slots add up to nearly the same.

    The largest row that is left goes to the piece with the fewest slots among those that lack rows.

    Args:
        slots: of each row.
        pieces: how many, at least 1. Where rows do not divide by it, sizes differ by one and may be 0.

    Returns:
        For each piece the places of its rows, rising.
    """
    sizes = [(piece + 1) * len(slots) // pieces - piece * len(slots) // pieces for piece in range(pieces)]
    cut: list[list[int]] = [[] for _ in range(pieces)]
    open_pieces = [(0, piece) for piece in range(pieces) if sizes[piece]]
    heapify(open_pieces)
    for row in sorted(range(len(slots)), key=lambda place: (-slots[place], place)):
        load, piece = open_pieces[0]
        cut[piece].append(row)
        if len(cut[piece]) == sizes[piece]:
            heappop(open_pieces)
        else:
            heapreplace(open_pieces, (load + slots[row], piece))
    return [sorted(rows) for rows in cut]
