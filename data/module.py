"""The Lightning data module: splits of shards as loaders, and a position that a stopped run goes on from.

What is saved is one ``Position``: the batches that were trained, not those that were read. On resuming it is compared
with what Lightning counted itself, and a disagreement is an error rather than a batch trained twice or never.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from data.collate import collate
from data.loader import STARTS, BatchLoader
from data.mixture import Mixture, Spec, changes
from data.plan import EvalPlan, TrainPlan
from data.planner import Planner, Shared
from data.position import Position
from data.resume import EpochProgress
from data.stream import ClipDataset, Reading
from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.run_folder import DATA_RECORD
from lightning_crosslmm.storage import LOCAL, Storage
from lightning_crosslmm.text import load_tokenizer
from lightning_crosslmm.video import FrameSampling

_SPLITS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_START_S = 60.0  # workers import torch and open shards
_GUESSED_SAMPLES_PER_ROW = 16


class VideoDataModule(LightningDataModule):
    """Shards of conversations with videos and images, as batches for Lightning.

    Training goes through every sample once per epoch, in another order each; the last global batch may be smaller. The
    other splits keep the order of their shards, one sample per row.

    Args:
        train: shards to train on: a folder, a tar, a brace pattern or a URL; or a list of those: in a row, or, with
            ``{shards: SPEC, weight: W}``, mixed in proportion to the weights. Each split is needed only where used.
        val: shards to validate on, without weights; None validates nothing.
        test: shards to test on.
        predict: shards to answer.
        sampling: which moments of a video become frames.
        image_size: height and width of a frame in pixels, the encoder's.
        tokenizer: as for ``text.load_tokenizer``.
        max_tokens: longest text of a sample, marks counting as one each.
        global_batch_size: rows per optimizer step over all ranks and accumulated batches.
        pack_tokens: estimated tokens that a row of several samples may have in training; None puts one sample in a row.
        bytes_per_token: of text, for the estimate; 1 is an upper bound for any tokenizer that knows bytes.
        turns: ``all`` trains every answer of a conversation, ``one`` a single question with its answer, another for
            each epoch, ``mixed`` either, drawn for each epoch.
        max_bad_fraction: share of damaged samples past which a run stops (see ``callbacks.skipped``); 0 stops at the
            first one.
        sample_timeout_s: a clip that takes longer to decode is damaged; None waits for ever.
        num_workers: decoding processes per rank and split.
        worker_start: how they come to be: ``forkserver``, ``spawn`` or ``fork``.
        prefetch_batches: batches that each worker holds ready.
        seed: of the order and of what is drawn for a sample.
        window_shards: shards that are mixed with one another at a time.
        storage: how shards at a URL are read.
    """

    def __init__(
        self,
        *,
        sampling: FrameSampling,
        image_size: int,
        tokenizer: str | None,
        max_tokens: int,
        global_batch_size: int,
        train: Spec | Sequence[Spec] | None = None,
        val: Spec | Sequence[Spec] | None = None,
        test: Spec | Sequence[Spec] | None = None,
        predict: Spec | Sequence[Spec] | None = None,
        pack_tokens: int | None = None,
        bytes_per_token: float = 1.0,
        turns: str = "all",
        max_bad_fraction: float = 0.0,
        sample_timeout_s: float | None = None,
        num_workers: int = 0,
        worker_start: str = STARTS[0],
        prefetch_batches: int = 2,
        seed: int = 0,
        window_shards: int = 8,
        storage: Storage = LOCAL,
    ) -> None:
        super().__init__()
        whole = {"image_size": image_size, "max_tokens": max_tokens, "global_batch_size": global_batch_size}
        whole |= {"prefetch_batches": prefetch_batches, "window_shards": window_shards}
        for name, value in (whole | {"pack_tokens": 1 if pack_tokens is None else pack_tokens}).items():
            _check(name, value, value >= 1, "at least 1")
        _check("num_workers", num_workers, num_workers >= 0, "at least 0")
        _check("bytes_per_token", bytes_per_token, bytes_per_token > 0, "above 0")
        _check("max_bad_fraction", max_bad_fraction, 0 <= max_bad_fraction <= 1, "from 0 to 1")
        _check("sample_timeout_s", sample_timeout_s, (sample_timeout_s or 1) > 0, "above 0, or null")
        for name, value, choices in (("turns", turns, ("all", "one", "mixed")), ("worker_start", worker_start, STARTS)):
            _check(name, value, value in choices, f"one of {', '.join(choices)}{nearest(str(value), choices)}")
        self.tokenizer = load_tokenizer(tokenizer)
        self.global_batch_size, self.seed, self.max_bad_fraction = global_batch_size, seed, max_bad_fraction
        self.leaves_out = False
        """Whether damaged samples are left out and reported; for who counts them. Else the first one is an error."""
        self._specs, self._storage = {"train": train, "val": val, "test": test, "predict": predict}, storage
        self._reading = Reading(sampling, image_size, self.tokenizer, max_tokens, sample_timeout_s, seed=seed)
        packing = pack_tokens, bytes_per_token, sampling, self.tokenizer
        self._planner = Planner(seed, window_shards, global_batch_size, *packing)
        self._turns = turns
        self._num_workers, self._worker_start, self._prefetch_batches = num_workers, worker_start, prefetch_batches
        self._data: dict[str, Mixture] = {}
        self._loaders: list[BatchLoader] = []
        self._train_loader: BatchLoader | None = None
        self._plan: TrainPlan | None = None
        self._epoch_start: Position | None = None
        self._restored: Position | None = None

    @property
    def answer_kinds(self) -> tuple[str, ...]:
        """Question types that the opened splits name, sorted; known after ``setup``."""
        return tuple(sorted({kind for data in self._data.values() for kind in data.answer_kinds}))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the data of each opened split; known after ``setup``."""
        return {split: data.fingerprint for split, data in self._data.items()}

    def record(self) -> dict[str, Any]:
        """List the shards that are trained on, for a later run that resumes to say what changed."""
        return self._data["train"].record()

    def setup(self, stage: str) -> None:
        """Open the shards of a stage's splits."""
        for split in _SPLITS_OF_STAGE[stage]:
            if self._specs[split] is not None:
                self._data[split] = Mixture.open(self._specs[split], f"data.{split}", self._storage, split == "train")
                self._data[split].check_cache(self._planner.window_shards)
            elif split != "val" or stage == "validate":
                raise UserError(f"data.{split}: is not set; name a folder of shards, a tar or a brace pattern")

    def fit_to(self, model: CrossLMM) -> None:
        """Learn from a model how many tokens a frame takes in a row; of a pooler that cannot tell, its patches."""
        self._planner = self._planner.told(model.tokens_per_frame or prod(model.encoder.grid))

    def warm_start(self, model: CrossLMM) -> None:
        """Prepare a model for a training from the start; real data have nothing to add to its weights."""

    def train_dataloader(self) -> BatchLoader:
        """Give the loader of all training epochs; it resumes where a checkpoint's position says."""
        if self.trainer is not None:
            self._check_trainer()
        if self._restored is not None:
            self._check_position(self._restored)
        num_batches = len(self._train_plan(self._beginning(epoch=0)))
        if self._restored is not None:
            EpochProgress(self.trainer).align(self._restored, num_batches)
        loader = self._loader("train", self._begin_epoch, num_batches)
        # Lightning warns that a loader without these cannot resume.
        loader.state_dict, loader.load_state_dict = self.state_dict, self.load_state_dict
        self._train_loader = loader
        return loader

    def on_before_batch_transfer(self, batch: VideoBatch, dataloader_idx: int) -> VideoBatch:
        """Tell Lightning of an epoch's last batch, which the loader's length does not where rows are packed."""
        if self.trainer.training and self._train_loader is not None and self._train_loader.at_end:
            EpochProgress(self.trainer).mark_last()
        return batch

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Give the loader of the validation split, or none."""
        return self._eval_loader("val") if self._specs["val"] is not None else []

    def test_dataloader(self) -> BatchLoader:
        """Give the loader of the test split."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """Give the loader of the split to answer."""
        return self._eval_loader("predict")

    def teardown(self, stage: str) -> None:
        """Let the workers go."""
        while self._loaders:
            self._loaders.pop().close()

    def state_dict(self) -> dict[str, Any]:
        """Say where training stands, as plain types."""
        if "train" not in self._data:
            return {}
        position = self._restored or self._epoch_start or self._beginning(epoch=0)
        if self._restored is None and self._plan is not None:
            progress = EpochProgress(self.trainer)
            trained = progress.trained
            is_over = progress.epoch_is_trained
            position = position.next_epoch() if is_over else position.at(trained, self._plan.place(trained))
        return {"position": position.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position; training goes on with the next batch."""
        is_fitting = self.trainer is None or self.trainer.state.fn == "fit"  # validating restores checkpoints, too
        if is_fitting and "position" in state_dict:
            self._restored = Position.from_dict(state_dict["position"])

    @property
    def _accumulate(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    @property
    def _shared(self) -> Shared:
        ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"rank": 0, "num_replicas": 1}
        return Shared(ranks["rank"], ranks["num_replicas"], self._accumulate)

    def _beginning(self, epoch: int) -> Position:
        return self._planner.beginning(self._data["train"], epoch)

    def _begin_epoch(self) -> TrainPlan:
        """Plan the epoch that Lightning is about to train, from the restored position if there is one."""
        if self.trainer is None:
            return self._train_plan(self._beginning(epoch=0))
        progress = EpochProgress(self.trainer)
        start = self._restored or self._beginning(progress.epoch)
        self._check_position(start)
        if (start.epoch, start.batch * self._accumulate) != (progress.epoch, progress.ready):
            raise UserError(
                f"checkpoint: its data stand at epoch {start.epoch}, global batch {start.batch}, but Lightning goes on "
                f"with epoch {progress.epoch}, batch {progress.ready} (trainer.accumulate_grad_batches is "
                f"{self._accumulate}); resume from a checkpoint saved after a batch or an epoch, and do not read "
                "estimated_stepping_batches"
            )
        self._epoch_start, self._restored, self._plan = start, None, self._train_plan(start)
        return self._plan

    def _check_trainer(self) -> None:
        if self.trainer.overfit_batches:
            raise UserError(
                f"trainer.overfit_batches: {self.trainer.overfit_batches} would see other samples in every epoch; "
                "name a small folder of shards in data.train instead"
            )
        interval = self.trainer.val_check_interval
        if self._planner.pack_tokens is not None and self._specs["val"] is not None and isinstance(interval, float):
            raise UserError(
                f"trainer.val_check_interval: {interval} is a share of an epoch, whose batches nobody counted where "
                "data.pack_tokens is set; give a number of batches"
            )

    def _check_position(self, position: Position) -> None:
        here = self._beginning(position.epoch)
        mend = "its place in the data has no meaning here; give the same, or start anew from its weights (init_from)"
        if difference := position.difference(here):
            raise UserError(f"{difference}: the checkpoint was trained with the former, so {mend}")
        if position.fingerprint != here.fingerprint:
            raise UserError(f"data.train: the checkpoint was trained on other data{self._changes()}, so {mend}")

    def _changes(self) -> str:
        folders = Path(getattr(self.trainer, "ckpt_path", None) or "").parents
        for path in (folder / DATA_RECORD for folder in list(folders)[:4]):
            if path.is_file():
                return f" ({'; '.join(changes(json.loads(path.read_bytes()), self.record()))})"
        return ""

    def _train_plan(self, start: Position) -> TrainPlan:
        return self._planner.train_plan(self._data["train"], start, self._shared)

    def _eval_plan(self, split: str) -> EvalPlan:
        return self._planner.eval_plan(self._data[split], self._shared)

    def _eval_loader(self, split: str) -> BatchLoader:
        return self._loader(split, partial(self._eval_plan, split), len(self._eval_plan(split)))

    def _loader(self, split: str, plan: Callable[[], TrainPlan | EvalPlan], num_batches: int) -> BatchLoader:
        reading, timeout_s = self._reading, self._reading.timeout_s
        if split == "train":
            reading = replace(reading, turns=self._turns, shifts_frames=reading.sampling.jitter)
        if timeout_s is not None:
            rows = self.global_batch_size // self._shared.world
            timeout_s = _START_S + timeout_s * rows * (
                1 if self._planner.pack_tokens is None else _GUESSED_SAMPLES_PER_ROW
            )
        loader = BatchLoader(
            ClipDataset(self._data[split], reading),
            partial(collate, image_size=reading.image_size),
            plan,
            num_batches,
            self._num_workers,
            self._prefetch_batches,
            self._worker_start,
            self.leaves_out,
            timeout_s,
        )
        self._loaders.append(loader)
        return loader


def _check(name: str, value: Any, is_right: bool, right: str) -> None:
    if not is_right:
        raise UserError(f"data.{name}: must be {right}, got {value}")
