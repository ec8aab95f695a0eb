"""What a run was and what came of it: ``provenance.json`` and ``metrics.json``."""

import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from callbacks.prefill_cost import PrefillCost
from callbacks.throughput import Throughput
from lightning_crosslmm.run_folder import DATA_RECORD, replacing

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "lightning", "webdataset", "av", "hydra-core", "xformers"
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[1]


class RunRecord(lightning.Callback):
    """Write where a run came from when it starts, and its final numbers when it ends.

    ``provenance.json``: command line, git commit and whether the tree differed from it, package versions, Python,
    platform, device, number of processes, fingerprint of the data, seed, start and end, and the error if one ended it;
    the same of every start before in ``earlier_sessions``, where a training was resumed.
    ``data.json``: every shard that is trained on, with its samples and checksums.
    ``metrics.json``: the last value of everything logged (``val/accuracy``, ``val/accuracy/<kind>``, ``train/loss``),
    ``train/seconds`` (wall time of fit, resumed parts added up) and ``train/wait_share`` of the whole run, and what
    `PrefillCost` measured. Modes other than fit write ``provenance_<mode>.json`` and ``metrics_<mode>.json``; a number
    that is not finite is null.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._record: dict[str, Any] = {}
        self._seconds_before = 0.0
        self._metrics_before: dict[str, float] = {}
        self._start_s: float | None = None

    @rank_zero_only
    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write what is known before the start."""
        self._record = {
            "mode": trainer.state.fn.value,
            "started": _now(),
            "ended": None,
            "error": None,
            "command": sys.argv,
            **_commit(),
            "packages": _versions(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": _device_name(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "data_fingerprint": getattr(trainer.datamodule, "fingerprint", None),
            "seed": self.seed,
        }
        if trainer.state.fn == "fit":
            self._record["earlier_sessions"] = _sessions(Path(trainer.default_root_dir) / "provenance.json")
        self._write(trainer, "provenance", self._record)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock, and list the data's shards, for a later run to say what changed."""
        self._start_s = time.perf_counter()
        if self._record and hasattr(trainer.datamodule, "record"):
            with replacing(Path(trainer.default_root_dir) / DATA_RECORD) as part:
                part.write_text(json.dumps(trainer.datamodule.record()) + "\n")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Record what ended the run."""
        self._finish(trainer, f"{type(exception).__name__}: {exception}")

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write the final numbers."""
        self._finish(trainer, None)

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        return {"seconds": self._seconds()}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the numbers so far: a run that is killed after its last step goes on without another one."""
        checkpoint["callbacks"][self.state_key]["metrics"] = self._metrics(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._seconds_before, self._metrics_before = state_dict["seconds"], state_dict["metrics"]

    def _seconds(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._start_s if self._start_s is not None else 0.0)

    def _metrics(self, trainer: lightning.Trainer) -> dict[str, float]:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        if self._start_s is not None:
            metrics["train/seconds"] = self._seconds()
            for callback in trainer.callbacks:
                if isinstance(callback, Throughput) and callback.wait_share is not None:
                    metrics["train/wait_share"] = callback.wait_share
        for callback in trainer.callbacks:
            if isinstance(callback, PrefillCost):
                metrics |= callback.measured
        return self._metrics_before | metrics

    @rank_zero_only
    def _finish(self, trainer: lightning.Trainer, error: str | None) -> None:
        if not self._record or self._record["ended"]:
            return  # failed before setup, or written by on_exception
        metrics = self._metrics(trainer)
        if metrics:
            finite = {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())}
            self._write(trainer, "metrics", finite)
        self._record.update(ended=_now(), error=error)
        self._write(trainer, "provenance", self._record)

    def _write(self, trainer: lightning.Trainer, name: str, content: dict[str, Any]) -> None:
        mode = self._record["mode"]
        path = Path(trainer.default_root_dir) / (f"{name}.json" if mode == "fit" else f"{name}_{mode}.json")
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _sessions(path: Path) -> list[dict[str, Any]]:
    """Read the starts that a folder's record tells of, the oldest first; those that were killed have no end."""
    if not path.exists():
        return []
    last = json.loads(path.read_text())
    return [*last.pop("earlier_sessions", []), last]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _commit() -> dict[str, str | bool | None]:
    """Commit and state of the tree; both None where there is no git or no repository."""
    try:
        commit, status = (
            subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "uncommitted_changes": None}
    return {"commit": commit, "uncommitted_changes": bool(status)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
