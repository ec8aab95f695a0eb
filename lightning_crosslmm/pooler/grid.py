"""Poolers on the raster grid of a frame: averages over windows, and bilinear interpolation.

Both are linear and separable, ``out = R in C^T`` with a row matrix R and a column matrix C, so one class holds what
they share and each arm only says its one-dimensional weights. The weights are the source map, too.

Axis letters:
    F  frames    H W  rows and columns of patches    h w  rows and columns of pooled tokens    D  width    S  tokens
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_crosslmm.pooler.base import Pooler, Stage, check_grid, grid_of
from lightning_crosslmm.tokens import (
    Partition,
    SourceMap,
    TokenSet,
    Weighted,
    compose,
    frame_in_visual,
    grid_coordinates,
)


class GridPooler(Pooler):
    """Resample every frame's grid with fixed weights per row and column.

    Args:
        rows: pooled rows per frame, 1 to the encoder's.
        columns: pooled columns per frame, 1 to the encoder's; None means as many as rows.
        stage: where it acts.
    """

    needs = frozenset({"grid"})

    def __init__(self, rows: int, columns: int | None = None, stage: str = Stage.BEFORE_PROJECTOR) -> None:
        super().__init__(stage)
        self.rows, self.columns = rows, rows if columns is None else columns
        self._tables: dict[tuple[tuple[int, int], torch.device], _Tables] = {}

    def weights(self, size_in: int, size_out: int) -> Tensor:
        """(size_out, size_in) float32 weights along one axis; each row sums to 1."""
        raise NotImplementedError

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """Count rows x columns, checked against the encoder's grid."""
        check_grid(type(self).__name__, self.rows, self.columns, grid)
        return self.rows * self.columns

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Pool each frame; the grid of the result is (rows, columns)."""
        grid_FHWD = grid_of(self, tokens)
        height, width = grid_FHWD.shape[1:3]
        tables = self._tables_for((height, width), grid_FHWD.device)
        per_frame = self.rows * self.columns
        count = tokens.num_frames * per_frame
        scale = (height / self.rows, width / self.columns)
        place_S3 = grid_coordinates(frame_in_visual(tokens.visual_offsets), (self.rows, self.columns), scale)
        return replace(
            tokens,
            features_SD=self._resampled(grid_FHWD, tables).flatten(0, 2),
            frame_offsets=torch.arange(tokens.num_frames + 1) * per_frame,
            coordinate_S3=place_S3.to(grid_FHWD.device),
            mass_S=tokens.mass_S.new_full((count,), scale[0] * scale[1]),
            grid=(self.rows, self.columns),
            source_map=compose(tokens.source_map, tables.map_of(tokens.num_frames)),
        )

    def _resampled(self, grid_FHWD: Tensor, tables: "_Tables") -> Tensor:
        pooled_FhWD = torch.einsum("hH,FHWD->FhWD", tables.rows_hH.to(grid_FHWD.dtype), grid_FHWD)
        return torch.einsum("wW,FhWD->FhwD", tables.columns_wW.to(grid_FHWD.dtype), pooled_FhWD)

    def _tables_for(self, grid: tuple[int, int], device: torch.device) -> "_Tables":
        # made once per grid and device, on the CPU: nothing in the forward pass waits for the accelerator
        if (grid, device) not in self._tables:
            rows_hH, columns_wW = self.weights(grid[0], self.rows), self.weights(grid[1], self.columns)
            weight_pn = torch.kron(rows_hH, columns_wW)
            pooled_e, source_e = weight_pn.nonzero(as_tuple=True)
            entry_e = weight_pn[pooled_e, source_e]
            # a partition means averages: each source once, and equal weights within a pooled token
            mean_e = 1.0 / torch.bincount(pooled_e, minlength=len(weight_pn))[pooled_e]
            covers_once = len(source_e) == weight_pn.shape[1] == len(source_e.unique())
            is_partition = covers_once and torch.allclose(entry_e, mean_e)
            self._tables[grid, device] = _Tables(
                rows_hH=rows_hH.to(device),
                columns_wW=columns_wW.to(device),
                pooled_e=pooled_e.to(device),
                source_e=source_e.to(device),
                weight_e=entry_e.to(device),
                num_pooled=len(weight_pn),
                num_sources=weight_pn.shape[1],
                is_partition=is_partition,
            )
        return self._tables[grid, device]


@dataclass(frozen=True)
class _Tables:
    """Weights along rows and columns, and the source map of one frame as entries e of (pooled, source, weight)."""

    rows_hH: Tensor
    columns_wW: Tensor
    pooled_e: Tensor
    source_e: Tensor
    weight_e: Tensor
    num_pooled: int
    num_sources: int
    is_partition: bool

    def map_of(self, num_frames: int) -> SourceMap:
        """Repeat the map of one frame for all frames."""
        frame_F1 = torch.arange(num_frames, device=self.pooled_e.device)[:, None]
        pooled_E = (frame_F1 * self.num_pooled + self.pooled_e).flatten()
        source_E = (frame_F1 * self.num_sources + self.source_e).flatten()
        if self.is_partition:
            table_S = torch.empty_like(pooled_E).scatter(0, source_E, pooled_E)
            return Partition(table_S, num_frames * self.num_pooled)
        weight_E = self.weight_e.repeat(num_frames)
        return Weighted(pooled_E, source_E, weight_E, num_frames * self.num_pooled, num_frames * self.num_sources)


class AveragePooler(GridPooler):
    """Average each frame over a grid of windows.

    ``out[i] = mean(in[floor(i H / h) : ceil((i+1) H / h)])`` along rows and columns; windows overlap by one patch where
    h does not divide H.

    Source: CrossLMM, arXiv:2505.17020v1, section 3.2 ("bilinear pooling", non-overlapping fusion of adjacent patches).
    Differs: the text says both N/9 tokens and 27x27 -> 3x3 = 9 tokens; the tables use 1, 9 and 16 tokens per frame, so
        we read the factor as the output grid (rows=1, 3, 4). Average and not interpolation is the default, because
        interpolating 27 -> 3 copies nine patches and averages nothing (see `BilinearPooler`).

    Args:
        rows: pooled rows per frame.
        columns: pooled columns per frame; None means as many as rows.
        stage: where it acts.
    """

    def weights(self, size_in: int, size_out: int) -> Tensor:
        """Mean over each output cell's window."""
        cell = torch.arange(size_out)
        start, end = cell * size_in // size_out, -(-(cell + 1) * size_in // size_out)
        place = torch.arange(size_in)
        inside = (place >= start[:, None]) & (place < end[:, None])
        return inside / inside.sum(dim=1, keepdim=True)


class MaxPooler(AveragePooler):
    """Take the largest value of each channel in each window of the grid; windows as in `AveragePooler`.

    Source: the "max" mode of LLaVA-NeXT's video code, a plain baseline.
    Differs: there after the projector and with windows of 2x2; here any grid and either stage. The source map names the
        patches of the window, though each channel comes from one of them.

    Args:
        rows: pooled rows per frame.
        columns: pooled columns per frame; None means as many as rows.
        stage: where it acts.
    """

    def _resampled(self, grid_FHWD: Tensor, tables: "_Tables") -> Tensor:
        pooled_FDhw = nn.functional.adaptive_max_pool2d(grid_FHWD.permute(0, 3, 1, 2), (self.rows, self.columns))
        return pooled_FDhw.permute(0, 2, 3, 1)


class BilinearPooler(GridPooler):
    """Interpolate each frame bilinearly to a smaller grid, as ``torch.nn.functional.interpolate`` does.

    Source: CrossLMM, arXiv:2505.17020v1, section 3.2, read literally; without `antialias` it is the "bilinear" mode of
        LLaVA-NeXT's code.
    Differs: nothing; but mind that without `antialias` 27 -> 3 reads the patches 4, 13 and 22 of each axis and ignores
        the rest.

    Args:
        rows: pooled rows per frame.
        columns: pooled columns per frame; None means as many as rows.
        antialias: widen the triangle to the scale, so that every patch counts.
        stage: where it acts.
    """

    def __init__(
        self, rows: int, columns: int | None = None, antialias: bool = False, stage: str = Stage.BEFORE_PROJECTOR
    ) -> None:
        super().__init__(rows, columns, stage)
        self.antialias = antialias

    def weights(self, size_in: int, size_out: int) -> Tensor:
        """Interpolate the unit vectors: torch itself says what its weights are."""
        unit_1I1I = torch.eye(size_in)[None, :, None, :]  # every input place is a channel with a 1 in one column
        out_1I1O = nn.functional.interpolate(
            unit_1I1I, size=(1, size_out), mode="bilinear", align_corners=False, antialias=self.antialias
        )
        return out_1I1O[0, :, 0].T.contiguous()
