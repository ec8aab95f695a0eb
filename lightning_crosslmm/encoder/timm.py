"""timm's vision towers (the only door to timm).

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    N  patches per frame    E  encoder width
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from lightning_crosslmm.encoder.base import Encoder, block_number
from lightning_crosslmm.encoder.stem import ConvStem
from lightning_crosslmm.errors import UserError, nearest


class TimmEncoder(Encoder):
    """Read source tokens from a block of a timm model.

    Args:
        name: timm's model name, such as ``vit_so400m_patch14_siglip_384``.
        image_size: pixels per side; timm resizes position embeddings where it can.
        pretrained: load the weights timm names for the model (from its hub or the local cache). Not loaded on the meta
            device.
        layer: block whose output is read; negative counts from the last. -2 is the LLaVA convention.
        final_norm: apply the tower's last norm to it.
        frames_per_chunk: most frames in one call.
        stem: ``patch`` as the model has it, or ``conv`` (see `ConvStem`; from scratch only).
        config: further arguments of the timm model (``embed_dim``, ``depth``, ...).

    Raises:
        UserError: an unknown name or argument, a model without patch tokens, or a block it does not have.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        pretrained: bool = False,
        layer: int = -1,
        final_norm: bool = True,
        frames_per_chunk: int = 64,
        stem: str = "patch",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if stem not in ("patch", "conv"):
            raise UserError(f"encoder.stem is '{stem}'; right are patch, conv{nearest(stem, ('patch', 'conv'))}")
        own_stem: dict[str, Any] = {"embed_layer": ConvStem} if stem == "conv" else {}
        if not timm.is_model(name):
            raise UserError(f"encoder.name is '{name}', which timm does not know{nearest(name, timm.list_models())}")
        on_meta = torch.get_default_device().type == "meta"
        try:
            tower: Any = timm.create_model(
                name,
                pretrained=pretrained and not on_meta,
                num_classes=0,
                img_size=image_size,
                **own_stem,
                **(config or {}),
            )
        except (TypeError, AssertionError) as error:
            raise UserError(
                f"timm could not build encoder.name '{name}' with image_size {image_size} and "
                f"encoder.config {dict(config or {})}: {error}"
            ) from error
        if not hasattr(tower, "blocks") or not hasattr(tower, "patch_embed"):
            raise UserError(
                f"encoder.name '{name}' gives no patch tokens; choose a vision transformer, such "
                "as a vit_* or eva02_* model"
            )
        data = tower.pretrained_cfg
        super().__init__(image_size, data["mean"], data["std"], frames_per_chunk)
        block = block_number(layer, len(tower.blocks))
        tower.prune_intermediate_layers([block], prune_norm=not final_norm, prune_head=True)
        self.tower: Any = tower
        self.final_norm = final_norm
        self.width = tower.embed_dim
        self.grid = tuple(tower.patch_embed.grid_size)

    def patches(self, pixels_FCHW: Tensor) -> Tensor:
        """Run the remaining blocks and drop class and register tokens."""
        (patches_FNE,) = self.tower.forward_intermediates(
            pixels_FCHW,
            indices=[len(self.tower.blocks) - 1],
            norm=self.final_norm,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return patches_FNE

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the tower's blocks in the backward pass."""
        self.tower.set_grad_checkpointing(True)
