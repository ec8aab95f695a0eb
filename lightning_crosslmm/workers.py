"""Processes that work through a list, where one that hangs or crashes costs its own piece of work and no more."""

import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, TypeVar

from lightning_crosslmm.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_starting = Lock()


class WorkerLostError(Exception):
    """A worker took too long and was ended, or ended by itself; says which."""


class Worker:
    """A process that is asked for one thing after the other; it starts when it is first asked.

    Args:
        preload: modules that are imported once for all workers.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = list(preload)
        self._process: Any = None
        self._pipe: Connection | None = None
        self._is_stopped = False

    def call(self, function: Callable[..., R], *arguments: Any, timeout_s: float | None = None) -> R:
        """Run a function of a module there, and wait for what it gives.

        Raises:
            UserError: what the function raised.
            WorkerLostError: it crashed, or it ran longer than ``timeout_s``; the next call finds a new process.
        """
        pipe = self._start() if self._pipe is None else self._pipe
        try:
            pipe.send((function, arguments))
            if not pipe.poll(timeout_s):
                self.close()
                raise WorkerLostError(f"did not end within {timeout_s:g} s")
            result, error = pipe.recv()
        except (EOFError, OSError) as lost:
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise WorkerLostError(f"crashed (exit code {code})") from lost
        if error is not None:
            raise error
        return result

    def _start(self) -> Connection:
        if self._is_told_to_stop():
            raise WorkerLostError("was stopped")
        # From a fork server, which has no threads whose locks a child could inherit.
        context = multiprocessing.get_context("forkserver")
        with _starting:
            context.set_forkserver_preload(self._preload)
            self._pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._process = process
            theirs.close()
        if self._is_told_to_stop():  # while it started, when there was no process to end yet
            process.kill()
        return self._pipe

    def _is_told_to_stop(self) -> bool:
        return self._is_stopped

    def stop(self) -> None:
        """End the process for good, from whichever thread; a call that waits for it raises."""
        self._is_stopped = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process; nobody may be waiting for it."""
        if self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._pipe = self._process = None


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (function(*arguments), None)
        except UserError as error:
            answer = (None, error)
        except Exception:
            answer = (None, RuntimeError(traceback.format_exc()))
        pipe.send(answer)


def work_through(
    job: Callable[[Worker, T], R], items: Sequence[T], num_workers: int, preload: Sequence[str] = ()
) -> Iterator[R]:
    """Do a job for every item, several at a time.

    Args:
        job: runs in a thread of this process and asks the worker that it is given.
        items: what there is to do.
        num_workers: how many processes, at least 1; never more than items.
        preload: modules that are imported once for all workers.

    Yields:
        What the job gave, in the order of the items.
    """
    if num_workers < 1:
        raise UserError(f"workers must be at least 1, got {num_workers}")
    workers = [Worker(preload) for _ in range(min(num_workers, len(items)))]
    free = queue.SimpleQueue[Worker]()
    for worker in workers:
        free.put(worker)

    def one(item: T) -> R:
        worker = free.get()
        try:
            return job(worker, item)
        finally:
            free.put(worker)

    try:
        with ThreadPoolExecutor(max(1, len(workers))) as threads:
            try:
                yield from threads.map(one, items)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.stop()
    finally:
        for worker in workers:
            worker.close()
