"""A convolutional stem in place of the patch embedding, for vision transformers trained from scratch on little.

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    N  patches per frame    E  encoder width
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError


class ConvStem(nn.Module):
    """Reach the patch size by 3x3 convolutions of stride 2 instead of one large one.

    Source: Xiao et al., "Early convolutions help transformers see better", arXiv:2106.14881, section 4.
    Differs: GroupNorm in place of BatchNorm, so that a frame's tokens do not depend on the other frames of its batch.

    Args:
        img_size: pixels per side.
        patch_size: pixels per side of a token, a power of 2 from 4 on.
        in_chans: colour channels.
        embed_dim: E, a multiple of 8.
        device: where the weights are made.
        dtype: of the weights.
        unused: what timm says to every patch embedding and convolutions do not need.

    Raises:
        UserError: a patch size that strides of 2 cannot reach, or that does not divide the image.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        steps = round(math.log2(patch_size))
        if 2**steps != patch_size or steps < 2 or img_size % patch_size:
            raise UserError(
                f"encoder.stem=conv with encoder.config.patch_size {patch_size} and encoder.image_size {img_size}: "
                "the patch size must be 4, 8, 16 or 32 and divide the image size"
            )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [in_chans] + [max(8, embed_dim // 2 ** (steps - number)) for number in range(1, steps + 1)]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [
                nn.Conv2d(narrow, wide, 3, stride=2, padding=1, **place),
                nn.GroupNorm(1, wide, **place),
                nn.GELU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1, **place))
        side = img_size // patch_size
        self.grid_size, self.num_patches = (side, side), side * side
        self.patch_size = (patch_size, patch_size)

    def forward(self, pixels_FCHW: Tensor) -> Tensor:
        """Embed (F, C, H, W) as (F, N, E) in raster order."""
        return self.layers(pixels_FCHW).flatten(2).transpose(1, 2)
