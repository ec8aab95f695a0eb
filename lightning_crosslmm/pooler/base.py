"""The pooler's contract: what it declares, and what it is given."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor, nn

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.taps import Asks, BlockHook, Tower
from lightning_crosslmm.tokens import TokenSet


class Stage(StrEnum):
    """Where a pooler acts."""

    IN_ENCODER = "in_encoder"
    """Between the blocks of the tower (see `taps.BlockHook`)."""

    BEFORE_PROJECTOR = "before_projector"
    """On the encoder's tokens, at the encoder's width: the order of the CrossLMM paper."""

    AS_PROJECTOR = "as_projector"
    """On the encoder's tokens, in the projector's place: it gives the LLM's width itself."""

    AFTER_PROJECTOR = "after_projector"
    """On projected tokens, at the LLM's width, as in LLaVA-NeXT's code; not the same unless the projector is linear."""


class Pooler(nn.Module):
    """Map a token set to a smaller one.

    Subclasses set the declarations and write `forward`. Asks that cannot be met (a class token on SigLIP, a grid after
    the grid is gone) fail when the model is built, naming both sides.

    Args:
        stage: where it acts, one of `stages`.

    Raises:
        UserError: `stage` is another.
    """

    stages: tuple[Stage, ...] = (Stage.BEFORE_PROJECTOR, Stage.AFTER_PROJECTOR)
    """Where a pooler of this kind may act."""

    needs: frozenset[str] = frozenset()
    """What it asks for beyond `asks`: ``"grid"`` (a regular raster of tokens per frame), ``"blocks"`` (a tower that
    runs a `BlockHook`), ``"question"`` (a `Questions`) or ``"question_summary"`` (one with its summary)."""

    asks: Asks = Asks()
    """What it wants to see of the tower; with any, `forward` gets ``taps=``, a `Taps` over the frames of the set."""

    def __init__(self, stage: str = Stage.BEFORE_PROJECTOR) -> None:
        super().__init__()
        if stage not in self.stages:
            raise UserError(
                f"pooler.stage is '{stage}'; right for {type(self).__name__} are {', '.join(self.stages)}"
                f"{nearest(str(stage), list(self.stages))}"
            )
        self.stage = Stage(stage)

    covers: bool = False
    """Whether its source map is a `Partition` that drops no patch, whatever the picture."""

    def enter(self, tower: Tower) -> None:
        """Learn in which tower it will act; called once, before `connect`, and only for `Stage.IN_ENCODER`.

        Raises:
            UserError: this tower does not suit.
        """

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Learn what stands around, and make the parameters that depend on it; called once, when the model is built.

        Args:
            in_width: of the tokens it will get.
            llm_width: of the tokens the LLM reads.
            grid: the encoder's rows and columns.

        Returns:
            The width of the tokens it will give.

        Raises:
            UserError: this encoder does not suit.
        """
        return in_width

    def tokens_per_frame(self, grid: tuple[int, int]) -> int | None:
        """How many tokens a frame of `grid` patches becomes; None when it depends on the picture or the clip."""
        raise NotImplementedError(f"{type(self).__name__} must say tokens_per_frame(grid)")

    def settled(self) -> Mapping[str, Any]:
        """Settings in place of those that name a file, with what the file held, for a model that is given away."""
        return {}

    def forward(self, tokens: TokenSet, *args: Any, **kwargs: Any) -> TokenSet | tuple[TokenSet, Tensor]:
        """Pool every frame (or clip) of the set.

        Those with `asks` get ``taps=`` too, those that need a question ``questions=``; a pooler that rewrites the
        question's embeddings gives a pair of set and new (Q, D) embeddings.

        Args:
            tokens: the encoder's tokens, or the projected ones, as `stage` says.
            *args: none; stands for what a subclass names instead of it.
            **kwargs: ``taps=`` and ``questions=`` where they were asked for.

        Returns:
            A set over the same frames and visuals (a frame may end with no token), its source map chained to that of
            `tokens`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens)")

    def hook(self) -> BlockHook:
        """Make the hook for one chunk of frames; only for `Stage.IN_ENCODER`."""
        raise NotImplementedError(f"{type(self).__name__} acts in the encoder and must make a hook()")

    def collect(self, hooks: list[BlockHook], outputs: list[Tensor], patches: TokenSet) -> tuple[TokenSet, TokenSet]:
        """Make sets of what the tower gave with the hooks; only for `Stage.IN_ENCODER`.

        Args:
            hooks: those of the chunks, in order.
            outputs: the tower's outputs (F, n, E) for them, without prefix tokens.
            patches: boundaries and annotations of the patches as they would have been; its features hold nothing.

        Returns:
            The pooled set, and the source set that fusion reads (the same where the patches no longer exist).
        """
        raise NotImplementedError(f"{type(self).__name__} acts in the encoder and must collect()")


def check_grid(name: str, rows: int, columns: int, grid: tuple[int, int], prefix: str = "") -> None:
    """Refuse an output grid that is empty or finer than the encoder's.

    Args:
        name: the pooler's class.
        rows: asked for.
        columns: asked for.
        grid: the encoder's rows and columns.
        prefix: of the two settings, ``fast_`` for ``pooler.fast_rows``.

    Raises:
        UserError: names the pooler, its grid and the encoder's.
    """
    if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
        raise UserError(
            f"pooler {name} asks for a grid of {rows}x{columns} tokens per frame, the encoder "
            f"gives {grid[0]}x{grid[1]}; "
            f"pooler.{prefix}rows must be 1 to {grid[0]} and pooler.{prefix}columns 1 to {grid[1]}"
        )


def check_budget(name: str, num_tokens: int, grid: tuple[int, int]) -> None:
    """Refuse a budget of no token, or of more tokens than a frame has patches.

    Raises:
        UserError: names the pooler, its budget and the encoder's patches.
    """
    patches = grid[0] * grid[1]
    if not 1 <= num_tokens <= patches:
        raise UserError(
            f"pooler {name}: pooler.num_tokens is {num_tokens}, the encoder gives {grid[0]}x{grid[1]} patches per "
            f"frame; it must be 1 to {patches}"
        )


def check_positive(name: str, **settings: int) -> None:
    """Refuse a count below 1.

    Raises:
        UserError: names the pooler, the setting and its value.
    """
    for setting, value in settings.items():
        if value < 1:
            raise UserError(f"pooler {name}: pooler.{setting} is {value}; it must be 1 or more")


def grid_of(pooler: Pooler, tokens: TokenSet) -> Tensor:
    """View a set as (F, rows, columns, D), for a pooler that cannot do without.

    Raises:
        UserError: an irregular pooler came before; names the one that minds.
    """
    if tokens.grid is None:
        raise UserError(
            f"pooler {type(pooler).__name__} needs a regular grid of tokens, and this set is no longer one; let it "
            f"come before the irregular pooler, or choose one that needs no grid (uniform, random, perceiver, qformer)"
        )
    return tokens.as_grid()
