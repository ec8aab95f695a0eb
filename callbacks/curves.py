"""The learning curve: ``learning_curve.png``, loss and accuracy over optimizer steps."""

from pathlib import Path

import lightning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_crosslmm.report.curves import Curve, read_curves
from lightning_crosslmm.run_folder import replacing


class LearningCurve(lightning.Callback):
    """Draw what the CSV logger has written, after every validation and at the end of training.

    Args:
        train_window: logged values that each point of the training curves is the mean of; 1 draws them as they are.
    """

    def __init__(self, train_window: int) -> None:
        self.train_window = train_window

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw so far."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Draw all, also where nothing was left to train."""
        if stage == "fit":
            self._draw(trainer)

    @rank_zero_only
    def _draw(self, trainer: lightning.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                curves = read_curves(Path(logger.root_dir))
                if curves:
                    draw_curves(curves, self.train_window, Path(trainer.default_root_dir) / "learning_curve.png")


def draw_curves(curves: dict[str, Curve], train_window: int, path: Path) -> Figure:
    """Draw loss on the left and accuracy on the right, one line for train and one for val.

    Args:
        curves: see :func:`read_curves`; reads ``train/`` and ``val/`` of ``loss`` and ``accuracy``.
        train_window: see :class:`LearningCurve`.
        path: the PNG to write.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for stage, marker in (("train", ""), ("val", "o")):
            points = curves.get(f"{stage}/{name}", [])
            points = _mean_of(points, train_window) if stage == "train" else points
            if points:
                axes.plot(*zip(*points, strict=True), label=stage, marker=marker)
        axes.set(xlabel="optimizer steps", ylabel=name)
        if axes.lines:
            axes.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    return figure


def _mean_of(points: Curve, window: int) -> Curve:
    groups = [points[start : start + window] for start in range(0, len(points), window)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
