"""Checkpoints on disk: a folder each, shown by one rename when it is whole, with a marker that says what it holds.

``checkpoints/step-00000700/`` holds ``state.ckpt`` (whole) or torch's distributed files beside ``meta.pt`` (sharded),
and ``complete.json``, written last. While it is written its name begins with a dot.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

from lightning_crosslmm.errors import UserError

CHECKPOINTS = "checkpoints"
MARKER = "complete.json"
WHOLE = "state.ckpt"
SHARDED = "meta.pt"
_NAME = re.compile(r"step-(\d{8,})(-\d+)?")


@dataclass(frozen=True)
class Marker:
    """What ``complete.json`` says.

    Args:
        number: checkpoints of a run are counted in the order in which they were written, resumed parts included.
        step: optimizer steps trained.
        epoch: counted from 0.
        monitor: name of the metric that chooses the best one.
        mode: ``min`` or ``max``: which is better.
        metric: its value; None where no validation belongs to the step, or one that gave no finite number.
        world_size: processes that trained.
        saved: time, UTC, ISO 8601.
        versions: of Python and packages.
        files: name and size in bytes of every file.
    """

    number: int
    step: int
    epoch: int
    monitor: str
    mode: str
    metric: float | None
    world_size: int
    saved: str
    versions: Mapping[str, str]
    files: Mapping[str, int]


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint.

    Args:
        path: its folder.
        marker: what it says about itself.
    """

    path: Path
    marker: Marker

    @property
    def loadable(self) -> Path:
        """What to load: the file, or the folder if it is sharded."""
        return self.path if (self.path / SHARDED).exists() else self.path / WHOLE

    @property
    def quality(self) -> float | None:
        """The metric, turned so that more is better; None if there is none."""
        metric = self.marker.metric
        return -metric if metric is not None and self.marker.mode == "min" else metric


def read_checkpoint(folder: Path) -> Saved:
    """Read a checkpoint's marker, and compare it with the files.

    Raises:
        UserError: the checkpoint is torn: no marker, or a file is missing or of another size.
    """
    try:
        marker = Marker(**json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError, TypeError) as error:
        why = f"it has no {MARKER}" if isinstance(error, FileNotFoundError) else f"its {MARKER} is damaged: {error}"
        raise UserError(f"{folder}: is torn, {why}") from error
    for name, num_bytes in marker.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if found != num_bytes:
            raise UserError(f"{folder}: is torn, {name} has {found} bytes and {MARKER} says {num_bytes}")
    return Saved(folder, marker)


def list_checkpoints(run_dir: Path) -> tuple[list[Saved], list[str]]:
    """Find a run's checkpoints.

    Returns:
        The whole ones as they were written, the newest last; and what is wrong with each torn one.
    """
    saved, torn = [], []
    for folder in sorted((run_dir / CHECKPOINTS).glob("step-*")):
        if _NAME.fullmatch(folder.name):
            try:
                saved.append(read_checkpoint(folder))
            except UserError as error:
                torn.append(str(error))
    return sorted(saved, key=lambda each: each.marker.number), torn


def rank_checkpoints(saved: Sequence[Saved]) -> list[Saved]:
    """Sort the checkpoints that have a metric: the best one first, of equal ones the earliest.

    A run that was resumed with another ``monitor`` or ``mode`` goes by the newest of them.
    """
    measured = [each for each in saved if each.quality is not None]
    named = [(each.marker.monitor, each.marker.mode) for each in measured]
    comparable = [each for each, name in zip(measured, named, strict=True) if name == named[-1]]
    return sorted(comparable, key=lambda each: (-(each.quality or 0.0), each.marker.number))


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Say where to write the next checkpoint: a folder nobody sees yet. It is not made."""
    return run_dir / CHECKPOINTS / f".step-{step:08d}"


def show_checkpoint(
    part: Path,
    *,
    step: int,
    epoch: int,
    monitor: str,
    mode: str,
    metric: float | None,
    world_size: int,
    versions: Mapping[str, str],
) -> Saved:
    """Make a written checkpoint visible: all on disk first, then the marker, then one rename.

    Args:
        part: from :func:`begin_checkpoint`, with every file in it.
        step: see :class:`Marker`, as for the others.
        epoch: counted from 0.
        monitor: name of the metric.
        mode: ``min`` or ``max``.
        metric: its value; one that is not finite counts as none.
        world_size: processes that trained.
        versions: of Python and packages.
    """
    numbers = [each.marker.number for each in list_checkpoints(part.parents[1])[0]]
    files = sorted(path for path in part.rglob("*") if path.is_file())
    marker = Marker(
        number=max(numbers, default=0) + 1,
        step=step,
        epoch=epoch,
        monitor=monitor,
        mode=mode,
        metric=metric if metric is not None and isfinite(metric) else None,
        world_size=world_size,
        saved=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=dict(versions),
        files={path.relative_to(part).as_posix(): path.stat().st_size for path in files},
    )
    for path in files:
        _sync(path)
    (part / MARKER).write_text(json.dumps(asdict(marker), indent=2, allow_nan=False) + "\n")
    _sync(part / MARKER)
    _sync(part)
    folder, again = part.with_name(part.name[1:]), 1
    while folder.exists():  # a step that is trained again, from an older checkpoint, keeps both until one is dropped
        again += 1
        folder = part.with_name(f"{part.name[1:]}-{again}")
    part.rename(folder)
    _sync(folder.parent)
    return Saved(folder, marker)


def drop_checkpoints(run_dir: Path, keep_last: int, keep_best: int) -> None:
    """Remove whole checkpoints beyond the newest and the best ones; torn ones stay for their owner to look at."""
    saved, _ = list_checkpoints(run_dir)
    kept = {each.path for each in [*saved[-keep_last:], *rank_checkpoints(saved)[:keep_best]]}
    for each in saved:
        if each.path not in kept:
            hidden = each.path.with_name(f".{each.path.name}.old")
            each.path.rename(hidden)  # first, so that nobody finds half of it
            shutil.rmtree(hidden)


def clear_parts(run_dir: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for part in (run_dir / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(part)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
