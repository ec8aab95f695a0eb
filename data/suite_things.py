"""Tasks of the probe suite that look for one thing among others: needle, patch, select, recall.

Chance is the share of right answers without a look at the clip. The ceiling is that of who knows which shapes and which
colours each frame holds, as the mean of its patches tells, and not which belongs to which, or where.
"""

from dataclasses import dataclass

import numpy as np

from data.probe_scene import PLACES, SHAPES, shape_masks
from data.suite_scene import COLOUR_NAMES, Board, Drawn, Item, Task, check_share, check_whole, some_colours, some_shapes

CELLS = 3
"""Rows and columns of `Select`'s raster."""


@dataclass(frozen=True)
class Needle(Task):
    """Retrieval over frames and depth: "moon?" -> "red", where the moon stands in one single frame.

    Every frame shows other things; a needle's shape is not among them. Chance 1/8; ceiling 0.412 with ``others=3``.

    **Source**: V-NIAH (Zhang et al., arXiv:2406.16852): a needle at every depth of clips of every length.
    **Differs**: rendered shapes instead of real pictures; several needles to a clip, each in a frame of its own.

    Args:
        needles: things that are asked about, 1 to 7.
        others: other things in each frame, 0 to 3.
    """

    needles: int
    others: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_whole("needle.needles", self.needles, 1, 7)
        check_whole("needle.others", self.others, 0, min(3, len(SHAPES) - self.needles))

    @property
    def least_frames(self) -> int:
        """One per needle."""
        return self.needles

    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip; see `Task.draw`."""
        board, shapes = Board(random, num_frames, image_size), some_shapes(random, len(SHAPES))
        needles, rest = shapes[: self.needles], shapes[self.needles :]
        frames, colours = random.permutation(num_frames)[: self.needles].tolist(), some_colours(random, self.needles)
        for frame in range(num_frames):
            here = [(needles[number], colours[number]) for number, at in enumerate(frames) if at == frame]
            others = random.permutation(rest)[: self.others].tolist()
            here += zip(others, some_colours(random, len(others)), strict=True)
            for place, (shape, colour) in zip(random.permutation(4).tolist(), here, strict=False):
                board.thing(frame, place, shape, colour)
        asked = zip(needles, colours, frames, strict=True)
        items = (Item(f"{SHAPES[shape]}?", COLOUR_NAMES[colour], COLOUR_NAMES, at) for shape, colour, at in asked)
        return Drawn(board.frames_FHWC, tuple(items))


@dataclass(frozen=True)
class Patch(Task):
    """A small edit of one frame: "tl patch?" -> "red", the colour of a small square that is there in one frame only.

    The rest of the scene stands still. Chance 1/8; 1/7 for who knows the thing beneath, whose colour is never the
    patch's; ceiling 0.412 with ``edits=4``.

    **Source**: the edited needles of VideoNIAH (Zhao et al., arXiv:2406.09367).
    **Differs**: a square of one colour instead of a subtitle.

    Args:
        size: side of the square as a share of the frame's, 1/32 to 1/4.
        edits: patches in a clip, each in a frame and a quadrant of its own, 1 to 4.
        things: things that stand still, 0 to 4.
    """

    size: float
    edits: int
    things: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_share("patch.size", self.size, 1 / 32, 1 / 4)
        check_whole("patch.edits", self.edits, 1, 4)
        check_whole("patch.things", self.things, 0, 4)

    @property
    def least_frames(self) -> int:
        """One per edit, and one that shows none."""
        return self.edits + 1

    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip; see `Task.draw`."""
        board, side = Board(random, num_frames, image_size, steady=True), round(self.size * image_size)
        patches, shapes = some_colours(random, 4), some_shapes(random, 4)
        away = random.integers(1, len(COLOUR_NAMES), 4)
        for place in random.permutation(4)[: self.things].tolist():
            board.thing(slice(None), place, shapes[place], (patches[place] + int(away[place])) % len(COLOUR_NAMES))
        frames, items = random.permutation(num_frames).tolist(), []
        for place, frame in zip(random.permutation(4)[: self.edits].tolist(), frames, strict=False):
            board.block(frame, place, patches[place], side)
            items.append(Item(f"{PLACES[place]} patch?", COLOUR_NAMES[patches[place]], COLOUR_NAMES, frame))
        return Drawn(board.frames_FHWC, tuple(items))


@dataclass(frozen=True)
class Select(Task):
    """The question decides what matters: "moon?" -> "red", among many things that all stand there in all frames.

    Chance 1/8; ceiling 0.325 with ``things=8``.

    Args:
        things: of different shapes, each in a cell of a raster of 3 x 3, 2 to 8; all are asked about.
    """

    things: int

    def __post_init__(self) -> None:
        """Check the range."""
        check_whole("select.things", self.things, 2, len(SHAPES))

    @property
    def least_frames(self) -> int:
        """A picture is enough."""
        return 1

    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip; see `Task.draw`."""
        board, cell = Board(random, num_frames, image_size, steady=True), image_size // CELLS
        shapes, colours = some_shapes(random, self.things), some_colours(random, self.things)
        cells = random.permutation(CELLS**2)[: self.things].tolist()
        for shape, colour, (row, column) in zip(shapes, colours, (divmod(at, CELLS) for at in cells), strict=True):
            down, right = random.integers(0, cell - board.side + 1, 2).tolist()
            mask_SS = shape_masks(board.side)[shape]
            board.stamp(slice(None), mask_SS, colour, row * cell + down, column * cell + right)
        asked = zip(shapes, colours, strict=True)
        items = (Item(f"{SHAPES[shape]}?", COLOUR_NAMES[colour], COLOUR_NAMES) for shape, colour in asked)
        return Drawn(board.frames_FHWC, tuple(items))


@dataclass(frozen=True)
class Recall(Task):
    """Key patch to value patch: "moon key?" -> "red", the colour of the square to the right of the grey moon.

    A key has the same value wherever it stands in a clip. Chance 1/8; the ceiling is not counted out with ``pairs=2``,
    because a key that comes again beside another tells more; with ``pairs=1`` it is 1.

    **Source**: multi-query associative recall (Arora et al., Zoology, arXiv:2312.04927).
    **Differs**: keys and values are seen and not read, and stand side by side in space.

    Args:
        keys: in a clip, 2 to 8; all are asked about.
        pairs: of key and value in a frame, one above the other, 1 or 2.
    """

    keys: int
    pairs: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_whole("recall.keys", self.keys, 2, len(SHAPES))
        check_whole("recall.pairs", self.pairs, 1, 2)

    @property
    def least_frames(self) -> int:
        """Enough to show each key."""
        return -(-self.keys // self.pairs)

    def draw(self, random: np.random.Generator, num_frames: int, image_size: int) -> Drawn:
        """Draw one clip; see `Task.draw`."""
        board = Board(random, num_frames, image_size)
        keys, values = some_shapes(random, self.keys), some_colours(random, self.keys)
        rounds = -(-num_frames * self.pairs // self.keys)
        shown = np.concatenate([random.permutation(self.keys) for _ in range(rounds)]).tolist()
        for frame in range(num_frames):
            rows = random.permutation(2)[: self.pairs].tolist()
            for row, number in zip(rows, shown[frame * self.pairs :], strict=False):
                board.thing(frame, 2 * row, keys[number], None)
                board.block(frame, 2 * row + 1, values[number], board.side)
        asked = zip(keys, values, strict=True)
        items = (Item(f"{SHAPES[key]} key?", COLOUR_NAMES[value], COLOUR_NAMES) for key, value in asked)
        return Drawn(board.frames_FHWC, tuple(items))
