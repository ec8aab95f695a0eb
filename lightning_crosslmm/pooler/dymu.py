"""DyMU's dynamic merging: as many merges as a picture has pairs above a threshold.

Axis letters:
    F  frames    n  patches that are left    a  patches of A (see `merging`)    K  width of a key
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.calibration import Calibration
from lightning_crosslmm.pooler.in_encoder import MergingHook, MergingPooler
from lightning_crosslmm.pooler.merging import Left, Move, best_edges, move_along
from lightning_crosslmm.taps import Tower


class DymuPooler(MergingPooler):
    """Merge the pairs of patches whose keys are more similar than their block's threshold.

    As `TomePooler`, over the pairs with ``cos(k_a, k_b) > threshold of the block``, at most half of what is left.
    Thresholds are calibrated so that a picture keeps a given number of tokens on average (see `calibration.calibrate`);
    plain ones keep fewer, rich ones more. With ``virtual_unmerging`` the LLM attends as if all patches stood there.

    Source: Wang et al., "DyMU: dynamic merging and virtual unmerging for efficient VLMs", arXiv:2504.17040, sec. 3.1.
    Differs: cosines of keys, as the authors' code has it, where the paper writes dot products; the code's bias for mass
        in unfused attention comes after the softmax, ours before it everywhere. Class and register tokens take no part.
        A frame in which nothing merges keeps the order of its tokens, so that it does not depend on its neighbours.

    Args:
        thresholds: a file that ``mode=calibrate`` wrote, for this encoder; or one cosine for every block, -1 to 1; or a
            cosine for each, as an exported run has them.
        proportional: later blocks weigh keys by mass.
        order: of a frame's tokens in the LLM, ``raster`` or ``merged``, as the code leaves them.

    Raises:
        UserError: a threshold out of range, or a file that is none, or one of another encoder.
    """

    def __init__(
        self, thresholds: float | str | Sequence[float], proportional: bool = True, order: str = "raster"
    ) -> None:
        super().__init__(order)
        cosines = [thresholds] if isinstance(thresholds, float | int) else thresholds
        if not isinstance(cosines, str) and not all(-1 <= cosine <= 1 for cosine in cosines):
            raise UserError(
                f"pooler.thresholds is {thresholds}; right is a cosine from -1 to 1, or a file of mode=calibrate"
            )
        self.thresholds, self.proportional = thresholds, proportional
        self.threshold_of_block: Sequence[float] = ()  # Python floats: no precision setting reaches them

    def enter(self, tower: Tower) -> None:
        """Take the thresholds of this tower."""
        super().enter(tower)
        if isinstance(self.thresholds, str):
            self.threshold_of_block = Calibration.read(Path(self.thresholds), tower).thresholds
        elif isinstance(self.thresholds, float | int):
            self.threshold_of_block = [float(self.thresholds)] * tower.num_blocks
        elif len(self.thresholds) != tower.num_blocks:
            raise UserError(
                f"pooler.thresholds has {len(self.thresholds)} cosines; this encoder runs {tower.num_blocks} blocks"
            )
        else:
            self.threshold_of_block = self.thresholds

    def tokens_per_frame(self, grid: tuple[int, int]) -> None:
        """The pictures say."""
        return None

    def settled(self) -> dict[str, Any]:
        """Give the thresholds that a file held."""
        return {"thresholds": list(self.threshold_of_block)} if isinstance(self.thresholds, str) else {}

    def hook(self) -> MergingHook:
        """Merge by threshold."""
        return ThresholdHook(self.threshold_of_block, self.proportional, self.tower.has_class_token)


class ThresholdHook(MergingHook):
    """Merge above the threshold of each block.

    Args:
        thresholds: one for each block.
        proportional: weigh keys by mass.
        has_class_token: what is left of A keeps its order, as in the authors' code.
    """

    def __init__(self, thresholds: Sequence[float], proportional: bool, has_class_token: bool) -> None:
        super().__init__(proportional)
        self.thresholds, self.has_class_token = thresholds, has_class_token

    def decide(self, block: int, keys_FnK: Tensor, class_Fn: Tensor | None, left: Left) -> Move | None:
        """Take the edges above the threshold."""
        edges = best_edges(keys_FnK, left.mass_Fn, self.num_prefix)
        taken_Fa = edges.above(self.thresholds[block])
        return move_along(edges, taken_Fa, None, by_similarity=not self.has_class_token) if taken_Fa.any() else None
