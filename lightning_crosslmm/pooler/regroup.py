"""Making a set from another one: keeping some tokens, or putting tokens together.

Axis letters:
    S  tokens of the given set    K  kept tokens    P  pooled tokens    F  frames    D  width
"""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_crosslmm.tokens import Partition, TokenSet, compose


def keep(tokens: TokenSet, kept_K: Tensor, count_F: Tensor, grid: tuple[int, int] | None = None) -> TokenSet:
    """Keep some tokens as they are, in the order named; the others are dropped, and their mass with them.

    Args:
        tokens: the set.
        kept_K: int64 numbers of tokens, frame by frame.
        count_F: (F,) int64 on the CPU, how many of them each frame keeps.
        grid: rows and columns, where what is kept is still a regular grid.
    """
    kept_K = kept_K.to(tokens.features_SD.device, non_blocking=True)
    slot_S = torch.full((tokens.num_tokens,), -1, device=kept_K.device)
    slot_S = slot_S.scatter(0, kept_K, torch.arange(len(kept_K), device=kept_K.device))
    return replace(
        tokens,
        features_SD=tokens.features_SD[kept_K],
        coordinate_S3=tokens.coordinate_S3[kept_K],
        mass_S=tokens.mass_S[kept_K],
        frame_offsets=_offsets(count_F),
        grid=grid,
        source_map=compose(tokens.source_map, Partition(slot_S, len(kept_K))),
    )


def merge(tokens: TokenSet, slot_S: Tensor, count_F: Tensor, grid: tuple[int, int] | None = None) -> TokenSet:
    """Put tokens together by the mean that counts each for its mass.

    Args:
        tokens: the set.
        slot_S: int64, the pooled token each one goes into, -1 to drop it; each pooled token gets one at least.
        count_F: (F,) int64 on the CPU, how many pooled tokens each frame has; they are numbered frame by frame.
        grid: rows and columns, where the result is a regular grid.
    """
    slot_S = slot_S.to(tokens.features_SD.device, non_blocking=True)
    mean_PD = _mean(tokens.features_SD, tokens.mass_S, slot_S, int(count_F.sum()))
    return regroup(tokens, mean_PD.to(tokens.features_SD.dtype), slot_S, count_F, grid)


def regroup(
    tokens: TokenSet, pooled_PD: Tensor, slot_S: Tensor, count_F: Tensor, grid: tuple[int, int] | None = None
) -> TokenSet:
    """Give pooled features the mass, the centre and the origin of the tokens that went into them.

    Args:
        tokens: the set they were made of.
        pooled_PD: features of any width.
        slot_S: as in `merge`.
        count_F: as in `merge`.
        grid: as in `merge`.
    """
    slot_S = slot_S.to(tokens.features_SD.device, non_blocking=True)
    num_pooled = len(pooled_PD)
    return replace(
        tokens,
        features_SD=pooled_PD,
        coordinate_S3=_mean(tokens.coordinate_S3, tokens.mass_S, slot_S, num_pooled),
        mass_S=_sums(tokens.mass_S, slot_S, num_pooled),
        frame_offsets=_offsets(count_F),
        grid=grid,
        source_map=compose(tokens.source_map, Partition(slot_S, num_pooled)),
    )


def _mean(values_SD: Tensor, mass_S: Tensor, slot_S: Tensor, num_pooled: int) -> Tensor:
    # single precision at least, so that many small shares do not get lost
    weighted_SD = values_SD * mass_S.to(torch.promote_types(values_SD.dtype, mass_S.dtype))[:, None]
    return _sums(weighted_SD, slot_S, num_pooled) / _sums(mass_S, slot_S, num_pooled)[:, None]


def _sums(values_S: Tensor, slot_S: Tensor, num_pooled: int) -> Tensor:
    # dropped tokens add up in a last place that is cut off
    sums_P = values_S.new_zeros(num_pooled + 1, *values_S.shape[1:])
    return sums_P.index_add(0, slot_S.where(slot_S >= 0, num_pooled), values_S)[:num_pooled]


def _offsets(count_F: Tensor) -> Tensor:
    return torch.cat([count_F.new_zeros(1), count_F.cumsum(0)])
