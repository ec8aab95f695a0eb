"""Damaged samples that were left out: counted, listed in ``skipped.json``; past a share of all they stop the run."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from callbacks.agreement import Agreement
from lightning_crosslmm.batch import Skipped, VideoBatch
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import replacing

MIN_SEEN = 1000
"""A share is taken of no fewer samples, so that one bad sample among the first few does not end a run."""

_SHOWN = 10
_log = logging.getLogger(__name__)


class _Counts(NamedTuple):
    seen: int = 0
    skipped: int = 0


class SkippedSamples(lightning.Callback):
    """Lets a run go on without its damaged samples, and says which those are.

    The data module hands over what it left out with each batch. Before an optimizer step all ranks add up their
    counts, and where there is any, their lists: what is known, saved and decided is the same on every rank, and all
    of them stop at the same step. The run stops once more than ``max_bad_fraction * max(seen, 1000)`` samples were left
    out, with 0 at the first one. Validation is counted by itself, at its end, and logs ``val/skipped`` where it left
    any out. Without this callback the first damaged sample is an error.
    """

    def __init__(self) -> None:
        self._agreement = Agreement()
        self._max_bad_fraction = 0.0
        self._counts: dict[str, _Counts] = {}
        self._listed: dict[Skipped, int] = {}
        self._new: list[Skipped] = []
        self._new_seen = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Ask for damaged samples to be left out; called before the loaders are made."""
        data: Any = trainer.datamodule
        self._max_bad_fraction, data.leaves_out = data.max_bad_fraction, True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget batches of a step that was not finished."""
        self._new, self._new_seen = [], 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: VideoBatch, batch_idx: int
    ) -> None:
        """Count a batch."""
        self._take(batch)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Agree once per step, before weights change and before whoever saves at the step's end."""
        self._agree("train")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: VideoBatch, *_: int) -> None:
        """Count a batch."""
        self._take(batch)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: VideoBatch, *_: int) -> None:
        """Count a batch."""
        self._take(batch)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: VideoBatch, *_: int) -> None:
        """Count a batch."""
        self._take(batch)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Agree, and log how many samples the measures lack."""
        if not trainer.sanity_checking:
            self._agree_and_log(pl_module, "val")

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Agree, and log how many samples the measures lack."""
        self._agree_and_log(pl_module, "test")

    def on_predict_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Agree."""
        self._agree("predict")

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write and log the list."""
        self._report(Path(trainer.default_root_dir))

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Write and log the list."""
        self._report(Path(trainer.default_root_dir))

    def state_dict(self) -> dict[str, Any]:
        """Counts and list as of the last step, equal on every rank."""
        return {
            "counts": {stage: list(counts) for stage, counts in self._counts.items()},
            "listed": [[*skipped, times] for skipped, times in self._listed.items()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._counts = {stage: _Counts(*counts) for stage, counts in state_dict["counts"].items()}
        self._listed = {Skipped(*skipped): times for *skipped, times in state_dict["listed"]}

    def _take(self, batch: VideoBatch) -> None:
        self._new += batch.skipped
        self._new_seen += len(batch.skipped) + sum(map(bool, batch.keys))

    def _agree(self, stage: str) -> int:
        new, self._new = self._new, []
        seen, skipped = self._agreement.sum_int([self._new_seen, len(new)])
        self._new_seen = 0
        before = self._counts.get(stage, _Counts())
        counts = self._counts[stage] = _Counts(before.seen + seen, before.skipped + skipped)
        if not skipped:
            return 0
        everyone = sorted(one for ranks in self._agreement.gather([tuple(each) for each in new]) for one in ranks)
        for one in everyone:
            self._listed[Skipped(*one)] = self._listed.get(Skipped(*one), 0) + 1
        if counts.skipped > self._max_bad_fraction * max(counts.seen, MIN_SEEN):
            raise UserError(_past_the_limit(stage, counts, [Skipped(*one) for one in everyone], self._max_bad_fraction))
        return skipped

    def _agree_and_log(self, pl_module: lightning.LightningModule, stage: str) -> None:
        if skipped := self._agree(stage):
            pl_module.log(f"{stage}/skipped", float(skipped))

    @rank_zero_only
    def _report(self, folder: Path) -> None:
        if not self._listed:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "skipped.json"
        with replacing(path) as part:
            part.write_text(json.dumps(_summary(self._counts, self._listed), indent=1, ensure_ascii=False) + "\n")
        lines = [f"{told.shard}: sample '{told.key}': {told.reason}" for told in list(self._listed)[:_SHOWN]]
        more = [f"and {len(self._listed) - _SHOWN} more"] if len(self._listed) > _SHOWN else []
        _log.warning("%d damaged sample(s) left out, see %s\n%s", len(self._listed), path, "\n".join(lines + more))


def _summary(counts: dict[str, _Counts], listed: dict[Skipped, int]) -> dict[str, Any]:
    samples = [{**told._asdict(), "times": times} for told, times in listed.items()]
    return {**{stage: each._asdict() for stage, each in counts.items()}, "samples": samples}


def _past_the_limit(stage: str, counts: _Counts, last: Sequence[Skipped], limit: float) -> str:
    told = last[-1]
    return (
        f"{told.shard}: sample '{told.key}': {told.reason}; now {counts.skipped} of {counts.seen} samples of {stage} "
        f"are damaged, more than data.max_bad_fraction={limit:g} of {max(counts.seen, MIN_SEEN)} samples; mend the "
        "data (skipped.json lists what is damaged), or raise the setting"
    )
