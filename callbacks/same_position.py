"""All ranks stand at the same place of the same data and write into the same folder, or the run stops."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning

from callbacks.agreement import Agreement
from lightning_crosslmm.errors import UserError


class SamePosition(lightning.Callback):
    """Compare the data's position over all ranks when training starts and before each checkpoint.

    Ranks read by a plan that each computes for itself; with other files, settings or versions of the code on one
    machine they would train on samples twice and others never, and nothing else would say so.
    """

    def __init__(self) -> None:
        self._agreement = Agreement()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare where training starts, and the name of the run's folder, which each process was told by itself."""
        names = self._agreement.gather(Path(trainer.default_root_dir).name)
        if other := next((name for name in names if name != names[0]), None):
            raise UserError(
                f"run_dir: ranks would write into different folders, {names[0]} and {other}: the default holds the "
                "time at which each process started; give them all one, run_dir=runs/NAME"
            )
        self._compare(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare what is about to be saved; called on every rank."""
        self._compare(trainer)

    def _compare(self, trainer: lightning.Trainer) -> None:
        state: Any = trainer.datamodule.state_dict()
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        told = self._agreement.gather([digest, state.get("position")])
        others = [rank for rank, (other, _) in enumerate(told) if other != told[0][0]]
        if others:
            raise UserError(
                f"data: ranks {others} stand at another place than rank 0: {told[others[0]][1]} and {told[0][1]}; give "
                "every machine the same shards, settings and version of this code"
            )
