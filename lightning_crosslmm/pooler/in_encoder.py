"""What poolers share that merge tokens between the blocks of the encoder.

Axis letters:
    F  frames    N  patches of a frame    n  tokens that are left, without prefix    E  encoder width    K  key width
"""

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pooler.base import Pooler, Stage
from lightning_crosslmm.pooler.merging import Left, Move, in_raster_order, packed
from lightning_crosslmm.taps import BlockHook, Tower
from lightning_crosslmm.tokens import TokenSet

ORDERS = ("raster", "merged")


class MergingHook(BlockHook):
    """Merge patches after the attention of each block; subclasses write `decide`.

    Prefix tokens neither merge nor are merged into.

    Args:
        proportional: later blocks attend to a token in proportion to its mass, by log(mass) on the logits of its key.
    """

    def __init__(self, proportional: bool) -> None:
        self.proportional, self.num_prefix = proportional, 0
        self.left: dict[int, Left] = {}  # before each block
        self.moves: dict[int, Move | None] = {}

    def begin(self, tokens_FnE: Tensor, num_prefix: int) -> Tensor:
        """Start with every patch."""
        self.num_prefix = num_prefix
        self.left[0] = Left.all_of(len(tokens_FnE), tokens_FnE.shape[1] - num_prefix, tokens_FnE.device)
        return tokens_FnE

    def key_bias(self, block: int) -> Tensor | None:
        """Hide padding, and weigh keys by their mass."""
        left = self.left[block]
        if left.is_whole or not (self.proportional or left.is_ragged):
            return None
        weight_Fn = left.mass_Fn if self.proportional else (left.mass_Fn > 0).float()
        return torch.nn.functional.pad(weight_Fn.log(), (self.num_prefix, 0))

    def after_attention(self, block: int, tokens_FnE: Tensor, keys_FnK: Tensor, class_Fn: Tensor | None) -> Tensor:
        """Move tokens where `decide` says."""
        prefix, left = self.num_prefix, self.left[block]
        if block not in self.moves:  # else the block runs again, for its gradient
            with torch.no_grad():
                row_Fn = None if class_Fn is None else class_Fn[:, prefix:]
                self.moves[block] = self.decide(block, keys_FnK[:, prefix:], row_Fn, left)
        move = self.moves[block]
        if move is None:
            self.left[block + 1] = left
            return tokens_FnE
        self.left[block + 1] = left.after(move)
        return torch.cat([tokens_FnE[:, :prefix], move.means(tokens_FnE[:, prefix:], left.mass_Fn)], dim=1)

    def decide(self, block: int, keys_FnK: Tensor, class_Fn: Tensor | None, left: Left) -> Move | None:
        """Say who moves into whom; None where nobody does.

        Args:
            block: its number.
            keys_FnK: keys of the patches that are left.
            class_Fn: the class token's attention to them, if `wants_class_row`.
            left: what is left before the block.
        """
        raise NotImplementedError


class MergingPooler(Pooler):
    """Merge between blocks; fusion reads the merged tokens, too, for the others no longer exist.

    Args:
        order: of a frame's tokens: ``raster``, by the patch in whose place each stands, or ``merged``, as merging
            leaves them.
        stage: where it acts.

    Raises:
        UserError: an unknown order.
    """

    stages: tuple[Stage, ...] = (Stage.IN_ENCODER,)
    needs = frozenset({"blocks"})
    covers = True

    def __init__(self, order: str, stage: str = Stage.IN_ENCODER) -> None:
        super().__init__(stage)
        if order not in ORDERS:
            raise UserError(f"pooler.order is '{order}'; right are {', '.join(ORDERS)}{nearest(order, ORDERS)}")
        self.order = order
        self.tower = Tower(0, 0, False, {})

    def enter(self, tower: Tower) -> None:
        """Learn how many blocks there are."""
        self.tower = tower

    def collect(self, hooks: list[BlockHook], outputs: list[Tensor], patches: TokenSet) -> tuple[TokenSet, TokenSet]:
        """Pack what is left of every frame."""
        parts = []
        for hook, features_FnE in zip(hooks, outputs, strict=True):
            assert isinstance(hook, MergingHook), "hook() made them"
            parts.append(self.ordered(hook.left[self.tower.num_blocks], features_FnE))
        tokens = packed(parts, patches)
        return tokens, tokens

    def ordered(self, left: Left, features_FnE: Tensor) -> tuple[Left, Tensor]:
        """Bring a frame's tokens into the order asked for."""
        if self.order == "merged" or left.is_whole:
            return left, features_FnE
        return in_raster_order(left, features_FnE)
