"""Runs a function in several processes at once, as ranks of one job on the CPU, and gives back what each returned."""

import logging
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOAD = ["lightning", "lightning_crosslmm.module", "lightning_crosslmm.strategy", "tests.tiny", "tests.ranks"]


def on_ranks(world: int, function: Callable[..., Any], *given: Any, folder: Path, limit_s: float = 120) -> list[Any]:
    """Call ``function(*given)`` in `world` processes, with the environment that torchrun gives them.

    Processes are forked from one that has done the imports and nothing else. A rank that fails, or that waits for
    another longer than `limit_s`, ends them all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [folder / f"rank{rank}-of-{world}.pt" for rank in range(world)]
    for path in paths:
        path.unlink(missing_ok=True)
    arguments = [(rank, world, port, path, function, given) for rank, path in enumerate(paths)]
    ranks = [context.Process(target=_run, args=each) for each in arguments]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(limit_s)
        results = [torch.load(path, weights_only=False) if path.exists() else "no answer in time" for path in paths]
        failed = [f"rank {rank}: {found}" for rank, found in enumerate(results) if isinstance(found, str)]
        assert not failed, "\n".join(failed)
        return results
    finally:
        for process in ranks:
            process.kill()


def _run(rank: int, world: int, port: int, path: Path, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {name: str(value) for name, value in names.items()}
    try:
        result = function(*given)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    os._exit(0)  # others may still wait for this one in a collective, and would hold up its end
