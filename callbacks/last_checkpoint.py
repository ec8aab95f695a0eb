"""The checkpoint training goes on from: ``checkpoints/last.ckpt``, always whole, always at the end of a step."""

import shutil
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import CHECKPOINTS


class LastCheckpoint(Checkpoint):
    """Keep the latest checkpoint, and have one of the very last step.

    Saved right after an optimizer step, because a checkpoint amid accumulation would lose the gradients gathered so
    far. Written beside its place first and then moved there, folders of sharded checkpoints too.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next, at least 1. The last step always has one.

    Raises:
        UserError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note where training starts, which needs no checkpoint."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: VideoBatch,
        batch_idx: int,
    ) -> None:
        """Save if a step ended that is due."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0 or self._step == trainer.max_steps:
            self._save(trainer, Path(trainer.default_root_dir) / CHECKPOINTS)

    def _save(self, trainer: lightning.Trainer, folder: Path) -> None:
        part, place, old = folder / "last.ckpt.part", folder / "last.ckpt", folder / "last.ckpt.old"
        trainer.save_checkpoint(part, weights_only=False)  # all of the state, to go on from
        if trainer.is_global_zero:
            if place.is_dir():  # a folder cannot be replaced in one move
                place.rename(old)
            part.replace(place)
            shutil.rmtree(old, ignore_errors=True)
        trainer.strategy.barrier()
