"""FOLDER: many merges at one place, folded into passes.

Axis letters:
    F  frames    N  patches of a frame    n  patches that are left    a  patches of A (see `merging`)
    K  width of a key    E D  widths of tokens    S  pooled tokens
"""

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Stage, check_budget, grid_of
from lightning_crosslmm.pooler.in_encoder import MergingHook, MergingPooler
from lightning_crosslmm.pooler.merging import Left, Move, best_edges, move_along, packed
from lightning_crosslmm.taps import BlockHook, Tower
from lightning_crosslmm.tokens import TokenSet

CLASS_SCALE = 100.0


class FolderPooler(MergingPooler):
    """Merge most patches at once, near the end: pairs by similarity, again and again until `num_tokens` are left.

    ``score(a, b) = cos(k_a, k_b) - class_weight * 100 * attention of the class token to a``; each pass takes the best
    edges, at most half of what is left (576 to 192: 288, then 96).

    In the encoder it acts once, after the attention of the last block that runs, on keys (the full form). Before or
    after the projector it acts on the tokens themselves (the simplified form, which the authors recommend).

    Source: Wang et al., "FOLDER: accelerating multi-modal large language models with enhanced performance",
        arXiv:2501.02430, and the authors' code.
    Differs: `scale_by_size` holds at every budget, where the code's guard switches it off and on as the budget shrinks.
        No proportional attention: the code computes its bias and never passes it on. Class and register tokens take no
        part.

    Args:
        num_tokens: left of a frame, 1 to all.
        stage: ``in_encoder`` (the full form), ``before_projector`` or ``after_projector`` (the simplified one).
        class_weight: the code's alpha, 0 or more; above 0 in the encoder alone, with a class token. LLaVA's has 5.
        scale_by_size: multiply each token by ``1 + log(mass)``, as the simplified form's code does.
        order: of a frame's tokens, ``raster`` (the simplified form's) or ``merged`` (the full one's).

    Raises:
        UserError: a setting out of range, or a class term where there is no class token.
    """

    stages = (Stage.IN_ENCODER, Stage.BEFORE_PROJECTOR, Stage.AFTER_PROJECTOR)

    def __init__(
        self,
        num_tokens: int,
        stage: str = Stage.BEFORE_PROJECTOR,
        class_weight: float = 0.0,
        scale_by_size: bool = True,
        order: str = "raster",
    ) -> None:
        super().__init__(order, stage)
        self.num_tokens, self.class_weight, self.scale_by_size = num_tokens, class_weight, scale_by_size
        self.needs = frozenset({"blocks" if self.stage is Stage.IN_ENCODER else "grid"})
        if class_weight < 0 or (class_weight > 0 and self.stage is not Stage.IN_ENCODER):
            raise UserError(
                f"pooler.class_weight is {class_weight} with pooler.stage {self.stage}; it is 0 or more, and above 0 "
                f"only in the encoder, where the class token is: set pooler.stage=in_encoder or pooler.class_weight=0"
            )

    def enter(self, tower: Tower) -> None:
        """Look for the class token."""
        super().enter(tower)
        if self.class_weight > 0 and not tower.has_class_token:
            raise UserError(
                f"pooler.class_weight is {self.class_weight}, and the encoder has no class token; set "
                "pooler.class_weight=0, or choose an encoder that has one"
            )

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """As many as asked for."""
        check_budget(type(self).__name__, self.num_tokens, grid)
        return self.num_tokens

    def hook(self) -> BlockHook:
        """Fold in the last block."""
        return _FolderHook(self)

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Fold what the encoder or the projector gave."""
        features_FND = grid_of(self, tokens).flatten(1, 2)
        left = Left.all_of(features_FND.shape[0], features_FND.shape[1], features_FND.device)
        with torch.no_grad():
            move = fold(features_FND, left, self.num_tokens, num_prefix=0, by_similarity=False)
        if move is None:
            return tokens
        parts = self.ordered(left.after(move), move.means(features_FND, left.mass_Fn))
        return packed([parts], tokens)

    def ordered(self, left: Left, features_FnE: Tensor) -> tuple[Left, Tensor]:
        """Bring a frame's tokens into the order asked for, and scale them."""
        left, features_FnE = super().ordered(left, features_FnE)
        if self.scale_by_size and not left.is_whole:
            features_FnE = features_FnE * (1 + left.mass_Fn.log())[..., None].to(features_FnE.dtype)
        return left, features_FnE


def passes(num_tokens: int, wanted: int) -> list[int]:
    """Say how many tokens each pass takes away: half of what is left, until `wanted` are."""
    found = []
    while num_tokens > wanted:
        found.append(min(num_tokens - wanted, num_tokens // 2))
        num_tokens -= found[-1]
    return found


def fold(
    metric_FnK: Tensor,
    left: Left,
    wanted: int,
    num_prefix: int,
    by_similarity: bool,
    penalty_Fn: Tensor | None = None,
) -> Move | None:
    """Merge until `wanted` tokens are left of every frame; what is compared is merged along.

    Args:
        metric_FnK: keys or features.
        left: what is left before.
        wanted: tokens per frame.
        num_prefix: tokens in front, for the parity.
        by_similarity: see `move_along`.
        penalty_Fn: taken off the score of a token that would move; where tokens meet, its mean.
    """
    whole: Move | None = None
    metric_FnK = metric_FnK.float()
    for count in passes(metric_FnK.shape[1], wanted):
        edges = best_edges(metric_FnK, left.mass_Fn, num_prefix, penalty_Fn)
        move = move_along(edges, edges.ranks() < count, metric_FnK.shape[1] - count, by_similarity)
        if penalty_Fn is not None:
            penalty_Fn = move.sums(penalty_Fn) / move.sums(torch.ones_like(penalty_Fn))
        metric_FnK = move.means(metric_FnK, left.mass_Fn)
        left, whole = left.after(move), move if whole is None else whole.then(move)
    return whole


class _FolderHook(MergingHook):
    def __init__(self, pooler: FolderPooler) -> None:
        super().__init__(proportional=False)
        self.pooler = pooler
        self.wants_class_row = pooler.class_weight > 0

    def decide(self, block: int, keys_FnK: Tensor, class_Fn: Tensor | None, left: Left) -> Move | None:
        """Fold in the last block, and in no other."""
        pooler, tower = self.pooler, self.pooler.tower
        if block != tower.num_blocks - 1:
            return None
        penalty_Fn = None if class_Fn is None else class_Fn * pooler.class_weight * CLASS_SCALE
        return fold(keys_FnK, left, pooler.num_tokens, self.num_prefix, not tower.has_class_token, penalty_Fn)
