"""How fast training goes, and how much of its time it waits for data."""

import time
from typing import Any

import lightning
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_crosslmm.batch import VideoBatch


class Throughput(lightning.Callback):
    """Log ``train/clips_per_s``, ``train/steps_per_s`` and ``train/wait_share`` at every logging step.

    ``wait_share = wait / (wait + work)``: *wait* is the time between the end of a batch and the start of the next,
    *work* the time between its start and its end. Left out are the first batch (workers start, kernels are compiled)
    and gaps in which validation ran or a checkpoint was written. The clock is the host's: where an accelerator still
    works while the host waits, the share is an upper bound. Clips are visuals, of all ranks if they have equally many.
    """

    def __init__(self) -> None:
        self.wait_s = 0.0
        self.work_s = 0.0
        self._clips = 0
        self._warm = False
        self._step = 0
        self._waiting_since_s: float | None = None
        self._working_since_s = 0.0
        self._at_last_log = (0.0, 0.0, 0, 0)

    @property
    def wait_share(self) -> float | None:
        """Share of the measured time that went into waiting, in [0, 1]; None before the second batch is done."""
        return self.wait_s / (self.wait_s + self.work_s) if self.work_s else None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: VideoBatch, batch_idx: int
    ) -> None:
        """Stop waiting, start working."""
        self._working_since_s = time.perf_counter()
        if self._waiting_since_s is not None:
            self.wait_s += self._working_since_s - self._waiting_since_s

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: VideoBatch,
        batch_idx: int,
    ) -> None:
        """Stop working, log when it is time to, start waiting."""
        if self._warm:
            self.work_s += time.perf_counter() - self._working_since_s
            self._clips += (len(batch.visual_offsets) - 1) * trainer.world_size
        else:
            self._warm, self._step = True, trainer.global_step
            self._at_last_log = (0.0, 0.0, 0, self._step)
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if self._step % trainer.log_every_n_steps == 0:
                self._log_window(pl_module)
        self._waiting_since_s = time.perf_counter()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave this gap out."""
        self._waiting_since_s = None

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave this gap out."""
        self._waiting_since_s = None

    def _log_window(self, pl_module: lightning.LightningModule) -> None:
        now = (self.wait_s, self.work_s, self._clips, self._step)
        wait_s, work_s, clips, steps = (new - old for new, old in zip(now, self._at_last_log, strict=True))
        self._at_last_log = now
        values = {
            "train/clips_per_s": clips / (wait_s + work_s),
            "train/steps_per_s": steps / (wait_s + work_s),
            "train/wait_share": wait_s / (wait_s + work_s),
        }
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
