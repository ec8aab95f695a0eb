"""Poolers that spread their tokens unevenly over time: fine and coarse frames, and merging across frames.

Axis letters:
    F  frames    N  tokens of a frame    S  tokens of the set    P  pooled tokens    D  width
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Pooler, Stage, check_grid, check_positive, grid_of
from lightning_crosslmm.pooler.grid import AveragePooler
from lightning_crosslmm.pooler.regroup import keep, merge
from lightning_crosslmm.tokens import Opaque, Partition, SourceMap, TokenSet, Weighted, frame_in_visual


class SlowFastPooler(Pooler):
    """Give every s-th frame of a visual a fine grid and the frames between a coarse one, in the order of time.

    Source: LLaVA-Video, arXiv:2410.02713 (SlowFast representation, frames interleaved).
    Differs: there the windows are p x p and 2p x 2p and each frame ends with a learned separator; here both grids are
        free, there is no separator (frames may carry their time, `fusion.frame_time`), and it may act before the
        projector. The released code has this path commented out.

    Args:
        every: s, 1 or more; frames 0, s, 2 s, ... of each visual are fine.
        rows: of a fine frame.
        columns: of a fine frame; None means as many as rows.
        fast_rows: of a coarse frame.
        fast_columns: of a coarse frame; None means as many as rows.
        stage: where it acts.
    """

    needs = frozenset({"grid"})

    def __init__(
        self,
        every: int,
        rows: int,
        columns: int | None = None,
        fast_rows: int = 1,
        fast_columns: int | None = None,
        stage: str = Stage.BEFORE_PROJECTOR,
    ) -> None:
        super().__init__(stage)
        check_positive(type(self).__name__, every=every)
        self.every = every
        self.slow, self.fast = AveragePooler(rows, columns), AveragePooler(fast_rows, fast_columns)

    def tokens_per_frame(self, grid: tuple[int, int]) -> None:
        """It depends on the frame; both grids are checked."""
        check_grid(type(self).__name__, self.slow.rows, self.slow.columns, grid)
        check_grid(type(self).__name__, self.fast.rows, self.fast.columns, grid, "fast_")

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Pool both ways and take each frame from one of them."""
        grid_of(self, tokens)
        if self.every == 1:
            return self.slow(tokens)
        is_slow_F = frame_in_visual(tokens.visual_offsets) % self.every == 0
        return _interleave(
            _frames(self.slow(tokens), is_slow_F), _frames(self.fast(tokens), ~is_slow_F), tokens.num_frames
        )


def _frames(tokens: TokenSet, wanted_F: Tensor) -> TokenSet:
    size_F = tokens.frame_offsets.diff()
    kept_K = torch.repeat_interleave(wanted_F, size_F).nonzero().flatten()
    return keep(tokens, kept_K, size_F * wanted_F)


def _interleave(first: TokenSet, second: TokenSet, num_frames: int) -> TokenSet:
    """Put two sets over the same frames together, each frame from one of them."""
    count_F = first.frame_offsets.diff() + second.frame_offsets.diff()
    frame_F = torch.arange(num_frames)
    frame_P = torch.cat([torch.repeat_interleave(frame_F, each.frame_offsets.diff()) for each in (first, second)])
    order_P = frame_P.argsort(stable=True)
    place_P = order_P.argsort().to(first.features_SD.device)  # where each token of the two, one after the other, goes
    order_P = order_P.to(first.features_SD.device)
    return replace(
        first,
        features_SD=torch.cat([first.features_SD, second.features_SD])[order_P],
        coordinate_S3=torch.cat([first.coordinate_S3, second.coordinate_S3])[order_P],
        mass_S=torch.cat([first.mass_S, second.mass_S])[order_P],
        frame_offsets=torch.cat([count_F.new_zeros(1), count_F.cumsum(0)]),
        source_map=_joined(first.source_map, second.source_map, place_P),
    )


def _joined(first: SourceMap, second: SourceMap, place_P: Tensor) -> SourceMap:
    if isinstance(first, Opaque) or isinstance(second, Opaque):
        return Opaque(len(place_P), first.num_sources)
    if isinstance(first, Partition) and isinstance(second, Partition):
        # no source is in both; a last place catches the -1 of dropped ones
        place_P = torch.cat([place_P, place_P.new_tensor([-1])])
        of_second_S = second.pooled_of_source_S + first.num_pooled
        both_S = torch.where(second.pooled_of_source_S >= 0, of_second_S, first.pooled_of_source_S)
        return Partition(place_P[both_S], len(place_P) - 1)
    one, other = first.weighted(), second.weighted()
    return Weighted(
        place_P[torch.cat([one.pooled_E, other.pooled_E + one.num_pooled])],
        torch.cat([one.source_E, other.source_E]),
        torch.cat([one.weight_E, other.weight_E]),
        len(place_P),
        one.num_sources,
    )


class TemporalMergePooler(Pooler):
    """Merge tokens of the same place over t consecutive frames, all of them or only those that look alike.

    Frames of a visual are taken in groups of t (the last may be shorter). A token of a later frame goes into that of
    the group's first frame if ``cos(x[f, n], x[first, n]) >= threshold``, and the result is their mean; frames that
    were merged away keep no token.

    Source: STORM, arXiv:2503.04130 (temporal and spatial average pooling, here without its mixer), and
        with a threshold LongVU, arXiv:2410.17434 (spatial token compression against a window's first
        frame).
    Differs: LongVU drops tokens like their anchor and cuts what is still too much; here they are averaged, mass is
        conserved, and the count depends on the clip. STORM's spatial pooling comes before and by `rows`.

    Args:
        frames: t, 1 or more; 1 merges nothing.
        threshold: least cosine similarity, -1 to 1; None merges everything of the group.
        rows: average each frame to so many rows first; None leaves it as it is.
        columns: as in `AveragePooler`, with `rows`.
        stage: where it acts.
    """

    needs = frozenset({"grid"})

    def __init__(
        self,
        frames: int,
        threshold: float | None = None,
        rows: int | None = None,
        columns: int | None = None,
        stage: str = Stage.BEFORE_PROJECTOR,
    ) -> None:
        super().__init__(stage)
        check_positive(type(self).__name__, frames=frames)
        if threshold is not None and not -1 <= threshold <= 1:
            raise UserError(f"pooler.threshold is {threshold}; a cosine similarity lies between -1 and 1, null is none")
        if rows is None and columns is not None:
            raise UserError(f"pooler.columns is {columns} without pooler.rows; set both, or neither")
        self.frames, self.threshold = frames, threshold
        self.spatial = None if rows is None else AveragePooler(rows, columns)

    def tokens_per_frame(self, grid: tuple[int, int]) -> int | None:
        """It depends on the clip, unless nothing is merged."""
        if self.spatial is not None:
            check_grid(type(self).__name__, self.spatial.rows, self.spatial.columns, grid)
            grid = self.spatial.rows, self.spatial.columns
        return grid[0] * grid[1] if self.frames == 1 else None

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Merge; with a threshold this waits for the accelerator, because the counts depend on what it sees."""
        grid_of(self, tokens)
        tokens = tokens if self.spatial is None else self.spatial(tokens)
        if self.frames == 1:
            return tokens
        number_F = frame_in_visual(tokens.visual_offsets)
        first_F = torch.arange(tokens.num_frames) - number_F % self.frames
        grid_FND = tokens.as_grid().flatten(1, 2)
        is_like_FN = torch.ones(grid_FND.shape[:2], dtype=torch.bool)
        if self.threshold is not None:
            # normalised by itself, a token is like itself only up to rounding; the first of a group has no choice
            unit_FND = nn.functional.normalize(grid_FND.detach().float(), dim=-1)
            is_like_FN = (unit_FND * unit_FND[first_F]).sum(dim=-1).cpu() >= self.threshold
        token_FN = torch.arange(tokens.num_tokens).view(grid_FND.shape[:2])
        owner_FN = token_FN[first_F].where(is_like_FN, token_FN)
        is_owner_FN = owner_FN == token_FN
        slot_S = is_owner_FN.flatten().cumsum(0) - 1
        return merge(tokens, slot_S[owner_FN.flatten()], is_owner_FN.sum(dim=1))
