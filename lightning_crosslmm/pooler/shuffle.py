"""Pixel shuffle: windows of patches moved into channels; fewer and wider tokens, and nothing lost.

Axis letters:
    F  frames    H W  rows and columns of patches    h w  of windows    r  patches along a window    E  encoder width
"""

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pooler.base import Pooler, Stage, grid_of
from lightning_crosslmm.pooler.regroup import regroup
from lightning_crosslmm.tokens import TokenSet

ODD = ("pad", "crop")


class PixelShufflePooler(Pooler):
    """Put the patches of each r x r window behind one another in the channels, row by row.

    ``out[i, j] = [in[r i, r j], in[r i, r j + 1], ..., in[r i + r - 1, r j + r - 1]]``, of width ``r r E``; the
    projector is built for it.

    Source: InternVL 1.5, arXiv:2404.16821, section 3.1 ("pixel shuffle"), and its code's version v2.
    Differs: v1 of that code leaves rows and columns transposed and is not reproduced. There grids are even; a grid that
        r does not divide (27x27) is padded with zero patches below and to the right, or cropped there.

    Args:
        ratio: r, 1 to the shorter side of the encoder's grid; InternVL takes 2.
        odd: ``pad`` or ``crop`` where r does not divide the grid.
    """

    stages = (Stage.BEFORE_PROJECTOR,)
    needs = frozenset({"grid"})

    def __init__(self, ratio: int = 2, odd: str = "pad") -> None:
        super().__init__()
        if odd not in ODD:
            raise UserError(f"pooler.odd is '{odd}'; right are {', '.join(ODD)}{nearest(odd, ODD)}")
        self.ratio, self.odd = ratio, odd

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Widen by r r."""
        return in_width * self.ratio**2

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """Windows of a frame."""
        if not 1 <= self.ratio <= min(grid):
            raise UserError(
                f"pooler PixelShufflePooler: pooler.ratio is {self.ratio}, the encoder gives {grid[0]}x{grid[1]} "
                f"patches per frame; it must be 1 to {min(grid)}"
            )
        rows, columns = self._windows(grid)
        return rows * columns

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Shuffle each frame; the grid of the result is that of the windows."""
        grid_FHWE = grid_of(self, tokens)
        height, width = grid_FHWE.shape[1:3]
        rows, columns = self._windows((height, width))
        # a negative pad crops
        below, beside = rows * self.ratio - height, columns * self.ratio - width
        whole_FHWE = nn.functional.pad(grid_FHWE, (0, 0, 0, beside, 0, below))
        split_FhrwrE = whole_FHWE.unflatten(1, (rows, self.ratio)).unflatten(3, (columns, self.ratio))
        wide_SE = split_FhrwrE.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2)
        slot_N = self._slots((height, width), (rows, columns))
        slot_FN = slot_N + rows * columns * torch.arange(tokens.num_frames)[:, None]
        slot_S = slot_FN.where(slot_N >= 0, -1).flatten()
        count_F = torch.full((tokens.num_frames,), rows * columns)
        return regroup(tokens, wide_SE, slot_S, count_F, (rows, columns))

    def _windows(self, grid: tuple[int, int]) -> tuple[int, int]:
        if self.odd == "crop":
            return grid[0] // self.ratio, grid[1] // self.ratio
        return -(-grid[0] // self.ratio), -(-grid[1] // self.ratio)

    def _slots(self, grid: tuple[int, int], windows: tuple[int, int]) -> Tensor:
        """(N,) int64, the window of each patch of a frame, -1 where it was cropped."""
        row_H1, column_W = torch.arange(grid[0])[:, None] // self.ratio, torch.arange(grid[1]) // self.ratio
        inside_HW = (row_H1 < windows[0]) & (column_W < windows[1])
        return (row_H1 * windows[1] + column_W).where(inside_HW, -1).flatten()
