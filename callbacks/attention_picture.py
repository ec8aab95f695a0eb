"""Where the model looked: ``attention.png``, frames with what V2V and T2V attended to.

Axis letters:
    F  frames of a clip      C  channels
    H W  rows and columns: pixels in frames, patches of the encoder's grid in maps
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from callbacks.look_picture import LookPicture
from lightning_crosslmm.contact_sheet import plain, save
from lightning_crosslmm.looks import Look

MAX_FRAMES = 8


class AttentionPicture(LookPicture):
    """Draw frames of the first clips with where both branches looked."""

    def draw(self, looks: Sequence[Look], run_dir: Path) -> None:
        """Write ``attention.png``."""
        draw_looks(looks, run_dir / "attention.png")


def draw_looks(looks: Sequence[Look], path: Path) -> Figure:
    """Draw a strip of frames for each clip and, below it, one strip for each branch with its map laid over.

    A map is scaled to its own largest value, so strips show where, not how much.

    Args:
        looks: at least one, each with frames; of a clip with more than 8 frames, 8 evenly spaced ones are shown.
        path: the PNG to write.

    Returns:
        The figure.
    """
    strips = [(look, name, heat) for look in looks for name, heat in _strips(look)]
    figure = Figure(figsize=(12, 1.9 * len(strips)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (look, name, heat_FHW) in zip(figure.subplots(len(strips), squeeze=False)[:, 0], strips, strict=True):
        shown = _spread(len(look.frames_FCHW))
        frames_FCHW = look.frames_FCHW[shown].cpu()
        axes.imshow(_side_by_side(frames_FCHW).numpy())
        if heat_FHW is None:
            said = f"asked: {look.question}   right: {look.expected}   model: {look.answer}"
            axes.set_title(plain(said, 150), fontsize=9, loc="left")
        else:
            heat_FCHW = heat_FHW[shown].detach().float().cpu()[:, None]
            heat_FCHW = interpolate(heat_FCHW, size=frames_FCHW.shape[-2:], mode="bilinear")
            heat_HW = _side_by_side(heat_FCHW)[..., 0]
            axes.imshow(heat_HW.numpy(), alpha=0.6, cmap="inferno", vmin=0, vmax=max(heat_HW.max().item(), 1e-12))
        axes.set(xticks=[], yticks=[], ylabel=name)
    save(figure, path, dpi=100)
    return figure


def _strips(look: Look) -> list[tuple[str, Tensor | None]]:
    branches = [(name, heat) for name, heat in (("V2V", look.v2v_FHW), ("T2V", look.t2v_FHW)) if heat is not None]
    return [(plain(look.key, 16), None), *branches]


def _spread(num_frames: int) -> list[int]:
    count = min(num_frames, MAX_FRAMES)
    return [(2 * index + 1) * num_frames // (2 * count) for index in range(count)]


def _side_by_side(pictures_FCHW: Tensor) -> Tensor:
    """(F, C, H, W) to one picture (H, F * W, C)."""
    return pictures_FCHW.permute(2, 0, 3, 1).flatten(1, 2)
