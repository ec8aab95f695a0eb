"""The answers of ``mode=predict``: ``predictions.jsonl``, one JSON object per line."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import lightning

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.run_folder import replacing


class PredictionWriter(lightning.Callback):
    """Write what ``predict_step`` returns, in the order of the data, one line each.

    ``predict_step`` returns one mapping or dataclass of plain values for each answer (key, question, answer, ...). Each
    process writes a file of its own while it works; the first one joins them at the end.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open this process's part."""
        path = _part(trainer, trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Iterable[Any],
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the answers of a batch."""
        assert self._file is not None, "Lightning calls on_predict_start first"
        for answer in outputs:
            line = dict(answer) if isinstance(answer, Mapping) else dataclasses.asdict(answer)
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Join the parts."""
        self._close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [_part(trainer, rank) for rank in range(trainer.world_size)]
            with replacing(Path(trainer.default_root_dir) / "predictions.jsonl") as joined:
                joined.write_bytes(b"".join(part.read_bytes() for part in parts))
            for part in parts:
                part.unlink()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the part; what it holds stays."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _part(trainer: lightning.Trainer, rank: int) -> Path:
    return Path(trainer.default_root_dir) / f"predictions.jsonl.rank{rank}"
