"""Work on many rows, some at a time, so that what lies between input and result never stands there for all of them.

Axis letters:
    S  rows    X  whatever follows
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PIECES, _LEAST_ROWS = 32, 512  # what one piece adds is little next to the whole, and worth a call


def pieces_of(rows_SX: Tensor) -> Sequence[Tensor]:
    """Split rows for `in_pieces`: not at all where gradients are wanted, which keep everything anyway."""
    if torch.is_grad_enabled():
        return (rows_SX,)
    return rows_SX.split(max(_LEAST_ROWS, -(-len(rows_SX) // _PIECES)))


def in_pieces(work: Callable[[Tensor], tuple[Tensor, ...]], pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Do some work on each piece and join what it gives; without gradients nothing is held twice.

    Args:
        work: gives tensors of as many rows as it gets.
        pieces: rows of one tensor, in their order; one or more.

    Returns:
        What `work` would give for all rows at once.
    """
    if len(pieces) == 1:
        return work(pieces[0])
    if torch.is_grad_enabled():
        return tuple(torch.cat(parts) for parts in zip(*(work(piece) for piece in pieces), strict=True))
    num_rows, end = sum(map(len, pieces)), 0
    whole: tuple[Tensor, ...] = ()
    for piece in pieces:
        parts = work(piece)
        whole = whole or tuple(part.new_empty(num_rows, *part.shape[1:]) for part in parts)
        for all_rows, part in zip(whole, parts, strict=True):
            all_rows[end : end + len(piece)] = part
        end += len(piece)
    return whole
