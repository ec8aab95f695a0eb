"""What `step.py` measures with: a stopwatch for the parts of a step, and how far memory rises during one."""

import ctypes
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn


class Stopwatch:
    """Time nested stretches of work on the device's own clock: CUDA events there, which make nothing wait.

    Args:
        device: where the work runs, a CPU or a CUDA device.
        clock: of a CPU, in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_cuda, self._clock = device.type == "cuda", clock
        self._open: list[tuple[str, Any]] = []
        self._done: list[tuple[str, Any, Any]] = []
        self.listening = False
        """Whether watched modules are timed; off in a backward pass, where checkpointing runs them again."""

    def _now(self) -> Any:
        if not self._on_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def open(self, part: str) -> None:
        """Begin a stretch, inside the one that is open."""
        self._open.append((part, self._now()))

    def close(self) -> None:
        """End the stretch begun last."""
        part, start = self._open.pop()
        self._done.append((part, start, self._now()))

    def watch(self, part: str, module: nn.Module, *, closes: bool = True) -> None:
        """Time every forward pass of a module; without `closes`, from its beginning until somebody calls `close`."""
        module.register_forward_pre_hook(lambda *_: self.open(part) if self.listening else None)
        if closes:
            module.register_forward_hook(lambda *_: self.close() if self.listening else None)

    def read_ms(self) -> Counter[str]:
        """Add up the stretches of each part, in milliseconds, and forget them."""
        if self._on_cuda:
            torch.cuda.synchronize()
        spent_ms: Counter[str] = Counter()
        for part, start, end in self._done:
            spent_ms[part] += start.elapsed_time(end) if self._on_cuda else (end - start) * 1e3
        self._done.clear()
        return spent_ms


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """Run some work and tell how far memory rose above where it stood before.

    Returns:
        On CUDA the growth of `max_memory_allocated`; else that of this process's resident memory, sampled every ms.
    """
    return _peak_cuda_bytes(work) if device.type == "cuda" else _peak_rss_bytes(work)


def _peak_cuda_bytes(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_rss_bytes(work: Callable[[], None]) -> int:
    gc.collect()
    # Or the work would live in memory that earlier work freed and the allocator kept, and nothing would rise.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join()
    return max(peak, process.memory_info().rss) - before
