"""The Lightning data module: splits of shards as loaders, and a position that a stopped run goes on from.

What is saved is one ``Position``: the batches that were trained, not those that were read. On resuming it is compared
with what Lightning counted itself, and a disagreement is an error rather than a batch trained twice or never.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from data.collate import collate
from data.order import EpochOrder, GlobalBatches, Position
from data.stream import BatchLoader, ClipDataset
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.shards import ShardSet, open_shards
from lightning_crosslmm.text import load_tokenizer
from lightning_crosslmm.video import FrameSampling

_SPLITS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class VideoDataModule(LightningDataModule):
    """Shards of conversations with videos and images, as batches for Lightning.

    Training goes through every sample once per epoch, in another order each, and leaves out the rest that fills no
    global batch. The other splits keep the order of their shards and leave nothing out.

    Args:
        train: shards to train on: a folder, a tar or a brace pattern. Each split is needed only where it is used.
        val: shards to validate on; None validates nothing.
        test: shards to test on.
        predict: shards to answer.
        sampling: which moments of a video become frames.
        image_size: height and width of a frame in pixels, the encoder's.
        tokenizer: as for ``text.load_tokenizer``.
        max_tokens: longest text of a sample, marks counting as one each.
        global_batch_size: samples per optimiser step over all ranks and accumulated batches.
        num_workers: decoding processes per rank and split.
        prefetch_batches: batches that each worker holds ready.
        seed: of the order.
        window_shards: shards that are mixed with one another at a time.
        samples_per_row: neighbours packed into one row of the LLM's batch.
    """

    def __init__(
        self,
        *,
        sampling: FrameSampling,
        image_size: int,
        tokenizer: str,
        max_tokens: int,
        global_batch_size: int,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        predict: str | Path | None = None,
        num_workers: int = 0,
        prefetch_batches: int = 2,
        seed: int = 0,
        window_shards: int = 8,
        samples_per_row: int = 1,
    ) -> None:
        super().__init__()
        positive = {
            "image_size": image_size,
            "max_tokens": max_tokens,
            "global_batch_size": global_batch_size,
            "prefetch_batches": prefetch_batches,
            "window_shards": window_shards,
            "samples_per_row": samples_per_row,
            "num_workers": num_workers + 1,
        }
        for name, value in positive.items():
            if value < 1:
                least = int(name != "num_workers")
                raise UserError(f"data.{name}: must be at least {least}, got {value - 1 + least}")
        self.tokenizer = load_tokenizer(tokenizer)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._specs = {"train": train, "val": val, "test": test, "predict": predict}
        self._sampling, self._image_size, self._max_tokens = sampling, image_size, max_tokens
        self._num_workers, self._prefetch_batches = num_workers, prefetch_batches
        self._window_shards, self._samples_per_row = window_shards, samples_per_row
        self._shards: dict[str, ShardSet] = {}
        self._loaders: list[BatchLoader] = []
        self._epoch_start: Position | None = None
        self._restored: Position | None = None

    @property
    def answer_kinds(self) -> tuple[str, ...]:
        """Question types that the opened splits name, sorted; known after ``setup``."""
        return tuple(sorted({kind for shards in self._shards.values() for kind in shards.answer_kinds}))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the data of each opened split; known after ``setup``."""
        return {split: shards.fingerprint for split, shards in self._shards.items()}

    def setup(self, stage: str) -> None:
        """Open the shards of a stage's splits."""
        for split in _SPLITS_OF_STAGE[stage]:
            if self._specs[split] is not None:
                self._shards[split] = open_shards(self._specs[split])
            elif split != "val" or stage == "validate":
                raise UserError(f"data.{split}: is not set; name a folder of shards, a tar or a brace pattern")

    def warm_start(self, model: CrossLMM) -> None:
        """Prepare a model for a training from the start; real data have nothing to add to its weights."""

    def train_dataloader(self) -> BatchLoader:
        """Give the loader of all training epochs; it resumes where a checkpoint's position says."""
        if self.trainer is not None and self.trainer.overfit_batches:
            raise UserError(
                f"trainer.overfit_batches: {self.trainer.overfit_batches} would see other samples in every epoch; "
                "name a small folder of shards in data.train instead"
            )
        num_batches = len(self._train_batches(self._beginning(epoch=0)))
        self._align_progress(num_batches)
        loader = self._loader("train", self._begin_epoch, num_batches)
        # Lightning warns that a loader without these cannot resume.
        loader.state_dict, loader.load_state_dict = self.state_dict, self.load_state_dict
        return loader

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
        if "train" not in self._shards:
            return {}
        position = self._restored or self._epoch_start or self._beginning(epoch=0)
        if self._restored is None and self._epoch_start is not None:
            trained = self._progress.current.processed // self._accumulate
            position = position.next_epoch() if self._epoch_is_trained else position.advance(trained)
        return {"position": position.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position; training goes on with the next batch."""
        is_fitting = self.trainer is None or self.trainer.state.fn == "fit"  # validating restores checkpoints, too
        if is_fitting and "position" in state_dict:
            self._restored = Position.from_dict(state_dict["position"])

    @property
    def _progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress

    @property
    def _epoch_is_trained(self) -> bool:
        # The last batch is marked before it is trained, and a run may be interrupted in it.
        return self._progress.is_last_batch and self._progress.current.processed == self._progress.current.ready

    @property
    def _accumulate(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    def _beginning(self, epoch: int) -> Position:
        return Position(self.seed, epoch, 0, self.global_batch_size, self._shards["train"].fingerprint)

    def _begin_epoch(self) -> GlobalBatches:
        """Plan the epoch that Lightning is about to train, from the restored position if there is one."""
        if self.trainer is None:
            return self._train_batches(self._beginning(epoch=0))
        epoch, ready = self.trainer.current_epoch, self._progress.current.ready
        start = self._restored or self._beginning(epoch)
        self._check(start)
        if (start.epoch, start.batch * self._accumulate) != (epoch, ready):
            raise UserError(
                f"checkpoint: its data stand at epoch {start.epoch}, global batch {start.batch}, but Lightning "
                f"goes on with epoch {epoch}, batch {ready} (trainer.accumulate_grad_batches is {self._accumulate}); "
                "resume from a checkpoint saved after a batch or an epoch, and do not read estimated_stepping_batches"
            )
        self._epoch_start, self._restored = self._beginning(epoch), None
        return self._train_batches(start)

    def _check(self, position: Position) -> None:
        here = self._beginning(position.epoch)
        for field, setting in (("seed", "seed"), ("global_batch", "global_batch_size"), ("fingerprint", "train")):
            then, now = getattr(position, field), getattr(here, field)
            if then != now:
                raise UserError(
                    f"data.{setting}: the checkpoint was trained with {field} {then} and this run has {now}, so its "
                    "place in the data has no meaning here; give the same, or start a new run from its weights"
                )

    def _align_progress(self, num_batches: int) -> None:
        """Let Lightning's counters agree with the restored position.

        They count a rank's batches, so they mean something else once ``accumulate_grad_batches`` is another, and inside
        an accumulation they stand past gradients that no checkpoint holds: that global batch is trained anew.
        """
        if self._restored is None:
            return
        current = self._progress.current
        trained = self._restored.batch * self._accumulate
        if self._epoch_is_trained:
            trained = max(current.processed, num_batches)
        shift = trained - current.processed
        for count in ("ready", "started", "processed", "completed"):
            setattr(current, count, getattr(current, count) + shift)

    def _batches(self, order: EpochOrder, start_batch: int, is_training: bool) -> GlobalBatches:
        ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"rank": 0, "num_replicas": 1}
        world, accumulate = ranks["num_replicas"], self._accumulate
        if self.global_batch_size % (world * accumulate):
            raise UserError(
                f"data.global_batch_size: {self.global_batch_size} does not divide by {world} rank(s) "
                f"(trainer.devices x trainer.num_nodes) x {accumulate} (trainer.accumulate_grad_batches)"
            )
        if is_training:
            return GlobalBatches(
                order, self.global_batch_size, ranks["rank"], world, start_batch, drop_last=True, accumulate=accumulate
            )
        return GlobalBatches(order, self.global_batch_size // accumulate, ranks["rank"], world, drop_last=False)

    def _train_batches(self, start: Position) -> GlobalBatches:
        shards = self._shards["train"]
        order = EpochOrder(
            self.seed, start.epoch, shards.fingerprint, shards.num_samples, self._window_shards, shuffle=True
        )
        return self._batches(order, start.batch, is_training=True)

    def _eval_batches(self, split: str) -> GlobalBatches:
        shards = self._shards[split]
        order = EpochOrder(self.seed, 0, shards.fingerprint, shards.num_samples, self._window_shards, shuffle=False)
        return self._batches(order, 0, is_training=False)

    def _eval_loader(self, split: str) -> BatchLoader:
        return self._loader(split, partial(self._eval_batches, split), len(self._eval_batches(split)))

    def _loader(self, split: str, plan: Callable[[], GlobalBatches], num_batches: int) -> BatchLoader:
        dataset = ClipDataset(self._shards[split], self._sampling, self._image_size, self.tokenizer, self._max_tokens)
        together = partial(collate, samples_per_row=self._samples_per_row)
        loader = BatchLoader(dataset, together, plan, num_batches, self._num_workers, self._prefetch_batches)
        self._loaders.append(loader)
        return loader
