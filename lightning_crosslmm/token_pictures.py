"""Frames with what became of their patches painted over them: tokens as colours and outlines, attention as heat.

Axis letters:
    F  frames    C  channels (R, G, B)    P  pooled tokens    K  colours
    H W  rows and columns: pixels in pictures, patches of the encoder's grid in maps
"""

import colorsys
from collections import Counter, defaultdict

import matplotlib
import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad

from lightning_crosslmm.looks import Pooling

PICTURE_SIDE = 256
"""Smaller frames are enlarged by a whole factor to at least so many pixels."""

NUM_HUES = 12
TINT, DARK, HEAT = 0.5, 0.3, 0.6
"""Parts of a picture: of colour where patches merged, of light where they were dropped, of heat."""

WHITE = (255, 255, 255)
"""The outline of a patch that stays a token by itself."""


def enlarge(frames_FCHW: Tensor) -> Tensor:
    """Repeat the pixels of small frames until they are large enough to draw on."""
    factor = -(-PICTURE_SIDE // max(1, min(frames_FCHW.shape[-2:])))
    return frames_FCHW.cpu().repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def colours_of_tokens(pooling: Pooling) -> Tensor:
    """Choose a colour for each token that several patches went into, and white for the others.

    Tokens that touch, within a frame or at one place of two frames in a row, differ in hue by 30 degrees or in tone;
    no colour comes again before all were used, unless its neighbours took the others.

    Args:
        pooling: with a map.

    Returns:
        (P, 3) uint8.
    """
    token_FHW = pooling.token_FHW
    assert token_FHW is not None, "asked of tokens that can be traced"
    palette_K3 = _palette()
    merged = (pooling.patches_P > 1).nonzero().flatten().tolist()
    touching = _touching(token_FHW)
    colour_of: dict[int, int] = {}
    used = Counter(dict.fromkeys(range(len(palette_K3)), 0))
    for token in merged:
        taken = {colour_of[other] for other in touching[token] if other in colour_of}
        colour_of[token] = min(used, key=lambda colour: (colour in taken, used[colour], colour))
        used[colour_of[token]] += 1
    colours_P3 = torch.tensor(WHITE, dtype=torch.uint8).repeat(len(pooling.patches_P), 1)
    if merged:
        colours_P3[merged] = palette_K3[[colour_of[token] for token in merged]]
    return colours_P3


def _palette() -> Tensor:
    """Twelve hues, far from the one before, in a bright and a deep tone."""
    hues = [5 * number % NUM_HUES / NUM_HUES for number in range(NUM_HUES)]
    tones = [colorsys.hsv_to_rgb(hue, *tone) for tone in ((0.75, 1.0), (1.0, 0.55)) for hue in hues]
    return (torch.tensor(tones) * 255).round().to(torch.uint8)


def _touching(token_FHW: Tensor) -> dict[int, set[int]]:
    pairs = [
        torch.stack([token_FHW.narrow(axis, 0, size - 1), token_FHW.narrow(axis, 1, size - 1)], dim=-1).flatten(0, -2)
        for axis, size in enumerate(token_FHW.shape)
        if size > 1
    ]
    touching: dict[int, set[int]] = defaultdict(set)
    for one, other in torch.cat(pairs).unique(dim=0).tolist() if pairs else []:
        if one != other:
            touching[one].add(other)
            touching[other].add(one)
    return touching


def paint_tokens(frames_FCHW: Tensor, pooling: Pooling) -> Tensor:
    """Paint what became of each patch over the frames.

    A patch that is a token by itself stays clear, with a white outline. Patches that merged have the colour of their
    token, outlined where it ends, the stronger the more they weigh in it, and the same colour in all frames; of several
    tokens that of the one that most of them went into. Dropped patches are dark and grey. Where tokens cannot be
    traced, frames stay as they are.

    Args:
        frames_FCHW: uint8, of one sample.
        pooling: of the same sample.

    Returns:
        (F, H, W, 3) uint8, as large as `enlarge` makes them.
    """
    frames_FHWC = enlarge(frames_FCHW).permute(0, 2, 3, 1)
    if pooling.token_FHW is None:
        return frames_FHWC
    colours_P3, is_merged_P = colours_of_tokens(pooling), pooling.patches_P > 1
    # a last place catches the -1 of dropped patches
    colours_P3 = torch.cat([colours_P3, colours_P3.new_zeros(1, 3)]).float()
    is_merged_P = torch.cat([is_merged_P, is_merged_P.new_zeros(1)])
    side, patches = min(frames_FHWC.shape[1:3]), max(pooling.token_FHW.shape[1:])
    line = max(1, min(side // 128, side // (8 * patches)))
    painted = []
    for frame_HWC, token_HW, strength_HW in zip(frames_FHWC, pooling.token_FHW, pooling.strength_FHW, strict=True):
        owner_HW, weight_HW = (_on_pixels(each, frame_HWC.shape[:2]) for each in (token_HW, strength_HW))
        picture_HWC = frame_HWC.float()
        tint_HW1 = (TINT * (0.25 + 0.75 * weight_HW) * is_merged_P[owner_HW])[..., None]
        picture_HWC = torch.lerp(picture_HWC, colours_P3[owner_HW], tint_HW1.expand_as(picture_HWC))
        grey_HW1 = DARK * frame_HWC.float().mean(dim=-1, keepdim=True)
        picture_HWC = torch.where((owner_HW < 0)[..., None], grey_HW1, picture_HWC)
        is_line_HW = _ends(owner_HW, line) & (owner_HW >= 0)
        painted.append(torch.where(is_line_HW[..., None], colours_P3[owner_HW], picture_HWC))
    return torch.stack(painted).round().to(torch.uint8) if painted else frames_FHWC


def _on_pixels(map_HW: Tensor, size: torch.Size) -> Tensor:
    """Give each pixel the value of its patch, also where the grid does not divide the picture."""
    row_H, column_W = (
        torch.arange(pixels) * patches // pixels for pixels, patches in zip(size, map_HW.shape, strict=True)
    )
    return map_HW[row_H[:, None], column_W]


def _ends(owner_HW: Tensor, width: int) -> Tensor:
    """Mark the pixels of each token that lie at most `width` pixels from another one, or from the picture's border."""
    around_HW = pad(owner_HW.double(), (width,) * 4, value=-2.0)[None]
    highest_HW, lowest_HW = (sign * max_pool2d(sign * around_HW, 2 * width + 1, stride=1)[0] for sign in (1, -1))
    return (highest_HW != owner_HW) | (lowest_HW != owner_HW)


def paint_heat(frames_FCHW: Tensor, heat_FHW: Tensor) -> Tensor:
    """Lay a map over the frames, from dark for nothing to bright for the largest value of all frames.

    Args:
        frames_FCHW: uint8, of one sample.
        heat_FHW: float, at least 0.

    Returns:
        (F, H, W, 3) uint8, as large as `enlarge` makes them.
    """
    frames_FCHW = enlarge(frames_FCHW)
    share_FHW = heat_FHW.detach().float().cpu() / heat_FHW.max().clamp(min=1e-12).cpu()
    size = (frames_FCHW.shape[-2], frames_FCHW.shape[-1])
    smooth_FHW = interpolate(share_FHW[:, None], size=size, mode="bilinear")[:, 0].clamp(0, 1)
    steps = [matplotlib.colormaps["inferno"](step)[:3] for step in range(256)]
    colours_FHWC = 255 * torch.tensor(steps, dtype=torch.float32)[(smooth_FHW * 255).round().long()]
    return torch.lerp(frames_FCHW.permute(0, 2, 3, 1).float(), colours_FHWC, HEAT).round().to(torch.uint8)
