"""What a model saw, as a contact sheet and as a video: frames, tokens, and attention layer by layer.

Axis letters:
    F  frames    C  channels (R, G, B)    H W  pixel rows, pixel columns    P  pooled tokens
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from lightning_crosslmm.looks import Look, Pooling
from lightning_crosslmm.run_folder import replacing
from lightning_crosslmm.token_pictures import (
    colours_of_tokens,
    enlarge,
    paint_heat,
    paint_tokens,
)
from lightning_crosslmm.video import encode_video

LEAST_COLUMNS, CELL_IN, SHEET_DPI, SHEET_PIXELS = 8, 1.9, 150, 24e6
"""Frames side by side before they wrap, inches of each, dots per inch, and the most pixels of a sheet."""

PANEL_IN, VIDEO_DPI = 4.2, 100
LEGEND_TOKENS = 8
BRANCHES = {"v2v": "V2V", "t2v": "T2V"}


@dataclass(frozen=True)
class _Row:
    """One row of a sheet."""

    pictures: Sequence[Tensor]  # (H, W, C) uint8, all of one size
    below: Sequence[str]  # a word or two under each
    name: str = ""
    title: str = ""
    legend: Pooling | None = None
    has_map: bool = True


def draw_sheet(looks: Sequence[Look], path: Path) -> Figure:
    """Draw all frames of each sample in a row, and below it a row of tokens and one for each fused layer and branch.

    Long clips wrap. Of an image, which is one frame, all stands in one row. Heat is scaled to the largest weight of
    its layer, which is told.

    Args:
        looks: at least one, each with frames.
        path: the PNG to write.

    Returns:
        The figure.
    """
    rows = [row for look in looks for row in _rows(look)]
    columns = max(len(row.pictures) for row in rows)
    width, height = 0.7 + (CELL_IN + 0.08) * columns, 0.65 * len(looks) + sum(map(_height_in, rows))
    figure = Figure(figsize=(max(width, 7.5), height), layout="compressed")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        _draw_row(axes, row, columns)
    save(figure, path, min(SHEET_DPI, math.sqrt(SHEET_PIXELS / (width * height))), bbox_inches="tight")
    return figure


def _height_in(row: _Row) -> float:
    return CELL_IN + 0.08 + 0.18 * any(row.below) + 0.18 * (row.legend is not None)


def _rows(look: Look) -> list[_Row]:
    strips, pooling = _strips(look), look.sight.pooling
    num_frames, has_map = len(look.frames_FCHW), pooling is None or pooling.token_FHW is not None
    lines = math.ceil(num_frames / max(LEAST_COLUMNS, math.sqrt(len(strips) * num_frames / 2)))
    columns = len(strips) if num_frames == 1 else math.ceil(num_frames / lines)
    title = _head(look, max(90, 24 * columns))
    if num_frames == 1:
        names = [name if has_map or name != "tokens" else "tokens: no map" for name, _ in strips]
        return [_Row([pictures[0] for _, pictures in strips], names, "", title, pooling)]
    rows = []
    for start in range(0, num_frames, columns):
        shown = range(start, min(start + columns, num_frames))
        for name, pictures in strips:
            below = [""] * len(shown)
            if name == "frames" and look.frame_time_s_F is not None:
                below = [f"{look.frame_time_s_F[frame]:.2f} s" for frame in shown]
            if name == "tokens" and pooling is not None:
                below = [_count(int(pooling.tokens_F[frame]), "token") for frame in shown]
            legend = pooling if name == "tokens" and shown[-1] == num_frames - 1 else None
            is_traced = has_map or name != "tokens"
            rows.append(_Row(pictures[shown.start : shown.stop].unbind(), below, name, "", legend, is_traced))
    rows[0] = _Row(rows[0].pictures, rows[0].below, rows[0].name, title)
    return rows


def _strips(look: Look) -> list[tuple[str, Tensor]]:
    """Pictures (F, H, W, C) of each kind that a sample has, with a name."""
    strips = _frames_and_tokens(look)
    for branch, word in BRANCHES.items():
        for (name, layer), heat_FHW in sorted(look.sight.layers.items()):
            if name == branch:
                label = f"{word}, layer {layer}\npeak {100 * heat_FHW.max().item():.3g} %"
                strips.append((label, paint_heat(look.frames_FCHW, heat_FHW)))
    return strips


def _frames_and_tokens(look: Look) -> list[tuple[str, Tensor]]:
    strips = [("frames", enlarge(look.frames_FCHW).permute(0, 2, 3, 1))]
    if look.sight.pooling is not None:
        strips.append(("tokens", paint_tokens(look.frames_FCHW, look.sight.pooling)))
    return strips


def _draw_row(axes: Any, row: _Row, columns: int) -> None:
    height, width = row.pictures[0].shape[:2]
    gap = max(1, width // 24)
    strip_HWC = torch.full((height, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    starts = [number * (width + gap) for number in range(len(row.pictures))]
    for start, picture_HWC in zip(starts, row.pictures, strict=True):
        strip_HWC[:, start : start + width] = picture_HWC
    axes.imshow(strip_HWC.numpy(), alpha=1.0 if row.has_map else 0.35)
    axes.set_xticks([start + width / 2 for start in starts], row.below, fontsize=7)
    axes.set(yticks=[], anchor="W")
    axes.set_ylabel(row.name, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if row.title:
        axes.set_title(row.title, fontsize=9, loc="left")
    if not row.has_map:
        words = "no map: these tokens cannot be traced back to patches"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axes.text(0.5 * strip_HWC.shape[1], 0.5 * height, words, ha="center", va="center", fontsize=9, bbox=box)
    if row.legend is not None and row.legend.token_FHW is not None:
        handles = _legend(row.legend)
        place = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.14), "borderaxespad": 0.0, "borderpad": 0.0}
        axes.legend(handles=handles, ncols=len(handles), fontsize=7, frameon=False, handlelength=1.2, **place)


def _legend(pooling: Pooling) -> list[Patch]:
    """What the colours stand for: patches that stay and that go, and the heaviest tokens of several patches."""
    assert pooling.token_FHW is not None, "asked of tokens that can be traced"
    colours_P3 = colours_of_tokens(pooling)
    handles = []
    if count := int((pooling.patches_P == 1).sum()):
        handles.append(Patch(facecolor="white", edgecolor="black", label=f"one patch: {count}"))
    if count := int((pooling.token_FHW < 0).sum()):
        handles.append(Patch(facecolor="#202020", label=f"dropped: {count}"))
    merged = (pooling.patches_P > 1).nonzero().flatten()
    for token in merged[pooling.mass_P[merged].argsort(descending=True, stable=True)][:LEGEND_TOKENS].tolist():
        red, green, blue = (colours_P3[token] / 255).tolist()
        handles.append(Patch(facecolor=(red, green, blue), label=f"mass {pooling.mass_P[token]:.3g}"))
    return handles


def summary(pooling: Pooling) -> str:
    """Say in one line how many patches became how many tokens, and how."""
    num_tokens = len(pooling.mass_P)
    if pooling.token_FHW is None:
        return f"{pooling.pooler}: {_count(num_tokens, 'token')}, without a map back to patches"
    alone, merged = int((pooling.patches_P == 1).sum()), int((pooling.patches_P > 1).sum())
    words = [f"{alone} of one patch"] if alone else []
    words += [f"{merged} of several"] if merged else []
    left = [f"{shared} patches in several tokens"] if (shared := int((pooling.holders_FHW > 1).sum())) else []
    left += [f"{dropped} dropped"] if (dropped := int((pooling.token_FHW < 0).sum())) else []
    counts = f"{pooling.pooler}: {_count(pooling.token_FHW.numel(), 'patch')} to {_count(num_tokens, 'token')}"
    if not num_tokens:
        return counts
    least, most = pooling.mass_P.min().item(), pooling.mass_P.max().item()
    mass = f"{least:.3g}" if math.isclose(least, most) else f"{least:.3g} to {most:.3g}"
    total = f"mass {mass}, {pooling.mass_P.sum().item():.6g} in all"
    return "; ".join([f"{counts}, {' and '.join(words)}" if words else counts, *left, total])


def draw_video(look: Look, path: Path) -> None:
    """Write a video, a second per frame: the frame, its tokens, and each branch's attention as the mean of its layers.

    Args:
        look: with frames.
        path: the mp4 to write.
    """
    panels = _frames_and_tokens(look)
    for word, heat_FHW in (("V2V", look.v2v_FHW), ("T2V", look.t2v_FHW)):
        if heat_FHW is not None:
            panels.append((f"{word}, mean of layers", paint_heat(look.frames_FCHW, heat_FHW)))
    figure = Figure(figsize=(PANEL_IN * len(panels), PANEL_IN + 0.8), dpi=VIDEO_DPI)
    canvas = FigureCanvasAgg(figure)
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.82, wspace=0.03)
    images = [axes.imshow(pictures[0].numpy()) for axes, (_, pictures) in zip(every_axes, panels, strict=True)]
    figure.suptitle(_head(look, 50 * len(panels)), fontsize=10, x=0.01, ha="left")
    drawn = []
    for frame in range(len(look.frames_FCHW)):
        for axes, image, (name, pictures) in zip(every_axes, images, panels, strict=True):
            image.set_data(pictures[frame].numpy())
            axes.set_title(_panel_title(look, name, frame), fontsize=10)
            axes.set_axis_off()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            canvas.draw()
        width, height = canvas.get_width_height()
        drawn.append(torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4))
    encoded = encode_video(torch.stack(drawn)[:, : height // 2 * 2, : width // 2 * 2, :3], fps_hz=1.0, gop=1)
    with replacing(path) as part:
        part.write_bytes(encoded)


def _panel_title(look: Look, name: str, frame: int) -> str:
    pooling = look.sight.pooling
    if name == "frames":
        time = "" if look.frame_time_s_F is None else f", {look.frame_time_s_F[frame]:.2f} s"
        return f"frame {frame + 1} of {len(look.frames_FCHW)}{time}"
    if name == "tokens" and pooling is not None:
        no_map = ", no map back to patches" if pooling.token_FHW is None else ""
        return f"{_count(int(pooling.tokens_F[frame]), 'token')}{no_map}"
    return name


def _head(look: Look, width: int) -> str:
    """Lines about a sample: what was asked, what was answered, and what became of its patches."""
    lines = [f"{look.key}: asked: {look.question}" if look.question else look.key]
    if look.question:
        lines.append(
            f"model: {look.answer}" if look.expected is None else f"right: {look.expected} model: {look.answer}"
        )
    about = [] if look.sight.pooling is None else [summary(look.sight.pooling)]
    return "\n".join([plain(line, width) for line in lines] + about)


def plain(text: str, width: int) -> str:
    """What matplotlib draws as it stands: no formulas, no control characters of an untrained model's answer."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return shorten(text, width, placeholder="...").replace("$", r"\$")


def save(figure: Figure, path: Path, dpi: float, bbox_inches: str | None = None) -> None:
    """Write a figure as a whole file; characters that its font lacks stay boxes, without a warning."""
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # questions may be in any script
        figure.savefig(part, dpi=dpi, bbox_inches=bbox_inches)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"
