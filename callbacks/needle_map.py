"""Needles over length and depth: ``needle.csv`` and ``needle.png``, of the latest validation or test."""

import csv
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
from lightning.pytorch.utilities.types import STEP_OUTPUT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from callbacks.agreement import Agreement
from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import replacing


class Cell(NamedTuple):
    """One cell of the map: a task, the frames of its clips, and a bin of depth, counted from 0."""

    task: str
    num_frames: int
    depth_bin: int


class NeedleMap(lightning.Callback):
    """Map accuracy over the length of a clip and the depth at which its answer lies, one map for each task.

    Answers take part whose facts tell their ``depth``, from 0 for the first frame to 1 for the last, and whose question
    type is ``TASK@FRAMES``. Without such answers nothing is written.

    Source: the heat-map of V-NIAH (Zhang et al., arXiv:2406.16852).
    Differs: depths are drawn and put into bins instead of set; an answer is right when greedy decoding gives it.

    Args:
        depth_bins: rows of the map, equally high, 1 or more.
    """

    def __init__(self, depth_bins: int) -> None:
        if isinstance(depth_bins, bool) or not isinstance(depth_bins, int) or depth_bins < 1:
            raise UserError(f"callbacks.needle_map.depth_bins: must be a whole number, 1 or more, got {depth_bins!r}")
        self.depth_bins = depth_bins
        self._counts: Counter[tuple[Cell, bool]] = Counter()
        self._agreement = Agreement()

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin anew."""
        self._counts.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the answers of a batch."""
        if not isinstance(outputs, Mapping):
            return
        answers = zip(outputs["right_Z"].tolist(), batch.answer_kinds, batch.answer_facts, strict=False)
        for is_right, kind, facts in answers:
            task, _, length = kind.rpartition("@")
            if "depth" in facts and length.isdecimal():
                depth_bin = min(int(float(facts["depth"]) * self.depth_bins), self.depth_bins - 1)
                self._counts[Cell(task, int(length), depth_bin), is_right] += 1

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add up over all processes; the first one writes."""
        total: Counter[tuple[Cell, bool]] = Counter()
        for counts in self._agreement.gather([[*cell, right, count] for (cell, right), count in self._counts.items()]):
            total.update({(Cell(*cell), right): count for *cell, right, count in counts})
        if total and trainer.is_global_zero and not trainer.sanity_checking:
            folder = Path(trainer.default_root_dir)
            cells = {cell: (total[cell, True], total[cell, True] + total[cell, False]) for cell, _ in sorted(total)}
            write_table(cells, self.depth_bins, folder / "needle.csv")
            draw_maps(cells, self.depth_bins, folder / "needle.png")

    on_test_epoch_end = on_validation_epoch_end


def write_table(cells: Mapping[Cell, tuple[int, int]], depth_bins: int, path: Path) -> None:
    """Write one row per cell: task, frames, bounds of the depth, answers, accuracy.

    Args:
        cells: how many answers are right, of how many.
        depth_bins: of the whole depth.
        path: the CSV to write.
    """
    lines = io.StringIO(newline="")
    rows = csv.writer(lines, lineterminator="\n")
    rows.writerow(("task", "frames", "depth_from", "depth_to", "answers", "accuracy"))
    for (task, num_frames, number), (right, count) in cells.items():
        bounds = (round(edge / depth_bins, 4) for edge in (number, number + 1))
        rows.writerow((task, num_frames, *bounds, count, round(right / count, 4)))
    with replacing(path) as part:
        part.write_text(lines.getvalue(), encoding="utf-8")


def draw_maps(cells: Mapping[Cell, tuple[int, int]], depth_bins: int, path: Path) -> Figure:
    """Draw a map per task, frames from left to right, depth from top to bottom; what was not asked stays empty.

    Args:
        cells: how many answers are right, of how many.
        depth_bins: of the whole depth.
        path: the PNG to write.

    Returns:
        The figure.
    """
    tasks = sorted({cell.task for cell in cells})
    figure = Figure(figsize=(1.2 + 3.2 * len(tasks), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        image = _draw_map(panel, {cell: counts for cell, counts in cells.items() if cell.task == task}, depth_bins)
        panel.set_title(task)
    panels[0].set_ylabel("depth of the frame that holds the answer")
    figure.colorbar(image, ax=list(panels), label="accuracy")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    return figure


def _draw_map(panel: Any, cells: Mapping[Cell, tuple[int, int]], depth_bins: int) -> Any:
    lengths = sorted({cell.num_frames for cell in cells})
    shares = np.full((depth_bins, len(lengths)), np.nan)
    for cell, (right, count) in cells.items():
        row, column = cell.depth_bin, lengths.index(cell.num_frames)
        shares[row, column] = share = right / count
        colour = "black" if 0.3 < share < 0.8 else "white"
        panel.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    panel.set_xticks(range(len(lengths)), lengths)
    edges = [number / depth_bins for number in range(depth_bins + 1)]
    panel.set_yticks([edge * depth_bins - 0.5 for edge in edges], [f"{edge:.2g}" for edge in edges])
    panel.set_xlabel("frames")
    return panel.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
