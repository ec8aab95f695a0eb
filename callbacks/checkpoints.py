"""The checkpoints of a training: always whole, always at the end of a step, the newest and the best ones kept."""

import logging
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import lightning
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from callbacks.agreement import Agreement
from callbacks.checkpoint_files import (
    GONE_S,
    Writer,
    copy_to_cpu,
    is_sharded,
    read_state,
    versions,
    write_sharded,
    write_whole,
)
from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.checkpoint_folder import (
    CHECKPOINTS,
    begin_checkpoint,
    clear_parts,
    drop_checkpoints,
    list_checkpoints,
    rank_checkpoints,
    show_checkpoint,
)
from lightning_crosslmm.errors import UserError, nearest

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Save where training stands into ``checkpoints/step-...``, see :mod:`lightning_crosslmm.checkpoint_folder`.

    Saved right after an optimizer step, because amid accumulation the gradients gathered so far would be lost. Where a
    validation follows the step, after it: then its metric is known, and going on does not skip it. A step is saved when
    it is due, when it is the last one, and when its validation is among the best. The metrics of the step itself, which
    loggers get only after the callbacks, are saved with it and logged by the run that goes on.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next, at least 1.
        keep_last: how many of the newest ones to keep, at least 1.
        keep_best: how many of the best ones to keep, 0 or more.
        monitor: metric of the validation that says which is best.
        mode: whether the smallest or the largest is best.
        background: write while training goes on, from a copy in main memory.

    Raises:
        UserError: a number is too small.
    """

    def __init__(
        self,
        every_n_steps: int,
        keep_last: int,
        keep_best: int,
        monitor: str,
        mode: Literal["min", "max"],
        background: bool,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("keep_last", keep_last, 1),
            ("keep_best", keep_best, 0),
        ):
            if value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        self.every_n_steps, self.keep_last, self.keep_best = every_n_steps, keep_last, keep_best
        self.monitor, self.mode, self.background = monitor, mode, background
        self._agreement, self._writer = Agreement(), Writer()
        self._run_dir, self._step, self._saved_step = Path(), 0, -1
        self._group: dist.ProcessGroup | None = None
        self._validates_again = False
        self._unlogged: dict[str, Any] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """See that checkpoints can be written, before anything is trained.

        Raises:
            UserError: the strategy saves in a way of its own, or the folder cannot be written to.
        """
        if stage != "fit":
            return
        sharded = is_sharded(trainer.strategy)
        self._run_dir = Path(trainer.strategy.broadcast(str(trainer.default_root_dir)))
        if sharded and self.background:
            self._group = dist.new_group(backend="gloo")  # a thread may not share one with training
        self._agree(_prepare(self._run_dir) if trainer.is_global_zero else None, "cannot be written to")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note where training starts, which needs no checkpoint, and log what the checkpoint brought along.

        Raises:
            UserError: processes start from different steps, or validation would run amid accumulation.
        """
        self._step = trainer.global_step
        steps = self._agreement.gather(self._step)
        if len(set(steps)) > 1:
            raise UserError(f"resume: the processes found different checkpoints, of steps {steps}; name one of them")
        if trainer.enable_validation and _validates_amid_accumulation(trainer):
            raise UserError(
                f"trainer.val_check_interval={trainer.val_check_interval}: must be a multiple of "
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} batches; validation amid "
                "accumulation would measure what cannot be saved"
            )
        _begin_next_epoch(trainer.fit_loop)
        self._log_pending(trainer)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: VideoBatch,
        batch_idx: int,
    ) -> None:
        """Save if a step ended that is due and that no validation follows."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._is_due(trainer) and not validation_follows(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save if the step is due or among the best.

        Raises:
            UserError: there is no such metric.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        known = trainer.callback_metrics
        if self.keep_best and self.monitor not in known:
            raise UserError(
                f"callbacks.checkpoints.monitor={self.monitor}: validation logged no such metric"
                f"{nearest(self.monitor, known)}; it logged {', '.join(sorted(known))}"
            )
        metric = float(known[self.monitor]) if self.monitor in known else None
        if trainer.strategy.broadcast(self._is_due(trainer) or self._is_good(metric)):
            self.save(trainer, metric)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for the last one to be written."""
        self._agree(self._writer.wait(), f"the checkpoint of step {self._step} could not be written")

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Log what the checkpoint of a last step brought along, after which no training starts."""
        self._log_pending(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Let a write come to its end, unless the user is in a hurry."""
        if not isinstance(exception, KeyboardInterrupt):
            error = self._writer.wait(GONE_S if self._group is not None else None)
            if error:
                log.error("%s: the last checkpoint could not be written: %s", self._run_dir / CHECKPOINTS, error)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a validation that was cut short begin anew when training goes on."""
        if self._validates_again:
            loops = checkpoint["loops"]["fit_loop"]
            progress = loops["epoch_loop.val_loop.batch_progress"]
            done = progress["total"]["completed"] - progress["current"]["completed"]
            # as at the start of its first batch, which is where Lightning takes a validation up
            loops["epoch_loop.val_loop.batch_progress"] = {
                "total": {"ready": done + 1, "started": done + 1, "processed": done, "completed": done},
                "current": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
                "is_last_batch": False,
            }

    def state_dict(self) -> dict[str, Any]:
        """Metrics of the step that loggers do not have yet."""
        return dict(self._unlogged)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them for when training starts."""
        self._unlogged = dict(state_dict)

    def save(self, trainer: lightning.Trainer, metric: float | None = None, validates_again: bool = False) -> None:
        """Save the step that has just ended; every process must.

        Args:
            trainer: after an optimizer step.
            metric: what the step's validation gave.
            validates_again: the step's validation has begun and is not taken to its end.

        Raises:
            UserError: this one cannot be written, or the one before could not. Those before stay as they are.
        """
        self._step = trainer.global_step
        if self._saved_step == self._step and not trainer.validating:
            return
        self._saved_step = self._step
        self._agree(self._writer.wait(), f"a checkpoint before step {self._step} could not be written")
        self._validates_again, self._unlogged = validates_again, {} if trainer.validating else _unlogged(trainer)
        state = read_state(trainer)
        self._validates_again, self._unlogged = False, {}
        part, is_first = begin_checkpoint(self._run_dir, self._step), trainer.is_global_zero
        state = copy_to_cpu(state) if self.background else state
        about = {
            "step": self._step, "epoch": trainer.current_epoch, "monitor": self.monitor, "mode": self.mode,
            "metric": metric, "world_size": trainer.world_size, "versions": versions(),
        }  # fmt: skip
        sharded = is_sharded(trainer.strategy)

        def write() -> None:
            if sharded:
                write_sharded(state, part, is_first, self._group)
            elif is_first:
                write_whole(state, part)
            if is_first:
                show_checkpoint(part, **about)
                drop_checkpoints(self._run_dir, self.keep_last, self.keep_best)

        self._writer.start(write, part, self.background)
        if not self.background:
            self._agree(self._writer.wait(), f"the checkpoint of step {self._step} could not be written")

    def _log_pending(self, trainer: lightning.Trainer) -> None:
        unlogged, self._unlogged = self._unlogged, {}
        for logger in trainer.loggers if unlogged else []:
            logger.log_metrics(unlogged["metrics"], step=unlogged["step"])
            logger.save()

    def _agree(self, error: str | None, what: str) -> None:
        """Let an error of one process be everyone's, or the others would wait for it."""
        errors = [found for found in self._agreement.gather(error) if found]
        if errors:
            raise UserError(f"{self._run_dir / CHECKPOINTS}: {what}: {errors[0]}; earlier checkpoints are as they were")

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        return self._step % self.every_n_steps == 0 or self._step == trainer.max_steps or trainer.should_stop

    def _is_good(self, metric: float | None) -> bool:
        if not self.keep_best or metric is None or not isfinite(metric):
            return False
        best = rank_checkpoints(list_checkpoints(self._run_dir)[0])[: self.keep_best]
        quality = -metric if self.mode == "min" else metric
        return len(best) < self.keep_best or any(quality > (each.quality or 0.0) for each in best)


def _begin_next_epoch(loop: Any) -> None:
    """Let a run that was saved at the last batch of an epoch count the next one, and call the hooks of its start.

    On restoring such a state Lightning closes the epoch, but still takes itself to be amid it.
    """
    epochs = loop.epoch_progress.total
    if loop.restarted_mid_epoch and epochs.completed == epochs.ready:
        loop.reset_restart_stage()


def validation_follows(trainer: lightning.Trainer) -> bool:
    """Tell, at the end of a training batch, whether Lightning is about to validate."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _unlogged(trainer: lightning.Trainer) -> dict[str, Any]:
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return {}
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    metrics["epoch"] = trainer.current_epoch
    return {"metrics": metrics, "step": trainer.fit_loop.epoch_loop._batches_that_stepped}


def _validates_amid_accumulation(trainer: lightning.Trainer) -> bool:
    every, accumulated = trainer.val_check_batch, trainer.accumulate_grad_batches
    if accumulated == 1 or every in (trainer.num_training_batches, float("inf")):  # an epoch ends with a step
        return False
    return every is None or every % accumulated != 0  # None: by the clock


def _prepare(run_dir: Path) -> str | None:
    """Make the folder and see whether it can be written to; gives what went wrong."""
    folder = run_dir / CHECKPOINTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_parts(run_dir)
        with TemporaryDirectory(dir=folder):
            return None
    except OSError as error:
        return str(error)
