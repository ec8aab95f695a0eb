"""A callback for `kill_resume.py`: writes down which samples each step trained, as soon as it did."""

import json
from pathlib import Path

import lightning
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_crosslmm.batch import VideoBatch


class Witness(lightning.Callback):
    """Append a line to ``FOLDER/rank-R.jsonl`` after every batch: step, place within it, epoch, sample keys.

    A run that goes on from a checkpoint trains some steps again; the last line of a step is the one that counts.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._step, self._piece = -1, 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: VideoBatch, batch_idx: int
    ) -> None:
        """Note which step the batch belongs to; the count has moved on when the batch is done."""
        self._piece = self._piece + 1 if trainer.global_step == self._step else 0
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: VideoBatch,
        batch_idx: int,
    ) -> None:
        """Write the line; one write, so that a killed process leaves whole lines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps([self._step, self._piece, trainer.current_epoch, list(batch.keys)]) + "\n"
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(line)
