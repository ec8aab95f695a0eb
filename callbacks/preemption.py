"""Stopping when asked to: the step ends, a checkpoint is written, and every process leaves with one exit code."""

import signal
import time
from contextlib import suppress
from subprocess import Popen, TimeoutExpired

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.types import STEP_OUTPUT

from callbacks.agreement import Agreement
from callbacks.checkpoints import Checkpoints, validation_follows
from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.stop_signals import HEARD, STOP, Stopped

CHILDREN_S = 30.0


class Preemption(Checkpoint):
    """Stop after the running step on SIGTERM, SIGINT, SIGUSR1 or when the time is up, by raising ``Stopped``.

    A ``Checkpoint`` for Lightning, which calls those last: what is saved has what the others did at the step's end.

    Handlers only set a flag. Once per optimizer step, and per batch of a validation, all processes add up their flags,
    so that they stop together whichever of them got the signal. A validation is cut short and done again when training
    goes on. The very last step is not stopped: training ends by itself then. Lightning's own handlers, which hang when
    processes get the signal at different places, and its requeueing are turned off.

    Args:
        time_limit_s: seconds from the start of the process after which to stop; None for no limit.

    Raises:
        UserError: ``time_limit_s`` is not above 0.
    """

    def __init__(self, time_limit_s: float | None) -> None:
        if time_limit_s is not None and time_limit_s <= 0:
            raise UserError(f"time_limit_s={time_limit_s}: must be above 0, or null for no limit")
        self.time_limit_s = time_limit_s
        self._agreement = Agreement()
        self._step = 0
        self._children: list[Popen] = []

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Listen for signals, in Lightning's place.

        Raises:
            UserError: the trainer has no :class:`Checkpoints`.
        """
        if stage != "fit":
            return
        if _checkpoints_of(trainer) is None:
            raise UserError("callbacks.preemption: stopping needs callbacks.checkpoints to write one; leave out both")
        STOP.listen()
        trainer._signal_connector.register_signal_handlers = lambda: None
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the signals back."""
        STOP.forget()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop if it was asked for before training began."""
        self._step = trainer.global_step
        if reason := self._reason():
            raise self._stopped(trainer, reason)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: VideoBatch,
        batch_idx: int,
    ) -> None:
        """Stop after an optimizer step, unless a validation comes next: that is stopped at its start."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step == trainer.max_steps or validation_follows(trainer):
            return
        if reason := self._reason():
            _save(trainer, validates_again=False)
            raise self._stopped(trainer, reason)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop before a validation, which may take long to have its first batch."""
        self._cut_short(trainer)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop amid a validation."""
        self._cut_short(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Wait for the processes that this one started; after any other end of training, give the signals back."""
        if not isinstance(exception, Stopped):
            STOP.forget()
            return
        for child in self._children:
            with suppress(TimeoutExpired):
                child.wait(CHILDREN_S)

    def _cut_short(self, trainer: lightning.Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step == trainer.max_steps:
            return
        if reason := self._reason():
            _save(trainer, validates_again=True)
            raise self._stopped(trainer, reason)

    def _reason(self) -> str | None:
        """Say why to stop, the same on every process, or None."""
        is_late = self.time_limit_s is not None and time.monotonic() - (STOP.since_s or 0.0) > self.time_limit_s
        flags = [int(STOP.received == number) for number in HEARD] + [int(is_late)]
        names = [signal.Signals(number).name for number in HEARD] + [f"time_limit_s={self.time_limit_s}"]
        return next((name for name, count in zip(names, self._agreement.sum_int(flags), strict=True) if count), None)

    def _stopped(self, trainer: lightning.Trainer, reason: str) -> Stopped:
        # Lightning's launcher kills its process when one that it started ends with another code than 0.
        started = getattr(trainer.strategy.launcher, "procs", [])
        self._children = started[:]
        started.clear()
        return Stopped(f"{reason} after step {trainer.global_step}")


def _checkpoints_of(trainer: lightning.Trainer) -> Checkpoints | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)


def _save(trainer: lightning.Trainer, validates_again: bool) -> None:
    checkpoints = _checkpoints_of(trainer)
    assert checkpoints is not None, "setup refuses a trainer without them"
    checkpoints.save(trainer, validates_again=validates_again)
