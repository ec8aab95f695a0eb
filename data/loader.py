"""From an epoch's plan to batches: one DataLoader and its workers for all epochs."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from threading import Thread, Timer
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.plan import EvalPlan, Planned, TrainPlan
from data.stream import ClipDataset, DamagedSampleError, Sample
from lightning_crosslmm.batch import Skipped, VideoBatch
from lightning_crosslmm.errors import UserError

STARTS = ("forkserver", "spawn", "fork")
_LEAVE_S = 2.0  # time for workers to end by themselves
Item = tuple[int, Sample | Skipped | UserError]


class BatchLoader:
    """Batches of one epoch after another, with the same workers.

    It is no ``DataLoader`` but has one, because Lightning takes those apart: it puts a sampler of its own into each on
    several ranks and whenever it predicts. It has a length, which keeps Lightning from reading one batch ahead and
    saving a position that was never trained. The plan is asked for with an epoch's first batch and not earlier, since
    only then has Lightning settled which epoch and batch come next.

    Workers decode with one thread each. A rank holds at most ``num_workers * prefetch_batches`` batches that are ready
    and one more per worker in the making; a batch takes ``frames * 3 * image_size ** 2`` bytes.

    Args:
        dataset: gives samples.
        collate: makes a batch of (row, sample).
        plan: says which batches the epoch that begins has.
        num_batches: how many batches an epoch has for this rank at most, as ``len`` of the plan.
        num_workers: processes that decode; 0 decodes in this one.
        prefetch_batches: batches each worker may hold ready.
        start: how workers come to be: ``forkserver`` and ``spawn`` have no thread, GPU or tokenizer's pool to inherit
            locks from and cost some seconds of imports once; ``fork`` starts at once.
        leaves_out: hand damaged samples over as ``VideoBatch.skipped``; without it the first one is an error.
        timeout_s: longest wait for a batch of the workers; None waits for ever.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        collate: Callable[[list[tuple[int, Sample | Skipped]]], VideoBatch],
        plan: Callable[[], TrainPlan | EvalPlan],
        num_batches: int,
        num_workers: int = 0,
        prefetch_batches: int = 2,
        start: str = STARTS[0],
        leaves_out: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self._dataset, self._items = dataset, _Reporting(dataset, leaves_out)
        self._collate = _CollateReports(collate)
        self._plan = plan
        self._num_batches = num_batches
        self._num_workers, self._prefetch_batches, self._start_method = num_workers, prefetch_batches, start
        self._timeout_s = timeout_s
        self._planned = _Planned()
        self._loader: DataLoader | None = None
        self.at_end = False
        """Whether the batch that was handed out last is known to end its epoch."""

    def __len__(self) -> int:
        """Most batches of a whole epoch for this rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[VideoBatch]:
        """Give the batches that the plan names.

        Raises:
            UserError: what a sample of the next batch is refused for; or no batch came, naming what was being read.
        """
        plan = self._plan()
        self._planned.begin(plan)
        self.at_end = False
        if self._loader is None:
            self._loader = self._start()
        batches = _through(self._loader)
        while (batch := self._next(batches)) is not None:
            if isinstance(batch, UserError):
                self.close()
                raise batch
            self.at_end = plan.hand_out()
            yield batch

    def close(self) -> None:
        """Let the workers go; the next epoch would start new ones."""
        running, self._loader = getattr(self._loader, "_iterator", None), None
        if running is not None:  # there are workers
            # one that is stuck in a file heeds no other signal, see _through
            reaper = Timer(_LEAVE_S, lambda: [worker.kill() for worker in running._workers])
            reaper.start()
            with suppress(RuntimeError):  # by which torch tells of one that was killed
                running._shutdown_workers()  # now: held by a traceback, they would take seconds to end
            reaper.cancel()

    def _next(self, batches: Iterator[VideoBatch | UserError]) -> VideoBatch | UserError | None:
        try:
            batch = next(batches, None)
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter from a worker that died amid sending
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                raise
            names = ", ".join(self._dataset.name(planned.ref) for planned in self._planned.waiting[0])
            return UserError(
                f"data: no batch came ({error}) while one of these was read: {names}; take it out of the data, raise "
                "data.sample_timeout_s, or see whether memory ran out"
            )
        if self._planned.waiting:
            self._planned.waiting.popleft()
        return batch

    def _start(self) -> DataLoader:
        workers: dict[str, Any] = {}
        if self._num_workers:
            context = multiprocessing.get_context(self._start_method)
            if self._start_method == "forkserver":
                context.set_forkserver_preload([__name__])
            workers = {"prefetch_factor": self._prefetch_batches, "multiprocessing_context": context}
            workers["timeout"] = self._timeout_s or 0
            workers["worker_init_fn"] = _end_with_training
        return DataLoader(
            self._items,
            batch_sampler=self._planned,
            collate_fn=self._collate,
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # starting an epoch draws a number, which dropout's stream must not miss
            **workers,
        )


def _end_with_training(worker: int) -> None:
    """Watch the training process from a worker: a fork server outlives one that was killed, and torch watches that."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _through(loader: DataLoader) -> Iterator[VideoBatch | UserError]:
    """Give a loader's batches, from workers that leave it to the training to stop when their whole group is asked to.

    What is blocked here while they start stays blocked in them, and in the fork server that they come from.
    """
    resource_tracker.ensure_running()  # first, because starting it unblocks signals
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    yield from batches


class _Planned:
    """The batch sampler of the moment: a DataLoader keeps its workers only while it keeps its batch sampler."""

    def begin(self, plan: TrainPlan | EvalPlan) -> None:
        """Follow the plan of the epoch that begins."""
        self._plan = plan
        self.waiting: deque[list[Planned]] = deque()

    def __iter__(self) -> Iterator[list[Planned]]:
        for batch in self._plan:
            self.waiting.append(batch)
            yield batch


class _Reporting(Dataset[Item]):
    """Hands a user's error over as a value: raised in a worker it would arrive with a traceback inside its message."""

    def __init__(self, dataset: ClipDataset, leaves_out: bool) -> None:
        self._dataset, self._leaves_out = dataset, leaves_out

    def __getitem__(self, planned: Planned) -> Item:
        try:
            return planned.row, self._dataset[planned.ref]
        except DamagedSampleError as error:
            return planned.row, error.skipped if self._leaves_out else UserError(str(error))
        except UserError as error:
            return planned.row, UserError(str(error))


class _CollateReports:
    def __init__(self, collate: Callable[[list[tuple[int, Sample | Skipped]]], VideoBatch]) -> None:
        self._collate = collate

    def __call__(self, items: list[Item]) -> VideoBatch | UserError:
        return next((item for _, item in items if isinstance(item, UserError)), None) or self._collate(items)
