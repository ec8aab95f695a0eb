"""A small training in processes of its own, to be stopped: they fork from one that has paid for the imports.

Each process writes ``RANK.at`` with its id and where it stands, and waits while ``hold`` names that place.
"""

import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from callbacks.checkpoints import Checkpoints
from callbacks.preemption import Preemption
from callbacks.random_state import RandomState
from lightning_crosslmm.run_folder import choose_checkpoint
from lightning_crosslmm.stop_signals import RESUME_ME, STOP, Stopped

MAX_STEPS = 8
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


class Module(lightning.LightningModule):
    """Dropout, so that a stop is seen in the weights unless random states go on as well."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.folder, self.net = folder, nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def configure_model(self) -> None:
        """Shard, where that is asked for."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        """Wait if told to."""
        self.tell(f"step {self.trainer.global_step}")
        loss = self.net(batch.float().expand(4, 8)).square().mean()
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: torch.Tensor, batch_index: int) -> None:
        """Wait if told to; the metric depends on the weights, the batch and a draw."""
        self.tell(f"validation {self.trainer.global_step} {batch_index}")
        self.log("val/loss", self.net(batch.float().expand(1, 8)).mean() + torch.randn(()), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give one with a state."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def tell(self, place: str) -> None:
        """Say where this process stands, and wait while the test holds it there."""
        told, hold = self.folder / f"{self.global_rank}.at", self.folder / "hold"
        told.with_suffix(".part").write_text(f"{os.getpid()} {place}")
        told.with_suffix(".part").rename(told)
        while hold.exists() and hold.read_text() == place:
            time.sleep(0.02)


class Batches:
    """Numbers of one epoch, with a position."""

    def __init__(self, length: int, trainer: lightning.Trainer) -> None:
        self.loader = DataLoader(torch.arange(1, length + 1), batch_size=None, generator=torch.Generator())
        self.trainer, self.position = trainer, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (batch for number, batch in enumerate(self.loader) if number >= self.position)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def start(folder: Path, world: int = 1, strategy: str = "auto", **settings: object) -> list[multiprocessing.Process]:
    """Start a training in a folder, or go on with the one that is there."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [PROCESSES.Process(target=_train, args=(folder, r, world, port, strategy, settings)) for r in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def _train(folder: Path, rank: int, world: int, port: int, strategy: str, settings: dict[str, object]) -> None:
    STOP.listen()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if world > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
        who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in {**where, **who}.items()})
    os.dup2(os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sharded = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if strategy == "fsdp" else None
    saving = {"every_n_steps": 5, "keep_last": 9, "keep_best": 1, "monitor": "val/loss", "mode": "min"}
    quiet = {"num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=sharded or strategy,
        callbacks=[
            RandomState(0),
            Preemption(settings.get("time_limit_s")),
            Checkpoints(**saving, background=bool(settings.get("background"))),
        ],
        default_root_dir=folder,
        logger=CSVLogger(folder, name="csv"),
        max_steps=MAX_STEPS,
        val_check_interval=4,
        log_every_n_steps=1,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        **quiet,
    )
    checkpoint = choose_checkpoint("fit", folder, "auto", None, None)
    try:
        trainer.fit(
            Module(folder), Batches(MAX_STEPS, trainer), Batches(3, trainer), None, checkpoint, weights_only=True
        )
    except Stopped as stop:
        sys.stderr.write(f"{stop}\n")
        sys.exit(RESUME_ME)
