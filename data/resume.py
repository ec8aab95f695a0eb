"""Where Lightning stands: its counters of the epoch, read and set in global batches."""

from typing import Any

from data.position import Position


class EpochProgress:
    """Lightning's counters of the training epoch.

    They count a rank's batches; a global batch is ``accumulate`` of them.

    Args:
        trainer: the one that fits.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._progress = trainer.fit_loop.epoch_loop.batch_progress

    @property
    def epoch(self) -> int:
        """The epoch that goes on or comes next."""
        return self._trainer.current_epoch

    @property
    def ready(self) -> int:
        """Batches of this rank that were begun."""
        return self._progress.current.ready

    @property
    def trained(self) -> int:
        """Global batches of the epoch that were trained."""
        return self._progress.current.processed // self._trainer.accumulate_grad_batches

    @property
    def epoch_is_trained(self) -> bool:
        """Whether its last batch was trained; that one is marked before, and a run may be interrupted in it."""
        return self._progress.is_last_batch and self._progress.current.processed == self._progress.current.ready

    def mark_last(self) -> None:
        """Let the batch that is about to be trained be the epoch's last.

        Lightning takes it from the loader's length, which is only an upper bound where rows are packed.
        """
        self._progress.is_last_batch = True

    def align(self, position: Position, num_batches: int) -> None:
        """Let the counters agree with a restored position.

        They mean something else once ``accumulate_grad_batches`` is another, and inside an accumulation they stand past
        gradients that no checkpoint holds: that global batch is trained anew.

        Args:
            position: restored.
            num_batches: most batches of an epoch for this rank: where Lightning takes an epoch for trained.
        """
        current = self._progress.current
        trained = position.batch * self._trainer.accumulate_grad_batches
        if self.epoch_is_trained:
            trained = max(current.processed, num_batches)
        shift = trained - current.processed
        for count in ("ready", "started", "processed", "completed"):
            setattr(current, count, getattr(current, count) + shift)
