"""No pooling: the LLM reads every source token."""

from lightning_crosslmm.pooler.base import Pooler
from lightning_crosslmm.tokens import TokenSet


class NoPooler(Pooler):
    """Hand every source token to the LLM: the upper end of every comparison.

    It stands before the projector; projecting first would give the same tokens.
    """

    def __init__(self) -> None:
        super().__init__()

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """All of them."""
        return grid[0] * grid[1]

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Return the set unchanged."""
        return tokens
