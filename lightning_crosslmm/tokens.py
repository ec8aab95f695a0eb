"""Token sets: what flows between encoder, pooler, projector and fusion.

A token set is packed (all tokens of a batch one after the other), annotated and possibly ragged. Padded and grid forms
are views made on demand. Boundaries live on the CPU, so that the layout of a batch is known without asking the
accelerator.

Axis letters:
    S  tokens of the set, all samples together      D  width
    F  frames of all visuals                        V  visuals (videos and images)
    N  tokens of one frame                          E  entries of a weighted map
    M J  middle tokens and joined entries of two chained maps
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """Each source token went into one pooled token, or was dropped.

    Args:
        pooled_of_source_S: int64, the pooled token that holds each source token; -1 where it was dropped.
        num_pooled: how many pooled tokens there are.
        is_identity: nothing was pooled yet; chaining with it costs nothing.
    """

    pooled_of_source_S: Tensor
    num_pooled: int
    is_identity: bool = False

    @property
    def num_sources(self) -> int:
        """How many source tokens the map starts from."""
        return len(self.pooled_of_source_S)

    def weighted(self) -> "Weighted":
        """Say the same as a weighted map: every pooled token is the mean of its sources."""
        source_E = (self.pooled_of_source_S >= 0).nonzero().flatten()
        pooled_E = self.pooled_of_source_S[source_E]
        count = torch.bincount(pooled_E, minlength=self.num_pooled)
        return Weighted(pooled_E, source_E, 1.0 / count[pooled_E], self.num_pooled, self.num_sources)


@dataclass(frozen=True)
class Weighted:
    """Each pooled token is a weighted sum of source tokens; sources may be shared.

    Args:
        pooled_E: int64, pooled token of each entry.
        source_E: int64, source token of each entry.
        weight_E: float32, its weight; the weights of one pooled token sum to 1.
        num_pooled: how many pooled tokens there are.
        num_sources: how many source tokens the map starts from.
    """

    pooled_E: Tensor
    source_E: Tensor
    weight_E: Tensor
    num_pooled: int
    num_sources: int

    def weighted(self) -> "Weighted":
        """Return the map itself."""
        return self

    def apply(self, features_SD: Tensor) -> Tensor:
        """Pool features by the map: (num_sources, D) to (num_pooled, D), each a weighted sum."""
        entries_ED = features_SD[self.source_E] * self.weight_E.to(features_SD.dtype)[:, None]
        return features_SD.new_zeros(self.num_pooled, features_SD.shape[-1]).index_add(0, self.pooled_E, entries_ED)


@dataclass(frozen=True)
class Opaque:
    """The pooled tokens cannot be traced to source tokens (learned queries, for one).

    Args:
        num_pooled: how many pooled tokens there are.
        num_sources: how many source tokens the map starts from.
    """

    num_pooled: int
    num_sources: int


SourceMap = Partition | Weighted | Opaque


def compose(first: SourceMap, then: SourceMap) -> SourceMap:
    """Chain two maps: ``compose(first, then)`` leads from the sources of `first` to the pooled tokens of `then`.

    Partitions chain to a partition, anything with an opaque map is opaque, and the rest is a product of weights.

    Raises:
        ValueError: the pooled tokens of `first` are not the sources of `then`.
    """
    if first.num_pooled != then.num_sources:
        raise ValueError(f"cannot chain a map to {first.num_pooled} tokens with a map from {then.num_sources} tokens")
    if isinstance(first, Partition) and first.is_identity:
        return then
    if isinstance(first, Opaque) or isinstance(then, Opaque):
        return Opaque(then.num_pooled, first.num_sources)
    if isinstance(first, Partition) and isinstance(then, Partition):
        # index -1 of the longer table is its last entry, which is again -1: a dropped token stays dropped
        table = torch.cat([then.pooled_of_source_S, then.pooled_of_source_S.new_tensor([-1])])
        return Partition(table[first.pooled_of_source_S], then.num_pooled)
    return _chain(first.weighted(), then.weighted())


def _chain(first: Weighted, then: Weighted) -> Weighted:
    # join the entries of `then` with those of `first` that share a middle token, then add up double entries
    order_E = first.pooled_E.argsort(stable=True)
    count_M = torch.bincount(first.pooled_E, minlength=first.num_pooled)
    start_M = count_M.cumsum(0) - count_M
    repeats_E = count_M[then.source_E]
    entry_J = torch.repeat_interleave(torch.arange(len(then.source_E), device=repeats_E.device), repeats_E)
    within_J = torch.arange(len(entry_J), device=entry_J.device) - (repeats_E.cumsum(0) - repeats_E)[entry_J]
    of_first_J = order_E[start_M[then.source_E[entry_J]] + within_J]
    weight_J = then.weight_E[entry_J] * first.weight_E[of_first_J]
    pair_J = then.pooled_E[entry_J] * first.num_sources + first.source_E[of_first_J]
    pair_E, slot_J = pair_J.unique(return_inverse=True)
    weight_E = weight_J.new_zeros(len(pair_E)).index_add(0, slot_J, weight_J)
    pooled_E = pair_E.div(first.num_sources, rounding_mode="floor")
    return Weighted(pooled_E, pair_E % first.num_sources, weight_E, then.num_pooled, first.num_sources)


@dataclass(frozen=True)
class TokenSet:
    """Visual tokens of a batch with their boundaries, places, masses and origin.

    Args:
        features_SD: the tokens, ordered by sample, then visual, then frame, then raster where a grid remains.
        frame_offsets: (F+1,) int64 on the CPU, tokens of frame f are ``[f], [f+1]``.
        visual_offsets: (V+1,) int64 on the CPU, frames of visual v are ``[v], [v+1]``.
        sample_of_visual: (V,) int64 on the CPU, not decreasing.
        frame_time_s_F: float32 on the CPU, seconds from the start of the video; 0 for an image.
        coordinate_S3: float32 (t, y, x): number of the frame in its visual, row and column in patches.
        mass_S: float32, how many source patches the token stands for.
        grid: rows and columns while every frame is still a regular raster grid, else None.
        source_map: where the tokens came from, in patches of the encoder.
        picture_V4: which visuals are images, and their tiles, as in `VideoBatch`; None where nobody told.
    """

    features_SD: Tensor
    frame_offsets: Tensor
    visual_offsets: Tensor
    sample_of_visual: Tensor
    frame_time_s_F: Tensor
    coordinate_S3: Tensor
    mass_S: Tensor
    grid: tuple[int, int] | None
    source_map: SourceMap
    picture_V4: Tensor | None = None

    @classmethod
    def from_grid(
        cls,
        patches_FND: Tensor,
        grid: tuple[int, int],
        visual_offsets: Tensor,
        sample_of_visual: Tensor,
        frame_time_s_F: Tensor,
        picture_V4: Tensor | None = None,
    ) -> "TokenSet":
        """Annotate an encoder's regular output: mass 1, the identity as source map.

        Args:
            patches_FND: the patches of each frame in raster order, N = rows x columns.
            grid: rows and columns.
            visual_offsets: as in the class.
            sample_of_visual: as in the class.
            frame_time_s_F: as in the class.
            picture_V4: as in the class.
        """
        num_frames, num_patches, _ = patches_FND.shape
        device = patches_FND.device
        total = num_frames * num_patches
        frame_offsets = torch.arange(num_frames + 1) * num_patches
        return cls(
            features_SD=patches_FND.flatten(0, 1),
            frame_offsets=frame_offsets,
            visual_offsets=visual_offsets,
            sample_of_visual=sample_of_visual,
            frame_time_s_F=frame_time_s_F,
            coordinate_S3=grid_coordinates(frame_in_visual(visual_offsets), grid).to(device),
            mass_S=torch.ones(total, device=device),
            grid=grid,
            source_map=Partition(torch.arange(total, device=device), total, is_identity=True),
            picture_V4=picture_V4,
        )

    @property
    def num_tokens(self) -> int:
        """S."""
        return len(self.features_SD)

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.frame_offsets) - 1

    @property
    def num_visuals(self) -> int:
        """V."""
        return len(self.visual_offsets) - 1

    @property
    def token_offsets_of_visual(self) -> Tensor:
        """(V+1,) int64 on the CPU, tokens of visual v are ``[v], [v+1]``."""
        return self.frame_offsets[self.visual_offsets]

    def with_features(self, features_SD: Tensor) -> Self:
        """Keep places and origin, change what the tokens say (a projector, for one)."""
        if len(features_SD) != self.num_tokens:
            raise ValueError(f"{len(features_SD)} features for a set of {self.num_tokens} tokens")
        return replace(self, features_SD=features_SD)

    def as_grid(self) -> Tensor:
        """View the tokens as (F, rows, columns, D).

        Raises:
            ValueError: the tokens no longer form a regular grid.
        """
        if self.grid is None:
            raise ValueError(
                "these tokens no longer form a regular grid; a grid pooler must come before an irregular one"
            )
        return self.features_SD.view(self.num_frames, *self.grid, self.features_SD.shape[-1])

    def padded(self) -> tuple[Tensor, Tensor]:
        """Copy into (F, most tokens of a frame, D) with zeros, and a mask that is True where a token is real."""
        counts_F = self.frame_offsets.diff()
        longest = int(counts_F.max()) if len(counts_F) else 0
        keep_FN = (torch.arange(longest) < counts_F[:, None]).to(self.features_SD.device)
        padded_FND = self.features_SD.new_zeros(self.num_frames, longest, self.features_SD.shape[-1])
        return padded_FND.masked_scatter(keep_FN[..., None], self.features_SD), keep_FN

    def validate(self) -> None:
        """Check that boundaries, annotations and the source map agree.

        Raises:
            ValueError: says which two counts disagree, or that a feature is not finite.
        """
        for name, offsets, total in (
            ("frame_offsets", self.frame_offsets, self.num_tokens),
            ("visual_offsets", self.visual_offsets, self.num_frames),
        ):
            if offsets.device.type != "cpu" or offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
                raise ValueError(f"{name} must lie on the CPU and rise from 0 to {total}, got {offsets.tolist()}")
        for name, length, expected in (
            ("coordinate_S3", len(self.coordinate_S3), self.num_tokens),
            ("mass_S", len(self.mass_S), self.num_tokens),
            ("source_map", self.source_map.num_pooled, self.num_tokens),
            ("sample_of_visual", len(self.sample_of_visual), self.num_visuals),
            ("frame_time_s_F", len(self.frame_time_s_F), self.num_frames),
        ):
            if length != expected:
                raise ValueError(f"{name} has {length} entries for {expected}")
        if self.grid is not None and (self.frame_offsets.diff() != self.grid[0] * self.grid[1]).any():
            raise ValueError(f"grid {self.grid} but {self.frame_offsets.diff().tolist()} tokens per frame")
        if not torch.isfinite(self.features_SD).all():
            raise ValueError("features_SD holds NaN or infinity")


def frame_in_visual(visual_offsets: Tensor) -> Tensor:
    """Number each frame within its visual: (F,) int64 from (V+1,) boundaries."""
    start_F = torch.repeat_interleave(visual_offsets[:-1], visual_offsets.diff())
    return torch.arange(int(visual_offsets[-1])) - start_F


def grid_coordinates(frame_number_F: Tensor, grid: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Place the cells of a raster grid: (F*rows*columns, 3) float32 of (t, y, x) in source patches.

    ``y = (row + 0.5) * scale - 0.5``, so a cell of a coarser grid lies at the middle of the patches it covers.

    Args:
        frame_number_F: number of each frame in its visual.
        grid: rows and columns.
        scale: source patches per cell, down and across.
    """
    rows, columns = grid
    y = (torch.arange(rows, dtype=torch.float32) + 0.5) * scale[0] - 0.5
    x = (torch.arange(columns, dtype=torch.float32) + 0.5) * scale[1] - 0.5
    t_FRC, y_FRC, x_FRC = torch.meshgrid(frame_number_F.float(), y, x, indexing="ij")
    return torch.stack([t_FRC, y_FRC, x_FRC], dim=-1).reshape(-1, 3)
