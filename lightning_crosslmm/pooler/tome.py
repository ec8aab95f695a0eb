"""ToMe: a constant number of merges in every block.

Axis letters:
    F  frames    n  patches that are left    a  patches of A (see `merging`)    K  width of a key
"""

from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.in_encoder import MergingHook, MergingPooler
from lightning_crosslmm.pooler.merging import Left, Move, best_edges, move_along
from lightning_crosslmm.taps import Tower


class TomePooler(MergingPooler):
    """Merge the `merges_per_block` most similar pairs of patches after the attention of every block.

    ``x_b <- (m_a x_a + m_b x_b) / (m_a + m_b)`` for the pairs (a, b) of highest ``cos(k_a, k_b)``, k the keys' mean
    over heads, m the masses; later blocks attend by ``softmax(q k^T / sqrt(K) + log m)``.

    Source: Bolya et al., "Token merging: your ViT but faster", arXiv:2210.09461, sections 3 and 4.1.
    Differs: class and register tokens take no part (the paper's code protects a class token alone). What is left of A
        comes by falling similarity where the tower has no class token and by place where it has, as in that code.

    Args:
        merges_per_block: r, 0 to half the patches; where fewer patches are left, half of them.
        proportional: weigh keys by mass. Towers trained with a reconstruction loss (MAE) do better without.
        order: of a frame's tokens in the LLM, ``raster`` or ``merged``, that code's.

    Raises:
        UserError: a setting out of range.
    """

    def __init__(self, merges_per_block: int, proportional: bool = True, order: str = "raster") -> None:
        super().__init__(order)
        self.merges_per_block, self.proportional = merges_per_block, proportional

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """Count what is left after the last block."""
        left = grid[0] * grid[1]
        if not 0 <= self.merges_per_block <= left // 2:
            raise UserError(
                f"pooler.merges_per_block is {self.merges_per_block}; with {left} patches per frame it is 0 to "
                f"{left // 2}"
            )
        for _ in range(self.tower.num_blocks):
            left -= min(self.merges_per_block, left // 2)
        return left

    def hook(self) -> MergingHook:
        """Merge by rank."""
        return _TomeHook(self.merges_per_block, self.proportional, self.tower)


class _TomeHook(MergingHook):
    def __init__(self, merges_per_block: int, proportional: bool, tower: Tower) -> None:
        super().__init__(proportional)
        self.merges_per_block, self.tower = merges_per_block, tower

    def decide(self, block: int, keys_FnK: Tensor, class_Fn: Tensor | None, left: Left) -> Move | None:
        """Take the best edges, as many in every frame."""
        tokens = keys_FnK.shape[1]
        count = min(self.merges_per_block, tokens // 2)
        if count == 0:
            return None
        edges = best_edges(keys_FnK, left.mass_Fn, self.num_prefix)
        return move_along(edges, edges.ranks() < count, tokens - count, by_similarity=not self.tower.has_class_token)
