"""What pictures of the first validation clips share."""

from collections.abc import Sequence
from pathlib import Path

import lightning
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.looks import Look


class LookPicture(lightning.Callback):
    """Draw the first clips of every validation; ``pl_module.looks(batch, limit)`` tells what was seen and said.

    Subclasses write `draw`.

    Args:
        num_clips: how many clips, at least 1 and at most the first validation batch has.
    """

    def __init__(self, num_clips: int) -> None:
        self.num_clips = num_clips

    def draw(self, looks: Sequence[Look], run_dir: Path) -> None:
        """Write the picture into the run's folder.

        Args:
            looks: at least one, each with frames.
            run_dir: where it goes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw(looks, run_dir)")

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the first batch. Every process does, because layers may be sharded; the first one draws."""
        if batch_idx or trainer.sanity_checking:
            return
        looks = [look for look in pl_module.looks(batch, self.num_clips) if len(look.frames_FCHW)]
        if looks and trainer.is_global_zero:
            self.draw(looks, Path(trainer.default_root_dir))
