"""The probe's pictures: coloured shapes in the quadrants of noisy frames, a new scene in every frame.

A question names a time and one property of an object and asks for another. Colours are independent of shapes and scenes of each
other, so the answer binds time, place, shape and colour: who knows only which colours a frame holds guesses among four.

Axis letters:
    F  frames    H W C  pixel rows, pixel columns, channels    O  objects per frame
"""

from dataclasses import dataclass

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
PLACES = ("top left", "top right", "low left", "low right")


def shape_masks(size: int) -> dict[str, np.ndarray]:
    """Draw the eight shapes as (size, size) bool masks; their names start with eight different letters."""
    y, x = np.mgrid[0:size, 0:size]
    v, u = (y - (size - 1) / 2) / (size / 2), (x - (size - 1) / 2) / (size / 2)
    radius = np.hypot(u, v)
    return {
        "disc": radius <= 0.95,
        "ring": (radius <= 1.0) & (radius >= 0.55),
        "box": np.maximum(abs(u), abs(v)) <= 0.85,
        "tri": (v <= 0.9) & (v >= 2.2 * abs(u) - 1.0),
        "plus": (np.minimum(abs(u), abs(v)) <= 0.3),
        "ex": (np.minimum(abs(u - v), abs(u + v)) <= 0.45),
        "moon": (radius <= 1.0) & (np.hypot(u - 0.55, v) >= 0.75),
        "hash": (abs(abs(u) - 0.5) <= 0.2) | (abs(abs(v) - 0.5) <= 0.2),
    }


@dataclass(frozen=True)
class Thing:
    """One object of a frame."""

    shape: str
    colour: str
    place: str
