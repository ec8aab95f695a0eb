"""Writing a checkpoint's files, in the background if that is wished; its errors come when it is waited for."""

import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed import checkpoint as dcp

from lightning_crosslmm.checkpoint_folder import SHARDED, WHOLE
from lightning_crosslmm.errors import UserError

GONE_S = 60.0
"""How long to wait, after an error, for a background write that other processes take part in."""


def is_sharded(strategy: Strategy) -> bool:
    """Tell whether every process writes its own part.

    Raises:
        UserError: the strategy saves in a way of its own, which this code does not know.
    """
    if isinstance(strategy, ModelParallelStrategy):
        return strategy._save_distributed_checkpoint
    if type(strategy).save_checkpoint is not Strategy.save_checkpoint:
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} saves checkpoints in a way of its own, which "
            "callbacks.checkpoints cannot make whole; use auto, ddp or ModelParallelStrategy (trainer=fsdp)"
        )
    return False


def read_state(trainer: lightning.Trainer) -> dict[str, Any]:
    """Collect all that a training goes on from; every process must ask."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def write_whole(state: dict[str, Any], folder: Path) -> None:
    """Write everything into one file."""
    folder.mkdir(parents=True)
    with (folder / WHOLE).open("wb") as file:
        torch.save(state, file)


def write_sharded(state: dict[str, Any], folder: Path, is_first: bool, group: dist.ProcessGroup | None) -> None:
    """Write this process's part, laid out as Lightning's ``ModelParallelStrategy`` reads it; every process must.

    Args:
        state: from :func:`read_state`.
        folder: of the checkpoint.
        is_first: whether this process writes what is not sharded.
        group: to talk over; None for all processes by default.
    """
    rest = {name: value for name, value in state.items() if name not in ("state_dict", "optimizer_states")}
    optimizers = {f"optimizer_{number}": value for number, value in enumerate(state.get("optimizer_states", []))}
    # torch's collectives tell every process when one of them fails
    dcp.save(
        {"state_dict": state["state_dict"], **optimizers},
        storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
        process_group=group,
    )
    if is_first:
        torch.save(rest, folder / SHARDED)


def versions() -> dict[str, str]:
    """Versions of what reads and writes checkpoints."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("torch", "lightning")
    }


def copy_to_cpu(value: Any, storages: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """Copy a state, so that training may go on while it is written; tensors that shared memory share it again."""
    storages = {} if storages is None else storages
    if isinstance(value, Tensor):
        if type(value) is not Tensor:  # a shard: a DTensor clones its own part
            return value.detach().clone()
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.cpu() if storage.device.type != "cpu" else storage.clone()
        copied = torch.empty(0, dtype=value.dtype)
        return copied.set_(storages[storage.data_ptr()], value.storage_offset(), value.size(), value.stride())
    if isinstance(value, dict):
        return type(value)((key, copy_to_cpu(item, storages)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(copy_to_cpu(item, storages) for item in value)
    return value


class Writer:
    """Does one write at a time, here or in a thread; what goes wrong is kept until :meth:`wait`."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: str | None = None

    def start(self, write: Callable[[], None], part: Path, in_background: bool) -> None:
        """Begin a write.

        Args:
            write: makes and shows the checkpoint.
            part: its folder while it is written, which goes away if that fails.
            in_background: return at once.
        """

        def run() -> None:
            try:
                write()
            except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
                self._error = _reason(error)
                shutil.rmtree(part, ignore_errors=True)

        if in_background:
            self._thread = Thread(target=run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            run()

    def wait(self, timeout_s: float | None = None) -> str | None:
        """Wait for the write to end; gives what went wrong, once."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None
        error, self._error = self._error, None
        return error


def _reason(error: BaseException) -> str:
    """Find what the system said: torch wraps it, or says that a file is not as long as it should be."""
    if isinstance(error, dcp.api.CheckpointException):
        return "; ".join(_reason(failure) for failure, _ in error.failures.values())
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error).splitlines()[0]
