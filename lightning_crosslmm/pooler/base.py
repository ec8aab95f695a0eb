"""The pooler's contract: what it declares, and what it is given."""

from enum import StrEnum

from torch import nn

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.tokens import TokenSet


class Stage(StrEnum):
    """Where a pooler acts."""

    BEFORE_PROJECTOR = "before_projector"
    """On the encoder's tokens, at the encoder's width: the order of the CrossLMM paper."""

    AFTER_PROJECTOR = "after_projector"
    """On projected tokens, at the LLM's width, as in LLaVA-NeXT's code; not the same unless the projector is linear."""


class Pooler(nn.Module):
    """Map a token set to a smaller one.

    Subclasses set the declarations and write `forward`. Asks that cannot be met (a grid after the grid is gone) fail
    when the model is built.

    Args:
        stage: where it acts, ``before_projector`` or ``after_projector``.

    Raises:
        UserError: `stage` is neither.
    """

    needs: frozenset[str] = frozenset()
    """What it asks of its input: ``"grid"``, a regular raster of tokens per frame."""

    def __init__(self, stage: str = Stage.BEFORE_PROJECTOR) -> None:
        super().__init__()
        if stage not in list(Stage):
            raise UserError(
                f"pooler.stage is '{stage}'; right are {', '.join(Stage)}{nearest(str(stage), list(Stage))}"
            )
        self.stage = Stage(stage)

    def tokens_per_frame(self, grid: tuple[int, int]) -> int | None:
        """How many tokens a frame of `grid` patches becomes; None when it depends on the picture."""
        raise NotImplementedError(f"{type(self).__name__} must say tokens_per_frame(grid)")

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Pool every frame (or clip) of the set.

        Args:
            tokens: the encoder's tokens, or the projected ones, as `stage` says.

        Returns:
            A set over the same frames and visuals, its source map chained to that of `tokens`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens)")


def check_grid(name: str, rows: int, columns: int, grid: tuple[int, int]) -> None:
    """Refuse an output grid that is empty or finer than the encoder's.

    Raises:
        UserError: names the pooler, its grid and the encoder's.
    """
    if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
        raise UserError(
            f"pooler {name} asks for a grid of {rows}x{columns} tokens per frame, the encoder "
            f"gives {grid[0]}x{grid[1]}; "
            f"pooler.rows must be 1 to {grid[0]} and pooler.columns 1 to {grid[1]}"
        )
