"""A pooler of a stated number of tokens, in place of one whose number only the data know.

Axis letters:
    F  frames    S  source tokens    K  kept ones    n  tokens left in a frame, prefix included    E  encoder width
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import Pooler
from lightning_crosslmm.taps import BlockHook, Taps
from lightning_crosslmm.tokens import Opaque, TokenSet

_TRIAL_FRAMES = 4


class StatedPooler(Pooler):
    """Keep as many tokens as stated, where and on what another pooler acts.

    In the encoder, tokens leave in equal numbers from block to block, after a comparison of one half with the other, as
    merging poolers make; that only stands in for a schedule that the pictures decide.

    Args:
        like: the pooler it stands for.
        pooled_per_frame: mean over the frames, above 0.
        num_blocks: of the tower, for `Stage.IN_ENCODER`.
    """

    def __init__(self, like: Pooler, pooled_per_frame: float, num_blocks: int) -> None:
        super(Pooler, self).__init__()
        self.stage, self.asks, self.needs = like.stage, like.asks, like.needs
        self.pooled_per_frame, self.num_blocks = pooled_per_frame, num_blocks

    def forward(self, tokens: TokenSet, *args: Any, **kwargs: Any) -> TokenSet:
        """Keep the first tokens of every frame, and one more of some where the mean is no whole number."""
        count_F = self._counts(tokens)
        inside_FN = torch.arange(int(count_F.max())) < count_F[:, None]
        kept_K = (tokens.frame_offsets[:-1, None] + torch.arange(inside_FN.shape[1]))[inside_FN]
        return _bare(tokens, tokens.features_SD[kept_K.to(tokens.features_SD.device)], count_F)

    def _counts(self, tokens: TokenSet) -> Tensor:
        share_F = torch.arange(tokens.num_frames + 1, dtype=torch.float64) * self.pooled_per_frame
        return torch.minimum(share_F.round().long().diff(), tokens.frame_offsets.diff())

    def hook(self) -> BlockHook:
        """Let tokens leave between the blocks."""
        return _LeavingHook(self.pooled_per_frame, self.num_blocks)

    def collect(self, hooks: list[BlockHook], outputs: list[Tensor], patches: TokenSet) -> tuple[TokenSet, TokenSet]:
        """Take what is left, for the LLM and for fusion."""
        features_FnE = torch.cat(outputs)
        count_F = torch.full((len(features_FnE),), features_FnE.shape[1])
        left = _bare(patches, features_FnE.flatten(0, 1), count_F)
        return left, left


class _LeavingHook(BlockHook):
    def __init__(self, pooled_per_frame: float, num_blocks: int) -> None:
        self.pooled_per_frame, self.num_blocks = pooled_per_frame, num_blocks
        self.num_patches = self.num_prefix = 0

    def begin(self, tokens_FnE: Tensor, num_prefix: int) -> Tensor:
        """See how many there are."""
        self.num_patches, self.num_prefix = tokens_FnE.shape[1] - num_prefix, num_prefix
        return tokens_FnE

    def after_attention(self, block: int, tokens_FnE: Tensor, keys_FnK: Tensor, class_Fn: Tensor | None) -> Tensor:
        """Compare halves, as a merging pooler does, and let the surplus go."""
        with torch.no_grad():
            torch.matmul(keys_FnK[:, ::2], keys_FnK[:, 1::2].transpose(1, 2))
        gone = (self.num_patches - self.pooled_per_frame) * (block + 1) / self.num_blocks
        return tokens_FnE[:, : self.num_prefix + max(1, round(self.num_patches - gone))]


def _bare(tokens: TokenSet, features_KD: Tensor, count_F: Tensor) -> TokenSet:
    # places, masses and origins cost next to nothing, and are nobody's
    num_kept = len(features_KD)
    return replace(
        tokens,
        features_SD=features_KD,
        coordinate_S3=tokens.coordinate_S3.new_empty(num_kept, 3),
        mass_S=tokens.mass_S.new_empty(num_kept),
        frame_offsets=torch.cat([count_F.new_zeros(1), count_F.cumsum(0)]),
        grid=None,
        source_map=Opaque(num_kept, tokens.num_tokens),
    )


def try_out(pooler: Pooler, width: int, grid: tuple[int, int], num_frames: int) -> float | None:
    """Find the tokens per frame of a pooler for which the length of a clip decides, and not what it shows.

    Args:
        pooler: with its parameters on the CPU, one that acts outside the encoder.
        width: of its tokens.
        grid: the encoder's.
        num_frames: of the clip.

    Returns:
        Tokens per frame, if a still clip and one of noise become as many, else None.
    """
    found = {_pooled(pooler, clip, grid) for clip in _clips(width, grid, num_frames)}
    return found.pop() / num_frames if len(found) == 1 else None


def _clips(width: int, grid: tuple[int, int], num_frames: int) -> list[Tensor]:
    noise = torch.Generator().manual_seed(0)
    moving_FNE = torch.randn(num_frames, grid[0] * grid[1], width, generator=noise)
    return [moving_FNE, torch.ones_like(moving_FNE)]


def _pooled(pooler: Pooler, clip_FNE: Tensor, grid: tuple[int, int]) -> int:
    boundaries = torch.tensor([0, len(clip_FNE)]), torch.tensor([0]), torch.arange(len(clip_FNE)).float()
    tokens = TokenSet.from_grid(clip_FNE, grid, *boundaries)
    given = {}
    if pooler.asks.needs:
        received_FN = clip_FNE.abs().mean(dim=2)
        layers_FNAE = clip_FNE[:, :, None].expand(-1, -1, len(pooler.asks.layers), -1)
        given["taps"] = Taps(pooler.asks, received_FN, clip_FNE[..., :64], layers_FNAE)
    with torch.no_grad():
        pooled: Any = pooler(tokens, **given)
    return int(pooled.num_tokens)


def check_stated(name: str, pooled_per_frame: float | None, patches: int) -> float:
    """Refuse a number of tokens that is missing or cannot be.

    Raises:
        UserError: names the pooler and says what to give.
    """
    if pooled_per_frame is None:
        raise UserError(
            f"pooler {name}: how many tokens it leaves depends on the data; give pooled_per_frame=NUMBER, for instance "
            f"the mean in the cost.json of a run"
        )
    if not 0 < pooled_per_frame <= patches:
        raise UserError(
            f"pooled_per_frame={pooled_per_frame}: must be above 0 and at most {patches}, a frame's patches"
        )
    return pooled_per_frame
