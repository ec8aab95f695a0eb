"""What all processes know at the same time: small sums and records over a group on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """Lets callbacks decide alike on every process, without waiting for an accelerator.

    Collectives run over the default process group where that is gloo, else over a gloo group of their own, made with
    the first call. In one process nothing is sent. Every process must make the same calls in the same order, so make
    them at points that all reach together: the end of an optimizer step, a checkpoint, the start of training.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def sum_int(self, values: Sequence[int]) -> list[int]:
        """Add up each place of a vector over all processes; one all-reduce of int64.

        A flag is a 0 or 1 whose sum is above 0 where any process raised it.

        Args:
            values: of this process, equally many on all.
        """
        if _alone():
            return list(values)
        sums = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(sums, group=self._cpu_group())
        return sums.tolist()

    def gather(self, record: Any) -> list[Any]:
        """Give the record of every process, in the order of their ranks.

        Args:
            record: of this process: strings, numbers, tuples, lists and dicts of them.
        """
        if _alone():
            return [record]
        records: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(records, record, group=self._cpu_group())
        return records

    def _cpu_group(self) -> dist.ProcessGroup | None:
        if self._group is None and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo")
        return self._group


def _alone() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
