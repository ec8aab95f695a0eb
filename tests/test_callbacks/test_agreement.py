"""Agreement: sums and records of all processes, on each of them."""

import torch.distributed as dist
import torch.multiprocessing as mp

from callbacks.agreement import Agreement


def test_one_process_agrees_with_itself():
    agreement = Agreement()
    assert agreement.sum_int([3, 0, 2**40]) == [3, 0, 2**40]
    assert agreement.gather({"a": 1}) == [{"a": 1}]


def test_processes_add_up_and_hear_of_each_other(tmp_path):
    mp.start_processes(_take_part, args=(2, str(tmp_path / "store")), nprocs=2, start_method="fork")


def _take_part(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    agreement = Agreement()
    assert agreement.sum_int([rank, 1, 2**40]) == [1, 2, 2**41]
    assert agreement.gather(("key", rank)) == [("key", 0), ("key", 1)]
    assert agreement.gather(None) == [None, None]
    dist.destroy_process_group()
