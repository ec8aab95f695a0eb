"""The Lightning strategy of sharded training: sizes that fit, precision that keeps to parameters, every checkpoint."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from lightning_crosslmm.errors import UserError


class ShardedStrategy(ModelParallelStrategy):
    """Shard weights, gradients and optimizer state over all processes; `sharding.shard` does it.

    Args:
        data_parallel_size: processes that share the weights out, which are all there are; a number says how many are
            expected, ``auto`` takes what ``trainer.devices`` and ``trainer.num_nodes`` give.
        save_distributed_checkpoint: a checkpoint is a folder that each process writes its slices into, and that any
            number of processes can go on from; False gathers it into one file on the first process.

    Raises:
        UserError: another number of processes, once they are known.
    """

    def __init__(self, data_parallel_size: int | str = "auto", save_distributed_checkpoint: bool = True) -> None:
        # Lightning's own "auto" splits layers over the devices of a node instead, which needs layers made for it
        super().__init__(data_parallel_size, 1, save_distributed_checkpoint)  # type: ignore[arg-type]

    def _configure_launcher(self) -> None:
        # the first that the trainer calls once it has told devices, nodes and precision
        processes = self.num_nodes * self.num_processes
        if self._data_parallel_size not in ("auto", processes):
            raise UserError(
                f"trainer.strategy.data_parallel_size is {self._data_parallel_size}, but trainer.devices x "
                f"trainer.num_nodes make {self.num_processes} x {self.num_nodes} = {processes} processes; give "
                f"{processes} or auto, or change these"
            )
        self._data_parallel_size = processes
        if isinstance(self.precision_plugin, HalfPrecision):
            self.precision_plugin = _StoredPrecision(self.precision_plugin.precision)
        super()._configure_launcher()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore model and optimizers, and give the rest; a checkpoint runs no code, whatever `weights_only` says."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only=True)
        assert self.model is not None, "Lightning restores after it set the model up"
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", ()), strict=False):
            set_optimizer_state_dict(self.model, optimizer, _named(state, optimizer, self.model), options=options)
        return checkpoint


class _StoredPrecision(Precision):
    """Weights as sharding stored them; batches and buffers (times, rotary frequencies) stay in float32."""

    def __init__(self, precision: Any) -> None:
        self.precision = precision


def _named(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Call the parameters of a saved optimizer by name: the k-th of its groups is the k-th of the groups of ours.

    Lightning takes the numbers for places in the model, which they are not where there are several groups.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    ours = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(ours) != len(numbers):
        raise UserError(
            f"optim.lr: the checkpoint trained {len(numbers)} parameters, this run trains {len(ours)}; freeze the "
            "same roles, or start a new training from its weights with init_from"
        )
    name_of = dict(zip(numbers, ours, strict=True))
    return {
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
