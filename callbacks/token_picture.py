"""What the model saw: ``tokens.png``, which patches became which tokens, and where each fused layer looked."""

from pathlib import Path

import lightning
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.contact_sheet import draw_sheet


class TokenPicture(lightning.Callback):
    """Draw the first clips of every validation, all frames; ``pl_module.looks(batch, limit)`` tells what was seen.

    Args:
        num_clips: how many clips, at least 1 and at most the first validation batch has.
    """

    def __init__(self, num_clips: int) -> None:
        self.num_clips = num_clips

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
            draw_sheet(looks, Path(trainer.default_root_dir) / "tokens.png")
