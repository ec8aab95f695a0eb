"""The C-Abstractor: convolutions around an average to a smaller grid.

Axis letters:
    F  frames    H W  rows and columns of patches    m  rows and columns of pooled tokens    D  encoder width
    C  width of the convolutions    N  patches of a frame
"""

import math
from dataclasses import replace

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Pooler, Stage, check_budget, check_positive, grid_of
from lightning_crosslmm.tokens import Opaque, TokenSet, compose, frame_in_visual, grid_coordinates


class CAbstractorPooler(Pooler):
    """Convolve, average to m x m, convolve: ``MLP(RegStage(avg_m(RegStage(x + p))))``.

    Source: Honeybee, arXiv:2312.06742 (C-Abstractor) and its code: three RegNet blocks on either side,
        SiLU and LayerNorm, learned positions `p`, an MLP of two layers. Blocks are timm's.
    Differs: `stage` before_projector leaves the MLP to the projector. A token's receptive field is the whole
        neighbourhood of its window, so the source map is opaque; places and masses are those of the average's windows.

    Args:
        num_tokens: m x m, a square, at most one token per patch along either side; Honeybee takes 144 or 256.
        width: C; Honeybee takes 1024.
        depth: blocks on either side; Honeybee takes 3.
        mlp_depth: linear layers at the end, for `stage` as_projector.
        stage: in the projector's place, or before it.
    """

    stages = (Stage.BEFORE_PROJECTOR, Stage.AS_PROJECTOR)
    needs = frozenset({"grid"})

    def __init__(
        self, num_tokens: int, width: int = 1024, depth: int = 3, mlp_depth: int = 2, stage: str = Stage.AS_PROJECTOR
    ) -> None:
        super().__init__(stage)
        check_positive(type(self).__name__, num_tokens=num_tokens, width=width, depth=depth, mlp_depth=mlp_depth)
        self.side = math.isqrt(num_tokens)
        if self.side**2 != num_tokens:
            raise UserError(
                f"pooler CAbstractorPooler: pooler.num_tokens is {num_tokens}, no square; it makes a grid, so it must "
                f"be one, {self.side**2} or {(self.side + 1) ** 2} for example"
            )
        self.num_tokens, self.width, self.depth, self.mlp_depth = num_tokens, width, depth, mlp_depth

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """Count the square, checked against the encoder's grid."""
        check_budget(type(self).__name__, self.num_tokens, grid)
        if self.side > min(grid):
            raise UserError(
                f"pooler CAbstractorPooler: pooler.num_tokens is {self.num_tokens}, a grid of {self.side}x{self.side}; "
                f"the encoder gives {grid[0]}x{grid[1]}, so it must be at most {min(grid) ** 2}"
            )
        return self.num_tokens

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make positions, both stages and the MLP."""
        self.grid = grid
        self.position_HWD = nn.Parameter(0.02 * torch.randn(*grid, in_width))
        self.before, self.after = self._convolutions(in_width), self._convolutions(self.width)
        if self.stage is Stage.BEFORE_PROJECTOR:
            self.readout: nn.Module = nn.Identity()
            return self.width
        layers: list[nn.Module] = [nn.Linear(self.width, llm_width)]
        for _ in range(self.mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(llm_width, llm_width)]
        self.readout = nn.Sequential(*layers)
        return llm_width

    def _convolutions(self, in_width: int) -> nn.Module:
        return RegStage(
            self.depth, in_width, self.width, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d
        )

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Abstract each frame; the result is a grid of m x m."""
        grid_FHWD = grid_of(self, tokens)
        if tokens.grid != self.grid:
            raise UserError(f"pooler CAbstractorPooler was built for a grid of {self.grid}, and is given {tokens.grid}")
        placed_FDHW = (grid_FHWD + self.position_HWD.to(grid_FHWD.dtype)).permute(0, 3, 1, 2)
        small_FCmm = nn.functional.adaptive_avg_pool2d(self.before(placed_FDHW), (self.side, self.side))
        pooled_FmmC = self.after(small_FCmm).permute(0, 2, 3, 1)
        scale = (self.grid[0] / self.side, self.grid[1] / self.side)
        place_S3 = grid_coordinates(frame_in_visual(tokens.visual_offsets), (self.side, self.side), scale)
        count = tokens.num_frames * self.num_tokens
        mass_F1 = tokens.mass_S.view(tokens.num_frames, math.prod(self.grid)).sum(dim=1, keepdim=True)
        return replace(
            tokens,
            features_SD=self.readout(pooled_FmmC.flatten(0, 2)),
            frame_offsets=torch.arange(tokens.num_frames + 1) * self.num_tokens,
            coordinate_S3=place_S3.to(grid_FHWD.device),
            mass_S=(mass_F1 / self.num_tokens).expand(-1, self.num_tokens).flatten(),
            grid=(self.side, self.side),
            source_map=compose(tokens.source_map, Opaque(count, tokens.num_tokens)),
        )
