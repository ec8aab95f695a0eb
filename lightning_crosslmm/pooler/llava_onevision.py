"""LLaVA-OneVision's own pooling: videos to about a quarter, images whole and in tiles, and a newline token.

Axis letters:
    F  frames of a visual    H W  rows and columns of patches    h w  rows and columns of pooled tokens    D  width
    P  pooled tokens    E e  entries of a source map, and of one raster's    I O  places of an axis, before and after
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from lightning_crosslmm.pooler.base import Pooler, Stage, check_positive, grid_of
from lightning_crosslmm.tokens import TokenSet, Weighted, compose, grid_coordinates

_SHRINK_FROM = 1.1  # a mosaic that is larger than `max_tiles` allows by less than this, per side, stays as it is


class LlavaOnevisionPooler(Pooler):
    """Halve every frame of a video bilinearly; keep images, with a newline after each row of what their tiles show.

    A video of F frames of H x W tokens becomes ``F ceil(H/2) ceil(W/2) + 1`` tokens, the last one a learned newline. An
    image without tiles keeps its H W tokens and gets one newline. One with tiles keeps the H W tokens of the whole and
    then those of all tiles as one mosaic, less the rows or columns that only padding shows, shrunk bilinearly to about
    ``max_tiles H W`` tokens where it has more, a newline behind each of its rows.

    Source: LLaVA-OneVision, arXiv:2408.03326, section 3.2, in the form of the checkpoints for transformers
        (``LlavaOnevisionModel``), whose logits it reproduces.
    Differs: from transformers in nothing; the paper tells of no newlines. The mosaic counts as tokens of the image's
        first tile, and its coordinates are those of the mosaic.

    Args:
        max_tiles: size of a mosaic, in tokens of whole tiles, past which it shrinks; the checkpoints' ``anyres_max_9``.
    """

    stages = (Stage.AFTER_PROJECTOR,)
    needs = frozenset({"grid"})

    def __init__(self, max_tiles: int = 9) -> None:
        super().__init__(Stage.AFTER_PROJECTOR)
        check_positive(type(self).__name__, max_tiles=max_tiles)
        self.max_tiles = max_tiles

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make the newline."""
        self.newline_D = nn.Parameter(torch.randn(llm_width) / math.sqrt(llm_width))
        return in_width

    def tokens_per_frame(self, grid: tuple[int, int]) -> None:
        """It depends on what the frame belongs to."""

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Pool visual by visual."""
        grid_FHWD = grid_of(self, tokens)
        number_FHW = torch.arange(tokens.num_tokens, device=grid_FHWD.device).view(grid_FHWD.shape[:3])
        video = (0, 0, 0, 0)
        pictures = [video] * tokens.num_visuals if tokens.picture_V4 is None else tokens.picture_V4.tolist()
        bounds, parts = tokens.visual_offsets.tolist(), []
        for start, end, picture in zip(bounds, bounds[1:], pictures, strict=False):
            if start < end:
                parts += self._parts(grid_FHWD[start:end], number_FHW[start:end], *picture)
        return _joined(tokens, parts) if parts else tokens

    def _parts(
        self, grid_FHWD: Tensor, number_FHW: Tensor, height: int, width: int, rows: int, columns: int
    ) -> list["_Part"]:
        num_frames, grid = len(grid_FHWD), (grid_FHWD.shape[1], grid_FHWD.shape[2])
        if height == 0:
            half = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
            pooled = _resized(grid_FHWD, number_FHW, half)
            return [pooled.with_newlines(pooled.num_tokens, self.newline_D)]
        whole = _resized(grid_FHWD[:1], number_FHW[:1], grid)
        if num_frames == 1:
            return [whole.with_newlines(whole.num_tokens, self.newline_D)]
        mosaic_1HWD, number_1HW = (_mosaic(each[1:], rows, columns) for each in (grid_FHWD, number_FHW[..., None]))
        shown = (slice(None), *_shown((rows * grid[0], columns * grid[1]), height, width))
        mosaic_1HWD, number_1HW = mosaic_1HWD[shown], number_1HW[shown].squeeze(-1)
        size = (mosaic_1HWD.shape[1], mosaic_1HWD.shape[2])
        ratio = math.sqrt(size[0] * size[1] / (self.max_tiles * grid[0] * grid[1]))
        if ratio > _SHRINK_FROM:
            size = (int(size[0] // ratio), int(size[1] // ratio))
        details = _resized(mosaic_1HWD, number_1HW, size, first_frame=1).with_newlines(size[1], self.newline_D)
        return [whole, replace(details, count_F=[*details.count_F, *[0] * (num_frames - 2)])]


@dataclass(frozen=True)
class _Part:
    """Pooled tokens of some frames in a row, their places and masses, the entries of their map, tokens per frame."""

    features_PD: Tensor
    coordinate_P3: Tensor
    mass_P: Tensor
    pooled_E: Tensor
    source_E: Tensor
    weight_E: Tensor
    count_F: list[int]

    @property
    def num_tokens(self) -> int:
        """P."""
        return len(self.features_PD)

    def with_newlines(self, every: int, newline_D: Tensor) -> "_Part":
        """Put a newline behind every so many tokens, one column to the right; the last frame owns them."""
        rows_PeD = self.features_PD.view(-1, every, self.features_PD.shape[-1])
        newlines_P1D = newline_D.to(rows_PeD.dtype).expand(len(rows_PeD), 1, -1)
        place_Pe3 = self.coordinate_P3.view(-1, every, 3)
        right_P13 = place_Pe3[:, -1:] + place_Pe3.new_tensor([0.0, 0.0, 1.0])
        return replace(
            self,
            features_PD=torch.cat([rows_PeD, newlines_P1D], dim=1).flatten(0, 1),
            coordinate_P3=torch.cat([place_Pe3, right_P13], dim=1).flatten(0, 1),
            mass_P=nn.functional.pad(self.mass_P.view(-1, every), (0, 1)).flatten(),
            pooled_E=self.pooled_E + self.pooled_E // every,
            count_F=[*self.count_F[:-1], self.count_F[-1] + len(rows_PeD)],
        )


def _resized(grid_FHWD: Tensor, number_FHW: Tensor, size: tuple[int, int], first_frame: int = 0) -> _Part:
    """Bring rasters to another size, bilinearly; `number_FHW` names the source token at each place."""
    num_frames, rows, columns, width = grid_FHWD.shape
    device, count = grid_FHWD.device, size[0] * size[1]
    if size != (rows, columns):
        resized_FDhw = nn.functional.interpolate(grid_FHWD.permute(0, 3, 1, 2), size=size, mode="bilinear")
        grid_FHWD = resized_FDhw.permute(0, 2, 3, 1)
    pooled_e, source_e, weight_e = (each.to(device) for each in _entries((rows, columns), size))
    frame_F1 = torch.arange(num_frames, device=device)[:, None]
    scale = (rows / size[0], columns / size[1])
    return _Part(
        features_PD=grid_FHWD.reshape(-1, width),
        coordinate_P3=grid_coordinates(first_frame + torch.arange(num_frames), size, scale).to(device),
        mass_P=torch.full((num_frames * count,), scale[0] * scale[1], device=device),
        pooled_E=(frame_F1 * count + pooled_e).flatten(),
        source_E=number_FHW.flatten()[(frame_F1 * rows * columns + source_e).flatten()],
        weight_E=weight_e.repeat(num_frames),
        count_F=[count] * num_frames,
    )


@lru_cache(maxsize=64)
def _entries(size_in: tuple[int, int], size_out: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Say which places of a raster each place of the resized one is made of: pooled, source and weight, on the CPU."""
    with torch.device("cpu"):
        (row_in, row_out), (column_in, column_out) = zip(size_in, size_out, strict=True)
        rows_OI, columns_OI = _weights(row_in, row_out), _weights(column_in, column_out)
        (y_out, y_in), (x_out, x_in) = (each.nonzero(as_tuple=True) for each in (rows_OI, columns_OI))
        pooled_ee, source_ee = (y_out[:, None] * column_out + x_out, y_in[:, None] * column_in + x_in)
        weight_ee = rows_OI[y_out, y_in][:, None] * columns_OI[x_out, x_in]
        return pooled_ee.flatten(), source_ee.flatten(), weight_ee.flatten()


def _weights(size_in: int, size_out: int) -> Tensor:
    unit_1I1I = torch.eye(size_in)[None, :, None, :]  # every place is a channel with a 1 in one column
    out_1I1O = nn.functional.interpolate(unit_1I1I, size=(1, size_out), mode="bilinear")
    return out_1I1O[0, :, 0].T.contiguous()


def _mosaic(tiles_FHWD: Tensor, rows: int, columns: int) -> Tensor:
    """Lay tiles out as one raster: (rows x columns, H, W, D) to (1, rows H, columns W, D)."""
    _, height, width, channels = tiles_FHWD.shape
    tiles_RCHWD = tiles_FHWD.view(rows, columns, height, width, channels)
    return tiles_RCHWD.transpose(1, 2).reshape(1, rows * height, columns * width, channels)


def _shown(size: tuple[int, int], height: int, width: int) -> tuple[slice, slice]:
    """Cut off what only padding shows: rows and columns of a mosaic of `size` that holds a height x width image."""
    rows, columns = size
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(cut, rows - cut), slice(None)
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(cut, columns - cut)


def _joined(tokens: TokenSet, parts: list[_Part]) -> TokenSet:
    """Put the parts of all visuals one after the other."""
    ends = torch.tensor([0, *(part.num_tokens for part in parts)]).cumsum(0).tolist()
    pooled_E = torch.cat([part.pooled_E + end for part, end in zip(parts, ends, strict=False)])
    source_E, weight_E = torch.cat([part.source_E for part in parts]), torch.cat([part.weight_E for part in parts])
    return replace(
        tokens,
        features_SD=torch.cat([part.features_PD for part in parts]),
        frame_offsets=torch.tensor([0, *(count for part in parts for count in part.count_F)]).cumsum(0),
        coordinate_S3=torch.cat([part.coordinate_P3 for part in parts]),
        mass_S=torch.cat([part.mass_P for part in parts]),
        grid=None,
        source_map=compose(tokens.source_map, Weighted(pooled_E, source_E, weight_E, ends[-1], tokens.num_tokens)),
    )
