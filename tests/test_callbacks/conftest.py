import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks.checkpoints import Checkpoints
from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, VideoBatch
from lightning_crosslmm.looks import Look


def make_batch(number: int, num_samples: int = 2) -> VideoBatch:
    """Samples of one 2-frame clip and three text tokens each."""
    text = torch.tensor([VISUAL_MARK, 5, 6])
    batch = VideoBatch(
        frames_FCHW=torch.full((2 * num_samples, 3, 8, 8), number % 256, dtype=torch.uint8),
        frame_time_s_F=torch.zeros(2 * num_samples),
        visual_offsets=torch.arange(0, 2 * num_samples + 1, 2),
        sample_of_visual=torch.arange(num_samples),
        ids_L=text.repeat(num_samples),
        labels_L=torch.tensor([IGNORED, IGNORED, 6]).repeat(num_samples),
        answer_L=torch.stack([torch.tensor([-1, -1, sample]) for sample in range(num_samples)]).flatten(),
        text_offsets=torch.arange(0, 3 * num_samples + 1, 3),
        row_of_sample=torch.arange(num_samples),
        keys=tuple(f"clip{number}-{sample}" for sample in range(num_samples)),
        answer_kinds=("colour",) * num_samples,
        questions=("what colour?",) * num_samples,
    )
    batch.validate()
    return batch


class Batches(Dataset):
    def __init__(self, length: int, on_read: Callable[[], None] | None = None) -> None:
        self.length, self.on_read = length, on_read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> VideoBatch:
        if number >= self.length:
            raise IndexError(number)
        if self.on_read:
            self.on_read()
        return make_batch(number)


class TinyModule(lightning.LightningModule):
    """One weight; accuracies come from a list, so that tests know them."""

    def __init__(self, accuracies: Sequence[float] = (0.25, 0.75), on_step: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.accuracies: Iterator[float] = iter(accuracies)
        self.on_step = on_step

    def training_step(self, batch: VideoBatch, batch_index: int) -> Tensor:
        if self.on_step:
            self.on_step()
        loss = self.weight**2
        self.log("train/loss", loss, batch_size=1)
        self.log("train/accuracy", 0.5, batch_size=1)
        return loss

    def validation_step(self, batch: VideoBatch, batch_index: int) -> None:
        self.log("val/loss", float("inf"), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        accuracy = next(self.accuracies)
        self.log_dict({"val/accuracy": accuracy, "val/accuracy/colour": accuracy})

    def predict_step(self, batch: VideoBatch, batch_index: int) -> list[dict[str, str]]:
        return [{"key": key, "answer": "grün"} for key in batch.keys]

    def looks(self, batch: VideoBatch, limit: int) -> list[Look]:
        frames = batch.frames_FCHW.view(len(batch.keys), 2, 3, 8, 8)
        map_FHW = torch.rand(2, 2, 2)
        return [
            Look(key, "what?", "red", "$blue$", frames[i], map_FHW, None) for i, key in enumerate(batch.keys[:limit])
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoisyModule(lightning.LightningModule):
    """Draws from every generator that the CPU has, so that its weights remember them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_D, self.dropout = nn.Parameter(torch.linspace(1, 2, 8)), nn.Dropout(0.5)

    def training_step(self, batch: VideoBatch, batch_index: int) -> Tensor:
        loss = self.dropout(self.weight_D).sum() * (1 + random.random() + np.random.rand()) + torch.randn(())
        self.log("train/loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: VideoBatch, batch_index: int) -> None:
        self.log("val/loss", self.weight_D.sum() + torch.randn(()), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def loader(length: int = 100, on_read: Callable[[], None] | None = None) -> DataLoader:
    return DataLoader(Batches(length, on_read), batch_size=None)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., lightning.Trainer]:
    def make(*callbacks: lightning.Callback, folder: Path = tmp_path, **settings: object) -> lightning.Trainer:
        defaults = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None, "log_every_n_steps": 2}
        quiet = {"num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False}
        return lightning.Trainer(
            accelerator="cpu",
            devices=1,
            callbacks=list(callbacks),
            logger=CSVLogger(folder, name="csv"),
            **{"enable_checkpointing": False, "default_root_dir": folder, **defaults, **quiet, **settings},
        )

    return make


@pytest.fixture
def tiny() -> type[TinyModule]:
    return TinyModule


@pytest.fixture
def keeping() -> Callable[..., Checkpoints]:
    """Give checkpoints of every second step, the last one kept."""

    def make(every: int = 2, **settings: object) -> Checkpoints:
        usual = {"keep_last": 1, "keep_best": 0, "monitor": "val/accuracy", "mode": "max", "background": False}
        return Checkpoints(every_n_steps=every, **{**usual, **settings})

    return make


@pytest.fixture
def noisy() -> type[NoisyModule]:
    return NoisyModule


@pytest.fixture
def epoch_of() -> Callable[[int], DataLoader]:
    """Give a loader that, like the stream, draws nothing from torch's own generator."""
    return lambda length: DataLoader(Batches(length), batch_size=None, generator=torch.Generator())


@pytest.fixture
def batches() -> Callable[..., DataLoader]:
    return loader
