"""The encoder's contract: uint8 frames in, a raster of patches per frame out.

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    N  patches per frame    E  encoder width
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_crosslmm.encoder.feature_cache import FeatureCache
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.taps import Asks, BlockHook, Taps, Tower

_CHANGES_NOTHING = ("frames_per_chunk", "same_frame_tolerance", "feature_cache")


class Encoder(nn.Module):
    """Turn frames into source tokens, one raster of patches per frame.

    Subclasses set `width`, `grid`, `num_blocks` and `read_block`, and write `patches`.

    Args:
        image_size: pixels per side that the tower expects.
        mean: per channel, on the 0..1 scale.
        std: per channel, on the 0..1 scale.
        frames_per_chunk: most frames in one call of the tower, so that memory does not grow with the clip; 1 or more.
        same_frame_tolerance: frames of a batch that repeat are encoded once. 0 to 255: mean absolute difference, up to
            which a frame counts as the one kept before it in its visual (see `stand_ins`); 0 asks for equal bytes. None
            encodes every frame.
        feature_cache: where features of a frozen encoder are kept from epoch to epoch; None keeps none.

    Raises:
        UserError: `frames_per_chunk` below 1, or a tolerance that no difference has.
    """

    width: int
    grid: tuple[int, int]
    num_blocks: int
    """Blocks of the full tower; those after `read_block` are gone."""
    read_block: int
    num_prefix: int = 0
    """Class and register tokens in front of the patches."""
    has_class_token: bool = False
    built_from: tuple[Any, ...]
    """The arguments of the constructor, those left out that change no feature."""
    identity: dict[str, Any]
    """Plain values that tell this tower from others: thresholds calibrated on one mean nothing on another."""

    gives: frozenset[str] = frozenset({"grid"})
    """What a pooler may ask for: ``"grid"``, a regular raster of patches per frame; ``"saliency.KIND"``, ``"keys"`` and
    ``"layers"`` (see `taps.Asks`); ``"blocks"``, a `taps.BlockHook` between the tower's blocks."""
    mean_C11: Tensor
    std_C11: Tensor
    probe_HE: Tensor | None
    """The attention-pooling head's probe (see `saliency.fold_probe`), where the tower has one and it was asked for."""

    def __new__(cls, *given: Any, **settings: Any) -> Self:
        """Note the arguments, of any subclass, for `Fingerprint`."""
        encoder = super().__new__(cls)
        encoder.built_from = given, {name: each for name, each in settings.items() if name not in _CHANGES_NOTHING}
        return encoder

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        frames_per_chunk: int,
        same_frame_tolerance: float | None = None,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        if same_frame_tolerance is not None and not 0 <= same_frame_tolerance <= 255:
            raise UserError(
                f"encoder.same_frame_tolerance is {same_frame_tolerance}; right are null, 0 for frames that are equal, "
                "and differences up to 255"
            )
        if frames_per_chunk < 1:
            raise UserError(f"encoder.frames_per_chunk is {frames_per_chunk}; it must be 1 frame or more")
        self.image_size, self.frames_per_chunk = image_size, frames_per_chunk
        self.same_frame_tolerance, self.feature_cache = same_frame_tolerance, feature_cache
        self.register_buffer("mean_C11", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)
        self.register_buffer("probe_HE", None)
        self._found_probe: list[Tensor] = []  # in a list, it is no part of the module until asked for

    def prepare(self, asks: Asks) -> None:
        """Get ready to fill in what a pooler asks for; called once, when the model is built.

        Raises:
            UserError: a layer that the tower has not, or not any more.
        """
        self.asked_blocks(asks)
        if asks.saliency == "probe":
            (self.probe_HE,) = self._found_probe
        self._found_probe = []

    def asked_blocks(self, asks: Asks) -> list[int]:
        """Number the blocks whose outputs are asked for."""
        return [asked_block(layer, self.num_blocks, self.read_block) for layer in asks.layers]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks that run as modules, whose weights sharded training may gather one block at a time."""
        return ()

    def normalise(self, frames_FCHW: Tensor) -> Tensor:
        """Bring uint8 pixels to the tower's scale: ``(x / 255 - mean) / std``, in the tower's dtype."""
        dtype = next(self.parameters()).dtype
        # one fused multiply-add per pixel: the division by 255 and by std share a factor
        scale_C11 = 1.0 / (255.0 * self.std_C11)
        return torch.addcmul(-self.mean_C11 / self.std_C11, frames_FCHW.float(), scale_C11).to(dtype)

    def patches(self, pixels_FCHW: Tensor) -> Tensor:
        """Run the tower: normalised (F, C, H, W) to (F, N, E), raster order, no class or register tokens."""
        raise NotImplementedError

    def tapped_patches(self, pixels_FCHW: Tensor, taps: Taps) -> Tensor:
        """Run the tower as `patches` does and fill in what `taps` asks for."""
        raise NotImplementedError(f"{type(self).__name__} gives no taps")

    def hooked_patches(self, pixels_FCHW: Tensor, hook: BlockHook) -> Tensor:
        """Run the tower with a hook between its blocks: (F, n, E), what is left without prefix tokens."""
        raise NotImplementedError(f"{type(self).__name__} runs no hooks")

    def forward(self, frames_FCHW: Tensor, taps: Taps | None = None, hook: BlockHook | None = None) -> Tensor:
        """Encode one chunk of frames.

        Args:
            frames_FCHW: uint8, H = W = `image_size`.
            taps: to be filled in on the way.
            hook: acts between the blocks.

        Returns:
            (F, N, E) in the tower's dtype; with a hook as many tokens as it leaves.

        Raises:
            UserError: the frames have another size.
        """
        if tuple(frames_FCHW.shape[-2:]) != (self.image_size, self.image_size):
            raise UserError(
                f"the encoder expects frames of {self.image_size}x{self.image_size} pixels, got "
                f"{frames_FCHW.shape[-2]}x{frames_FCHW.shape[-1]}; set data.image_size to encoder.image_size"
            )
        pixels_FCHW = self.normalise(frames_FCHW)
        if hook is not None:
            return self.hooked_patches(pixels_FCHW, hook)
        return self.patches(pixels_FCHW) if taps is None else self.tapped_patches(pixels_FCHW, taps)

    def facts(self) -> Tower:
        """Tell a pooler that acts in the encoder where it will act."""
        return Tower(self.read_block + 1, self.num_prefix, self.has_class_token, self.identity)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the tower's blocks in the backward pass."""
        raise NotImplementedError


def block_number(layer: int, num_blocks: int) -> int:
    """Turn `encoder.layer` (negative counts from the last block) into a block number from 0.

    Raises:
        UserError: the tower has no such block.
    """
    if not -num_blocks <= layer < num_blocks:
        raise UserError(
            f"encoder.layer is {layer}; this tower has blocks 0 to {num_blocks - 1} (or -{num_blocks} to -1)"
        )
    return layer % num_blocks


def asked_block(layer: int | float, num_blocks: int, read_block: int) -> int:
    """Turn one of `Asks.layers` into a block number from 0.

    Args:
        layer: a block, negative counts from the last of the full tower; or a share of the depth that is run.
        num_blocks: of the full tower.
        read_block: the last that is run.

    Raises:
        UserError: the tower has no such block, or it stands after the one that is read.
    """
    if isinstance(layer, float):
        if not 0.0 < layer <= 1.0:
            raise UserError(f"pooler.layers has {layer}; a share of the encoder's depth is above 0 and at most 1.0")
        return max(1, round(layer * (read_block + 1))) - 1
    if not -num_blocks <= layer < num_blocks:
        raise UserError(
            f"pooler.layers has {layer}; the encoder's tower has blocks 0 to {num_blocks - 1} (or -{num_blocks} to -1)"
        )
    if layer % num_blocks > read_block:
        raise UserError(
            f"pooler.layers has {layer}, block {layer % num_blocks} of {num_blocks}, but encoder.layer reads block "
            f"{read_block}, and those after it do not run; set encoder.layer={layer}, or take layers to {read_block}"
        )
    return layer % num_blocks
