"""Reads the suite's clips from their pixels alone, slowly and plainly: no renderer's record is looked at.

Axis letters:
    F  frames    H W C  pixel rows, pixel columns, channels
"""

from typing import NamedTuple

import numpy as np

from data.probe_scene import COLOURS, SHAPES, shape_masks
from data.suite_scene import GREY

NAMES = {**COLOURS, "grey": GREY}


class Seen(NamedTuple):
    """A thing: its shape, or "square", its colour, and the corner of its pixels."""

    shape: str
    colour: str
    top: int
    left: int


def trimmed(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def where(picture_HWC: np.ndarray, colour: str) -> np.ndarray:
    """Pixels of a colour."""
    return (abs(picture_HWC - np.array(NAMES[colour], dtype=np.float32) / 255) < 1e-4).all(axis=-1)


def shape_of(mask: np.ndarray) -> str:
    side = 20
    forms = {name: trimmed(drawn) for name, drawn in zip(SHAPES, shape_masks(side), strict=True)}
    forms["square"] = np.ones((side, side), dtype=bool)
    found = [name for name, form in forms.items() if np.array_equal(form, trimmed(mask))]
    return found[0] if found else "?"


def things(picture_HWC: np.ndarray, cells: int = 2) -> list[Seen]:
    """What stands in each cell of a raster, cell by cell."""
    size, found = picture_HWC.shape[0] // cells, []
    for row in range(cells):
        for column in range(cells):
            cell = picture_HWC[row * size : (row + 1) * size, column * size : (column + 1) * size]
            for colour in NAMES:
                mask = where(cell, colour)
                if mask.any():
                    found.append(Seen(shape_of(mask), colour, row * size, column * size))
    return found


def best_place(mask: np.ndarray, shape: str) -> float:
    """Largest share of a shape's pixels that a mask holds, wherever the shape stands, edges being joined."""
    form = np.zeros(mask.shape)
    form[:20, :20] = shape_masks(20)[SHAPES.index(shape)]
    overlap = np.fft.ifft2(np.fft.fft2(mask.astype(float)) * np.conj(np.fft.fft2(form))).real
    return float(overlap.max() / max(form.sum(), mask.sum()))
