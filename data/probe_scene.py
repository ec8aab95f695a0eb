"""The probe's pictures: coloured shapes in the quadrants of noisy frames, a new scene in every frame.

A question names a time and one property of a thing and asks for another. Colours are independent of shapes, and scenes
of each other, so an answer binds time, place, shape and colour among distractors: who knows only which colours a frame
holds, as the mean of a frame's patches tells, guesses among them.

Axis letters:
    F  frames    H W C  pixel rows, pixel columns, channels    O  things per frame (one per quadrant)
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 170, 40),
    "blue": (40, 60, 230),
    "yellow": (235, 220, 30),
    "cyan": (30, 210, 220),
    "pink": (240, 60, 200),
    "orange": (240, 140, 20),
    "white": (245, 245, 245),
}
SHAPES = ("disc", "ring", "bar", "lid", "plus", "ex", "tri", "moon")
PLACES = ("tl", "tr", "bl", "br")
"""The quadrants: top left, top right, bottom left, bottom right."""


@cache
def shape_masks(side: int) -> np.ndarray:
    """Draw the shapes: (8, side, side) bool, in the order of `SHAPES`."""
    y, x = np.mgrid[0:side, 0:side]
    v, u = (y - (side - 1) / 2) / (side / 2), (x - (side - 1) / 2) / (side / 2)
    radius = np.hypot(u, v)
    drawn = {
        "disc": radius <= 0.95,
        "ring": (radius <= 1.05) & (radius >= 0.6),
        "bar": abs(u) <= 0.3,
        "lid": abs(v) <= 0.3,
        "plus": np.minimum(abs(u), abs(v)) <= 0.25,
        "ex": np.minimum(abs(u - v), abs(u + v)) <= 0.3,
        "tri": v >= 2.0 * abs(u) - 0.9,
        "moon": (radius <= 1.05) & (u <= -0.05),
    }
    return np.stack([drawn[name] for name in SHAPES])


@dataclass(frozen=True)
class Scenes:
    """What a clip shows.

    Args:
        frames_FHWC: uint8 RGB.
        shape_FO: int, index into `SHAPES`, all different within a frame; -1 where a quadrant is empty.
        colour_FO: int, index into `COLOURS`.
    """

    frames_FHWC: np.ndarray
    shape_FO: np.ndarray
    colour_FO: np.ndarray


def render(random: np.random.Generator, num_frames: int, image_size: int, noise: float, num_things: int = 4) -> Scenes:
    """Draw one clip.

    Args:
        random: source of chance.
        num_frames: F; each is a new scene.
        image_size: pixels per side, at least 16; a shape takes 5/16 of it and stands anywhere in its quadrant.
        noise: standard deviation of the pixel noise, on the 0..1 scale.
        num_things: things per frame, 1 to 4, in quadrants of their own.
    """
    side, quadrant = image_size * 5 // 16, image_size // 2
    masks, rgb = shape_masks(side), np.array(list(COLOURS.values()), dtype=np.float32) / 255
    shape_FO = random.permuted(np.tile(np.arange(len(SHAPES)), (num_frames, 1)), axis=1)[:, :4]
    colour_FO = random.integers(0, len(COLOURS), (num_frames, 4))
    hidden_FO = random.permuted(np.tile(np.arange(4), (num_frames, 1)), axis=1) >= num_things
    background = random.uniform(0, 0.25, (num_frames, 1, 1, 3)).astype(np.float32)  # dark: no thing vanishes in it
    frames = np.broadcast_to(background, (num_frames, image_size, image_size, 3)).copy()
    jitter_FO2 = random.integers(0, quadrant - side + 1, (num_frames, 4, 2))
    for frame, thing in zip(*np.nonzero(~hidden_FO), strict=True):
        top, left = jitter_FO2[frame, thing] + np.array([thing // 2, thing % 2]) * quadrant
        window = frames[frame, top : top + side, left : left + side]
        window[masks[shape_FO[frame, thing]]] = rgb[colour_FO[frame, thing]]
    frames += random.normal(0, noise, frames.shape).astype(np.float32)
    frames_FHWC = (frames.clip(0, 1) * 255).astype(np.uint8)
    return Scenes(frames_FHWC, np.where(hidden_FO, -1, shape_FO), colour_FO)
