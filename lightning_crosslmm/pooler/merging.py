"""Merging tokens in pairs by similarity: what ToMe, DyMU and FOLDER share, inside encoder blocks and after them.

Patches of a frame are split by parity into A and B; every token of A knows its most similar one of B and may move into
it. What a method says is which of these edges are taken. Frames may keep different numbers of tokens: then the real
ones stand first, and padding has mass 0.

Axis letters:
    F  frames    N  patches of a frame    n  tokens that are left    a b  tokens of A and of B    K  width of a key
    E  encoder width    S  packed tokens or patches of all frames
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_crosslmm.pooler.regroup import regroup
from lightning_crosslmm.tokens import TokenSet


@dataclass(frozen=True)
class Left:
    """What is left of every frame.

    Args:
        mass_Fn: float32, patches in each token; 0 where there is none.
        home_Fn: int64, the patch in whose place a token stands.
        token_FN: int64, the token that holds each patch.
        is_whole: nothing was merged yet.
        is_ragged: frames may have different numbers of tokens.
    """

    mass_Fn: Tensor
    home_Fn: Tensor
    token_FN: Tensor
    is_whole: bool = True
    is_ragged: bool = False

    @classmethod
    def all_of(cls, num_frames: int, num_patches: int, device: torch.device) -> "Left":
        """Start with every patch."""
        places_FN = torch.arange(num_patches, device=device).expand(num_frames, -1)
        return cls(torch.ones(num_frames, num_patches, device=device), places_FN, places_FN)

    def after(self, move: "Move") -> "Left":
        """Follow a move."""
        return Left(
            mass_Fn=move.sums(self.mass_Fn),
            home_Fn=move.of_those_that_stay(self.home_Fn),
            token_FN=move.to_Fn.gather(1, self.token_FN),
            is_whole=False,
            is_ragged=self.is_ragged or move.is_ragged,
        )


@dataclass(frozen=True)
class Edges:
    """Every token of A and the one of B that is most like it.

    Args:
        score_Fa: float32 similarity; -inf where there is no pair.
        target_Fa: int64, number within B.
        has_token_Fn: bool, over A and B in their order in the frame.
        first_a: 0 or 1, the first token of A.
    """

    score_Fa: Tensor
    target_Fa: Tensor
    has_token_Fn: Tensor
    first_a: int

    def ranks(self) -> Tensor:
        """Number the edges of each frame, the best first: (F, a)."""
        return self.score_Fa.argsort(dim=1, descending=True, stable=True).argsort(dim=1)

    def above(self, threshold: float) -> Tensor:
        """Choose the edges above a threshold, at most half as many as there are tokens: (F, a) bool."""
        half_F1 = self.has_token_Fn.sum(dim=1, keepdim=True) // 2
        return (self.score_Fa > threshold) & (self.ranks() < half_F1)


@dataclass(frozen=True)
class Move:
    """Where tokens go.

    Args:
        to_Fn: int64, the new number of each token; `num_tokens` where there is none.
        stays_Fn: bool, whether it keeps its place, so that others come to it.
        num_tokens: how many there are then, at most, in a frame.
        is_ragged: frames may come to have different numbers.
    """

    to_Fn: Tensor
    stays_Fn: Tensor
    num_tokens: int
    is_ragged: bool = False

    def sums(self, values_Fn: Tensor) -> Tensor:
        """Add up what meets."""
        total_Fn = values_Fn.new_zeros(len(values_Fn), self.num_tokens + 1)
        return total_Fn.scatter_add(1, self.to_Fn, values_Fn)[:, :-1]

    def of_those_that_stay(self, values_Fn: Tensor) -> Tensor:
        """Give each new token what the one in whose place it stands had."""
        places_Fn = torch.where(self.stays_Fn, self.to_Fn, self.num_tokens)
        return values_Fn.new_zeros(len(values_Fn), self.num_tokens + 1).scatter(1, places_Fn, values_Fn)[:, :-1]

    def means(self, features_FnE: Tensor, mass_Fn: Tensor) -> Tensor:
        """Average features by mass; what meets nobody stays as it is to the last bit."""
        total_Fn = torch.cat([self.sums(mass_Fn), mass_Fn.new_ones(len(mass_Fn), 1)], dim=1)
        share_Fn = mass_Fn / total_Fn.gather(1, self.to_Fn)
        to_FnE = self.to_Fn[..., None].expand_as(features_FnE)
        part_FnE = features_FnE * share_Fn[..., None]  # at least single precision: masses are
        mean_FnE = part_FnE.new_zeros(len(mass_Fn), self.num_tokens + 1, features_FnE.shape[-1])
        return mean_FnE.scatter_add(1, to_FnE, part_FnE)[:, :-1].to(features_FnE.dtype)

    def then(self, move: "Move") -> "Move":
        """Chain two moves of full frames."""
        stays_Fn = self.stays_Fn & move.stays_Fn.gather(1, self.to_Fn)
        return Move(move.to_Fn.gather(1, self.to_Fn), stays_Fn, move.num_tokens)


def best_edges(metric_FnK: Tensor, mass_Fn: Tensor, num_prefix: int, penalty_Fn: Tensor | None = None) -> Edges:
    """Find for every token of A its most similar one of B, by the cosine.

    A are the even places of the sequence and B the odd ones, `num_prefix` tokens counted that stand before it.

    Args:
        metric_FnK: what is compared; computed in float32.
        mass_Fn: 0 where there is no token.
        num_prefix: tokens that take no part.
        penalty_Fn: taken off the score of a token of A.
    """
    first_a, has_token_Fn = num_prefix % 2, mass_Fn > 0
    with torch.autocast(metric_FnK.device.type, enabled=False):
        unit_FnK = torch.nn.functional.normalize(metric_FnK.float(), dim=-1)
        score_Fab = unit_FnK[:, first_a::2] @ unit_FnK[:, 1 - first_a :: 2].transpose(1, 2)
    if score_Fab.shape[2] == 0:
        nobody_Fa = score_Fab.new_full(score_Fab.shape[:2], -torch.inf)
        return Edges(nobody_Fa, torch.zeros_like(nobody_Fa, dtype=torch.int64), has_token_Fn, first_a)
    has_pair_Fab = has_token_Fn[:, first_a::2, None] & has_token_Fn[:, None, 1 - first_a :: 2]
    score_Fa, target_Fa = score_Fab.masked_fill(~has_pair_Fab, -torch.inf).max(dim=2)
    if penalty_Fn is not None:
        score_Fa = score_Fa - penalty_Fn[:, first_a::2]
    return Edges(score_Fa, target_Fa, has_token_Fn, first_a)


def move_along(edges: Edges, taken_Fa: Tensor, num_tokens: int | None, by_similarity: bool) -> Move:
    """Let tokens of A move into their partners: those of A that are left come first, then B.

    Args:
        edges: from `best_edges`.
        taken_Fa: bool, the edges that are taken.
        num_tokens: how many tokens every frame has then; None where it differs, at the price of one wait for the
            accelerator.
        by_similarity: order what is left of A by falling similarity and not by place.
    """
    has_token_Fn, first_a = edges.has_token_Fn, edges.first_a
    left_Fa = has_token_Fn[:, first_a::2] & ~taken_Fa
    rank_Fa = left_Fa.cumsum(dim=1) - 1
    if by_similarity:
        order_Fa = edges.score_Fa.masked_fill(~left_Fa, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order_Fa = order_Fa.gather(1, (~left_Fa.gather(1, order_Fa)).long().argsort(dim=1, stable=True))
        rank_Fa = order_Fa.argsort(dim=1)
    left_F1 = left_Fa.sum(dim=1, keepdim=True)
    has_b_Fb = has_token_Fn[:, 1 - first_a :: 2]
    to_Fb = left_F1 + torch.arange(has_b_Fb.shape[1], device=has_b_Fb.device)
    is_ragged = num_tokens is None
    if num_tokens is None:
        num_tokens = int((left_F1 + has_b_Fb.sum(dim=1, keepdim=True)).max()) if len(left_F1) else 0
    to_Fa = torch.where(left_Fa, rank_Fa, num_tokens)
    if to_Fb.shape[1]:
        to_Fa = torch.where(taken_Fa, to_Fb.gather(1, edges.target_Fa), to_Fa)
    to_Fn = torch.empty_like(has_token_Fn, dtype=torch.int64)
    stays_Fn = torch.empty_like(has_token_Fn)
    to_Fn[:, first_a::2], to_Fn[:, 1 - first_a :: 2] = to_Fa, torch.where(has_b_Fb, to_Fb, num_tokens)
    stays_Fn[:, first_a::2], stays_Fn[:, 1 - first_a :: 2] = left_Fa, has_b_Fb
    # a frame in which nothing moves keeps its order, whatever the frames beside it do
    is_still_F1 = ~taken_Fa.any(dim=1, keepdim=True)
    to_Fn = torch.where(is_still_F1 & has_token_Fn, torch.arange(to_Fn.shape[1], device=to_Fn.device), to_Fn)
    return Move(to_Fn, stays_Fn, num_tokens, is_ragged)


def in_raster_order(left: Left, features_FnE: Tensor) -> tuple[Left, Tensor]:
    """Sort the tokens of every frame by the place they stand in, padding last."""
    key_Fn = left.home_Fn.masked_fill(left.mass_Fn == 0, left.token_FN.shape[1])
    order_Fn = key_Fn.argsort(dim=1, stable=True)
    features_FnE = features_FnE.gather(1, order_Fn[..., None].expand_as(features_FnE))
    sorted_left = replace(
        left,
        mass_Fn=left.mass_Fn.gather(1, order_Fn),
        home_Fn=left.home_Fn.gather(1, order_Fn),
        token_FN=order_Fn.argsort(dim=1).gather(1, left.token_FN),
    )
    return sorted_left, features_FnE


def packed(parts: Sequence[tuple[Left, Tensor]], patches: TokenSet) -> TokenSet:
    """Put what is left of all frames into a set.

    Args:
        parts: what is left and its features (F, n, E), for frames one after the other.
        patches: boundaries and annotations of the patches.
    """
    features, counts, tokens, before = [], [], [], 0
    for left, features_FnE in parts:
        num_frames, longest = left.mass_Fn.shape
        counts_F = torch.full((num_frames,), longest)
        if left.is_ragged:
            has_token_Fn = left.mass_Fn > 0
            counts_F = has_token_Fn.sum(dim=1).cpu()
            keep_S = torch.repeat_interleave(torch.arange(num_frames) * longest, counts_F) + within(counts_F)
            features.append(features_FnE.flatten(0, 1)[keep_S.to(features_FnE.device, non_blocking=True)])
        else:
            features.append(features_FnE.flatten(0, 1))
        start_F1 = (before + counts_F.cumsum(0) - counts_F).to(left.token_FN.device, non_blocking=True)[:, None]
        tokens.append((left.token_FN + start_F1).flatten())
        counts.append(counts_F)
        before += int(counts_F.sum())
    table_S, counts_F = torch.cat(tokens), torch.cat(counts)
    return regroup(patches, torch.cat(features), table_S, counts_F)


def within(counts_F: Tensor) -> Tensor:
    """Number things within their groups: 0 .. count-1 for each group, one after the other."""
    start_F = counts_F.cumsum(0) - counts_F
    return torch.arange(int(counts_F.sum())) - torch.repeat_interleave(start_F, counts_F)
