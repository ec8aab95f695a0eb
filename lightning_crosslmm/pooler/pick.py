"""Poolers that pick tokens and look at nothing: every s-th, evenly spread, at random. The baselines of every selection.

They stand before the projector; projecting first would give the same tokens.

Axis letters:
    F  frames    K  kept tokens
"""

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Pooler, check_budget, grid_of
from lightning_crosslmm.pooler.regroup import keep
from lightning_crosslmm.tokens import TokenSet, frame_in_visual


class StridedPooler(Pooler):
    """Keep every s-th row of every s-th column: ``out[i, j] = in[offset + s i, offset + s j]``.

    Source: a plain baseline, the subsampling of a strided 1x1 convolution.
    Differs: nothing.

    Args:
        stride: s, 1 to the shorter side of the encoder's grid.
        offset: first row and column, 0 to ``stride - 1``; ``stride // 2`` is the middle of each window.
    """

    needs = frozenset({"grid"})

    def __init__(self, stride: int, offset: int = 0) -> None:
        super().__init__()
        self.stride, self.offset = stride, offset

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """Rows that are met times columns that are met."""
        if not 1 <= self.stride <= min(grid):
            raise UserError(
                f"pooler StridedPooler: pooler.stride is {self.stride}, the encoder gives {grid[0]}x{grid[1]} patches "
                f"per frame; it must be 1 to {min(grid)}"
            )
        if not 0 <= self.offset < self.stride:
            raise UserError(
                f"pooler StridedPooler: pooler.offset is {self.offset}; with pooler.stride={self.stride} it must be 0 "
                f"to {self.stride - 1}"
            )
        rows, columns = (len(self._places(side)) for side in grid)
        return rows * columns

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Keep the same places of each frame; what is left is a grid."""
        rows, columns = grid_of(self, tokens).shape[1:3]
        row_h, column_w = self._places(rows), self._places(columns)
        within_K = (row_h[:, None] * columns + column_w).flatten()
        kept_K = (tokens.frame_offsets[:-1, None] + within_K).flatten()
        count_F = torch.full((tokens.num_frames,), len(within_K))
        return keep(tokens, kept_K, count_F, (len(row_h), len(column_w)))

    def _places(self, size: int) -> Tensor:
        return torch.arange(self.offset, size, self.stride)


class UniformPooler(Pooler):
    """Keep k tokens of each frame, evenly spread over its raster: number ``floor((i + 1/2) N / k)`` of N.

    Source: a plain baseline of selection, of no paper in particular.
    Differs: published ones start at the first token or leave the rule open; here each stands in the middle of its
        stretch.

    Args:
        num_tokens: k, 1 to the encoder's patches. An irregular frame with fewer keeps all of them.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """k, checked against the encoder's patches."""
        check_budget(type(self).__name__, self.num_tokens, grid)
        return self.num_tokens

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Keep k of each frame, in the order they came in."""
        size_F = tokens.frame_offsets.diff()
        count_F = size_F.clamp(max=self.num_tokens)
        if torch.equal(count_F, size_F):
            return tokens
        return keep(tokens, self.places(tokens, size_F, count_F), count_F)

    def places(self, tokens: TokenSet, size_F: Tensor, count_F: Tensor) -> Tensor:
        """Choose `count_F` of the `size_F` tokens of each frame: (K,) int64 numbers of tokens, rising."""
        frame_K = torch.repeat_interleave(torch.arange(len(count_F)), count_F)
        number_K = torch.arange(len(frame_K)) - (count_F.cumsum(0) - count_F)[frame_K]
        return tokens.frame_offsets[frame_K] + (2 * number_K + 1) * size_F[frame_K] // (2 * count_F[frame_K])


class RandomPooler(UniformPooler):
    """Keep k tokens of each frame, drawn without replacement and left in raster order.

    In training each batch draws anew, in evaluation frame t of every visual keeps the same places, so that results can
    be repeated and do not depend on the company in a batch. Draws come from a generator of its own, seeded by `seed`
    and the number of training batches so far; that number is saved with the weights, so that a resumed run draws what
    the uninterrupted one would have. The global generator is not touched. Ranks draw alike.

    Source: a plain baseline of selection, of no paper in particular.
    Differs: nothing.

    Args:
        num_tokens: k, 1 to the encoder's patches. An irregular frame with fewer keeps all of them.
        seed: of the draws.
    """

    def __init__(self, num_tokens: int, seed: int = 0) -> None:
        super().__init__(num_tokens)
        self.seed, self._batches = seed, 0

    def places(self, tokens: TokenSet, size_F: Tensor, count_F: Tensor) -> Tensor:
        """Draw them."""
        noise = self._noise(2 * self._batches + 1)
        number_F = frame_in_visual(tokens.visual_offsets).tolist()
        kept = [torch.zeros(0, dtype=torch.int64)]
        counts = zip(tokens.frame_offsets.tolist(), size_F.tolist(), count_F.tolist(), number_F, strict=False)
        for start, size, count, number in counts:
            draw = noise if self.training else self._noise(2 * number)
            kept.append(start + torch.randperm(size, generator=draw)[:count].sort().values)
        self._batches += self.training
        return torch.cat(kept)

    def _noise(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)

    def get_extra_state(self) -> Tensor:
        """Save how many training batches have been drawn for."""
        return torch.tensor(self._batches)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there."""
        self._batches = int(state)
