"""The progress bar: loss, accuracy, speed, and how much of the time goes into waiting for data."""

import lightning
from lightning.pytorch.callbacks import RichProgressBar

COLUMNS = {
    "loss": ("train/loss", "{:.3f}"),
    "accuracy": ("train/accuracy", "{:.3f}"),
    "val accuracy": ("val/accuracy", "{:.3f}"),
    "clips/s": ("train/clips_per_s", "{:.1f}"),
    "waiting": ("train/wait_share", "{:.0%}"),
}
"""Column of the bar: the metric it shows and how. A metric nobody logged yet has no column."""


class TrainingProgress(RichProgressBar):
    """Show :data:`COLUMNS` beside the bar."""

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, str]:
        """Give the columns that have a value."""
        logged = trainer.callback_metrics
        return {name: form.format(logged[key].item()) for name, (key, form) in COLUMNS.items() if key in logged}
