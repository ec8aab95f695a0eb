"""Sparsity Meets Similarity, first stage: keep the head of the sorted saliency curve.

Axis letters:
    F  frames    N  patches of a frame    C  curves: frames, or one clip    X  points of a curve
"""

from itertools import pairwise

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pooler.base import Pooler, Stage
from lightning_crosslmm.pooler.ragged import budget, outliers, pick, rank, selection
from lightning_crosslmm.taps import Asks, Taps
from lightning_crosslmm.tokens import TokenSet

KNEES = ("kneedle", "max_second_difference", "max_gap", "iqr")
SCOPES = ("frame", "clip")


class SmsPooler(Pooler):
    """Sort a frame's patches by saliency, find where the curve bends, and keep the head, in raster order.

    Source: "Sparsity Meets Similarity", arXiv:2409.01162, first of its two stages.
    Differs: the authors' formula of the bend and their code are not public. What is known is the structure: saliency
        is long-tailed, sorted, and cut at an inflection per sample; all rules for the cut here are ours to compare. The
        score is the class token's attention, where the text speaks of its similarity. The second stage, pruning inside
        the LLM, is not built.

    Args:
        saliency: how much a patch matters: ``class_token`` as in the paper, or a substitute, ``received``, ``probe``.
        knee: where the head s_0 >= s_1 >= ... ends. ``kneedle``: before the point farthest below the line from first
            to last. ``max_second_difference``: before the sharpest bend, greatest s_(i-1) - 2 s_i + s_(i+1).
            ``max_gap``: in the widest step. ``iqr``: after the outliers above Q3 + 1.5 (Q3 - Q1).
        scope: ``frame`` cuts each frame for itself, ``clip`` all patches of a visual together: a frame that repeats
            another may then keep few, or none.
        min_tokens: fewest per frame (in a clip: on average); a whole number, or a share of the patches.
        max_tokens: most of them, likewise; None sets no bound.

    Raises:
        UserError: an unknown word.
    """

    stages = (Stage.BEFORE_PROJECTOR,)  # picked before or after a projector, the tokens are the same

    def __init__(
        self,
        saliency: str = "class_token",
        knee: str = "kneedle",
        scope: str = "frame",
        min_tokens: int | float = 1,
        max_tokens: int | float | None = None,
    ) -> None:
        super().__init__()
        for setting, word, right in (("knee", knee, KNEES), ("scope", scope, SCOPES)):
            if word not in right:
                raise UserError(f"pooler.{setting} is '{word}'; right are {', '.join(right)}{nearest(word, right)}")
        self.asks = Asks(saliency=str(saliency))
        self.knee, self.scope, self.min_tokens, self.max_tokens = knee, scope, min_tokens, max_tokens

    def tokens_per_frame(self, grid: tuple[int, int]) -> int | None:
        """None, unless the bounds leave one number.

        Raises:
            UserError: a bound out of range, or a lower one above the upper.
        """
        least, most = self._bounds(grid[0] * grid[1])
        return least if least == most and self.scope == "frame" else None

    def _bounds(self, patches: int) -> tuple[int, int]:
        least = budget("pooler.min_tokens", self.min_tokens, patches)
        most = patches if self.max_tokens is None else budget("pooler.max_tokens", self.max_tokens, patches)
        if least > most:
            raise UserError(
                f"pooler.min_tokens is {least} tokens, above pooler.max_tokens, {most}; it may be at most that"
            )
        return least, most

    def forward(self, tokens: TokenSet, taps: Taps) -> TokenSet:
        """Cut each frame's curve, or each clip's."""
        assert taps.saliency_FN is not None, "asked for"
        saliency_FN = taps.saliency_FN
        least, most = self._bounds(saliency_FN.shape[1])
        if least == saliency_FN.shape[1]:
            return tokens
        if self.scope == "frame":
            return selection(tokens, pick(self._head(saliency_FN, least, most)))
        is_kept_FN = torch.zeros_like(saliency_FN, dtype=torch.bool)
        for start, end in pairwise(tokens.visual_offsets.tolist()):
            frames = end - start
            if frames:
                head_CX = self._head(saliency_FN[start:end].reshape(1, -1), least * frames, most * frames)
                is_kept_FN[start:end] = head_CX.view(frames, -1)
        return selection(tokens, pick(is_kept_FN))

    def _head(self, curve_CX: Tensor, least: int, most: int) -> Tensor:
        """Tell which points of each curve are in its head."""
        count_C = head_length(curve_CX.sort(dim=1, descending=True).values, self.knee)
        return rank(curve_CX) < count_C.clamp(least, most)[:, None]


def head_length(sorted_CX: Tensor, knee: str) -> Tensor:
    """Count the points before the bend of falling curves: (C,) int64, 0 to X.

    Args:
        sorted_CX: the curves, greatest first.
        knee: one of `KNEES`.
    """
    points = sorted_CX.shape[1]
    if points < 3:  # no curve can bend
        return torch.full_like(sorted_CX[:, 0], points, dtype=torch.int64)
    if knee == "iqr":
        return outliers(sorted_CX).sum(dim=1)
    if knee == "max_gap":
        return (sorted_CX[:, :-1] - sorted_CX[:, 1:]).argmax(dim=1) + 1
    if knee == "max_second_difference":
        return (sorted_CX[:, :-2] - 2 * sorted_CX[:, 1:-1] + sorted_CX[:, 2:]).argmax(dim=1) + 1
    first_C1, last_C1 = sorted_CX[:, :1], sorted_CX[:, -1:]
    height_CX = (sorted_CX - last_C1) / (first_C1 - last_C1).clamp(min=torch.finfo(sorted_CX.dtype).tiny)
    along_X = torch.linspace(0, 1, points, dtype=sorted_CX.dtype, device=sorted_CX.device)
    return (1 - along_X - height_CX).argmax(dim=1)
