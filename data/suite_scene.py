"""What the tasks of the probe suite draw with: a board of frames, shapes that are stamped on it, and what is asked.

Axis letters:
    F  frames    H W C  pixel rows, pixel columns, channels    S  side of a shape
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from data.probe_scene import COLOURS, SHAPES, shape_masks
from lightning_crosslmm.errors import UserError

COLOUR_NAMES = tuple(COLOURS)
GREY = (150, 150, 150)
"""Of things whose colour is no answer; it is none of `COLOURS`."""


@dataclass(frozen=True)
class Item:
    """One question about a clip.

    Args:
        question: a short text.
        answer: one word.
        choices: every word that it may be, the same number for all items of a task.
        frame: the one frame that holds the answer, from 0; None where there is no such frame.
    """

    question: str
    answer: str
    choices: tuple[str, ...]
    frame: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A clip without its noise: float32 RGB from 0 to 1, and all that can be asked about it."""

    frames_FHWC: np.ndarray
    items: tuple[Item, ...]


class Task(ABC):
    """One task of the suite: its difficulty is its settings, and no item of a clip tells anything about another."""

    @property
    @abstractmethod
    def least_frames(self) -> int:
        """Fewest frames that a clip needs."""

    @abstractmethod
    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip.

        Args:
            random: source of chance.
            num_frames: F, `least_frames` or more.
            image_size: pixels per side, even, 32 or more.
        """


class Board:
    """The frames of a clip, empty and dark at first; a shape takes 5/16 of a side, as in the probe's frames.

    Args:
        random: source of chance.
        num_frames: F.
        image_size: pixels per side.
        steady: one background for all frames, else one for each.
    """

    def __init__(self, random: np.random.Generator, num_frames: int, image_size: int, steady: bool = False) -> None:
        self._random, self.image_size, self.side = random, image_size, image_size * 5 // 16
        background = random.uniform(0, 0.25, (1 if steady else num_frames, 1, 1, 3)).astype(np.float32)
        self.frames_FHWC = np.broadcast_to(background, (num_frames, image_size, image_size, 3)).copy()

    def stamp(self, frame: int | slice, mask_SS: np.ndarray, colour: int | None, top: int, left: int) -> None:
        """Paint a mask, in a colour by its number or in grey; what leaves at one edge comes in at the other."""
        rows, columns = np.nonzero(mask_SS)
        rgb = np.array(GREY if colour is None else COLOURS[COLOUR_NAMES[colour]], dtype=np.float32) / 255
        self.frames_FHWC[frame, (top + rows) % self.image_size, (left + columns) % self.image_size] = rgb

    def thing(self, frame: int | slice, place: int, shape: int, colour: int | None) -> None:
        """Paint a shape anywhere in a quadrant, by its number in `PLACES`."""
        self.stamp(frame, shape_masks(self.side)[shape], colour, *self.corner(place, self.side))

    def block(self, frame: int | slice, place: int, colour: int, side: int) -> None:
        """Paint a square anywhere in a quadrant."""
        self.stamp(frame, np.ones((side, side), dtype=bool), colour, *self.corner(place, side))

    def corner(self, place: int, side: int) -> tuple[int, int]:
        """Draw the top left corner of something that stays in its quadrant."""
        half = self.image_size // 2
        down, right = self._random.integers(0, half - side + 1, 2)
        return int(down) + place // 2 * half, int(right) + place % 2 * half


def some_shapes(random: np.random.Generator, count: int) -> list[int]:
    """Draw different shapes."""
    return [int(shape) for shape in random.permutation(len(SHAPES))[:count]]


def some_colours(random: np.random.Generator, count: int) -> list[int]:
    """Draw colours, each by itself."""
    return [int(colour) for colour in random.integers(0, len(COLOURS), count)]


def check_whole(setting: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number of a range.

    Raises:
        UserError: names the setting, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"data.difficulty.{setting}: must be a whole number from {low} to {high}, got {value!r}")


def check_share(setting: str, value: object, low: float, high: float) -> None:
    """Refuse what is no share of a frame's side in a range.

    Raises:
        UserError: names the setting, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"data.difficulty.{setting}: must be from {low} to {high} of a frame's side, got {value!r}")
