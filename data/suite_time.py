"""Tasks of the probe suite that take several frames together: order, count, motion.

Chance is the share of right answers without a look at the clip.
"""

from dataclasses import dataclass

import numpy as np

from data.probe_scene import PLACES, SHAPES, shape_masks
from data.suite_scene import Board, Drawn, Item, Task, check_share, check_whole, some_colours, some_shapes

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Steps along rows and columns of pixels."""


@dataclass(frozen=True)
class Order(Task):
    """Ordering: "tl e2?" -> "moon", the second of the shapes that show up, one at a time, in the top left quadrant.

    Quadrants have events of their own, so that one answer tells nothing about another. Chance 1/8; who knows the shapes
    of a quadrant and not their order gets 1/events.

    **Source**: the ordering of VideoNIAH (Zhao et al., arXiv:2406.09367).
    **Differs**: asks for one place in the order instead of the whole of it.

    Args:
        events: shapes in a quadrant, one frame each, 2 to 8.
        places: quadrants in which there is something to order, 1 to 4.
    """

    events: int
    places: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_whole("order.events", self.events, 2, len(SHAPES))
        check_whole("order.places", self.places, 1, len(PLACES))

    @property
    def least_frames(self) -> int:
        """One per event."""
        return self.events

    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip; see `Task.draw`."""
        board, items = Board(random, num_frames, image_size), []
        for place in random.permutation(len(PLACES))[: self.places].tolist():
            shapes, colours = some_shapes(random, self.events), some_colours(random, self.events)
            frames = sorted(random.permutation(num_frames)[: self.events].tolist())
            for frame, shape, colour in zip(frames, shapes, colours, strict=True):
                board.thing(frame, place, shape, colour)
            asked, choices = int(random.integers(self.events)), tuple(sorted(SHAPES[shape] for shape in shapes))
            items.append(Item(f"{PLACES[place]} e{asked + 1}?", SHAPES[shapes[asked]], choices, frames[asked]))
        return Drawn(board.frames_FHWC, tuple(items))


@dataclass(frozen=True)
class Count(Task):
    """Counting: "moon times?" -> "3", the number of frames that show a moon.

    Chance 1/most. Nothing is lost by who knows which shapes each frame holds.

    **Source**: the counting of VideoNIAH (Zhao et al., arXiv:2406.09367).
    **Differs**: counts frames; a shape stands at most once in each.

    Args:
        most: largest number that is an answer, the smallest being 1; 2 to 9.
        asked: shapes that are asked about, each with a number of its own, 1 to `things`.
        things: in each frame, of different shapes, 1 to 4.
    """

    most: int
    asked: int
    things: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_whole("count.most", self.most, 2, 9)
        check_whole("count.things", self.things, 1, 4)
        check_whole("count.asked", self.asked, 1, self.things)

    @property
    def least_frames(self) -> int:
        """As many as the largest number."""
        return self.most

    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip; see `Task.draw`."""
        board, shapes = Board(random, num_frames, image_size), some_shapes(random, len(SHAPES))
        asked, rest = shapes[: self.asked], shapes[self.asked :]
        times = random.integers(1, self.most + 1, self.asked).tolist()
        frames_of = [random.permutation(num_frames)[:count].tolist() for count in times]
        for frame in range(num_frames):
            here = [shape for shape, frames in zip(asked, frames_of, strict=True) if frame in frames]
            here += random.permutation(rest)[: self.things - len(here)].tolist()
            places, colours = random.permutation(4)[: self.things].tolist(), some_colours(random, self.things)
            for place, shape, colour in zip(places, here, colours, strict=True):
                board.thing(frame, place, shape, colour)
        choices = tuple(map(str, range(1, self.most + 1)))
        counted = zip(asked, times, strict=True)
        items = (Item(f"{SHAPES[shape]} times?", str(count), choices) for shape, count in counted)
        return Drawn(board.frames_FHWC, tuple(items))


@dataclass(frozen=True)
class Motion(Task):
    """Motion direction: "moon moves?" -> "left".

    Things come in again at the other edge and start anywhere, so that a single frame tells nothing. Chance 1/4.

    **Source**: moving shapes as in CLEVRER (Yi et al., arXiv:1910.01442) and MVBench's tasks made of it.
    **Differs**: steady motion along one axis, in two dimensions, without collisions.

    Args:
        movers: things of different shapes that move, each its way, 1 to 4; all are asked about.
        speed: share of the frame's side per frame, 1/32 to 7/16; at 1/2 left and right would be the same.
    """

    movers: int
    speed: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_whole("motion.movers", self.movers, 1, 4)
        check_share("motion.speed", self.speed, 1 / 32, 7 / 16)

    @property
    def least_frames(self) -> int:
        """Two show a step."""
        return 2

    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip; see `Task.draw`."""
        board, step = Board(random, num_frames, image_size, steady=True), round(self.speed * image_size)
        shapes, colours = some_shapes(random, self.movers), random.permutation(8)[: self.movers].tolist()
        ways = [list(DIRECTIONS)[way] for way in random.integers(0, len(DIRECTIONS), self.movers)]
        for shape, colour, way in zip(shapes, colours, ways, strict=True):
            top, left = random.integers(0, image_size, 2).tolist()
            down, right = (step * axis for axis in DIRECTIONS[way])
            for frame in range(num_frames):
                mask_SS = shape_masks(board.side)[shape]
                board.stamp(frame, mask_SS, colour, top + frame * down, left + frame * right)
        asked = zip(shapes, ways, strict=True)
        items = (Item(f"{SHAPES[shape]} moves?", way, tuple(DIRECTIONS)) for shape, way in asked)
        return Drawn(board.frames_FHWC, tuple(items))
