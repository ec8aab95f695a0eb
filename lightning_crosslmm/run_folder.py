"""The folder a run leaves: whole files only, and which checkpoint in it is meant."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_crosslmm.checkpoint_folder import (
    CHECKPOINTS,
    MARKER,
    SHARDED,
    WHOLE,
    list_checkpoints,
    rank_checkpoints,
    read_checkpoint,
)
from lightning_crosslmm.errors import UserError, nearest

log = logging.getLogger(__name__)

MODES = ("fit", "validate", "test", "predict", "calibrate", "describe")
AUTO = "auto"
"""For ``resume``: go on if there is something to go on from."""

DATA_RECORD = "data.json"
"""The shards that a run trains on, so that a later one can say what changed."""

EXPORTED = ("model.safetensors", "model.safetensors.index.json")
"""What an exported folder has one of: all weights, or the list of the files they lie in."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that others see the old one or the whole new one, never half of it.

    Args:
        path: the file to write; its folder is made if need be.

    Yields:
        Where to write. It takes the place of ``path`` when the block ends well, and goes away when it does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the ending, by which writers choose a format
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def find_checkpoint(path: Path, setting: str, names: tuple[str, ...] = ("last",)) -> Path:
    """Find the checkpoint a setting names.

    In a run folder a torn checkpoint is passed over for the best or newest whole one, and one line of log says so.

    Args:
        path: a checkpoint's folder, a file, a run folder, or a folder that ``crosslmm export`` wrote.
        setting: whose value ``path`` is, for the message.
        names: which checkpoint of a run folder to take, ``best`` or ``last``, the favourite first.

    Returns:
        What to load: a file, or the folder of a sharded checkpoint.

    Raises:
        UserError: there is none, or none that is whole.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{setting}={path}: there is no such file or folder; give a checkpoint or a run folder")
    if any((path / name).exists() for name in (MARKER, WHOLE, SHARDED)):
        return read_checkpoint(path).loadable
    exported = [path / name for name in EXPORTED if (path / name).is_file()]
    if exported:
        return exported[0]
    saved, torn = list_checkpoints(path)
    ranked = rank_checkpoints(saved)
    chosen = {"last": saved[-1] if saved else None, "best": ranked[0] if ranked else None}
    for name in names:
        if found := chosen[name]:
            if torn:
                log.warning("%s; taking %s, which is whole", "; ".join(torn), found.path.name)
            return found.loadable
    if torn:
        raise UserError(f"{setting}={path}: holds no whole checkpoint: {'; '.join(torn)}")
    lacks = "no checkpoint" if not saved else "no checkpoint with a metric"
    raise UserError(f"{setting}={path}: holds {lacks}; expected {path / CHECKPOINTS}/step-*/{MARKER}")


def choose_checkpoint(
    mode: str, run_dir: Path, resume: str | None, init_from: str | None, ckpt: str | None
) -> Path | None:
    """Tell which checkpoint a run starts from, and refuse settings that contradict each other.

    Args:
        mode: ``fit``, ``validate``, ``test``, ``predict``, ``calibrate`` or ``describe``.
        run_dir: folder of the run.
        resume: checkpoint or run folder whose training goes on; only for ``fit``. ``auto`` goes on with ``run_dir``'s
            own if it has a checkpoint, and starts anew if not; ``init_from`` is for the start then.
        init_from: weights to start a new training from, or to measure as they are.
        ckpt: checkpoint or run folder to measure; for ``validate``, ``test`` and ``predict``. Without it ``run_dir``'s
            own is taken, the best one before the last one.

    Returns:
        The checkpoint, or None for a training from the start, for `init_from`'s weights, and for a description.

    Raises:
        UserError: an unknown mode, settings of another mode, a missing checkpoint, or a folder that holds a training
            which would be overwritten.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode}: must be one of {', '.join(MODES)}{nearest(mode, MODES)}")
    if mode == "describe":
        for name, value in (("resume", resume), ("init_from", init_from), ("ckpt", ckpt)):
            if value is not None:
                raise UserError(f"{name}={value}: mode=describe reads no weights; leave it out")
        return None
    if mode == "calibrate":
        for name, value in (("resume", resume), ("ckpt", ckpt)):
            if value is not None:
                raise UserError(f"{name}={value}: mode=calibrate does not read it; use init_from=PATH for weights")
        return None
    if mode != "fit":
        if resume is not None:
            raise UserError(f"resume={resume}: only mode=fit reads it, this is mode={mode}; use ckpt=PATH instead")
        if init_from is not None:
            if ckpt is not None:
                raise UserError(
                    f"ckpt={ckpt} and init_from={init_from}: there is one model to measure; give one of them"
                )
            return None
        return find_checkpoint(Path(ckpt or run_dir), "ckpt" if ckpt else "run_dir", ("best", "last"))
    if ckpt is not None:
        raise UserError(f"ckpt={ckpt}: mode=fit does not read it; use resume=PATH to go on, init_from=PATH for weights")
    if resume == AUTO:
        return find_checkpoint(run_dir, "run_dir") if has_checkpoints(run_dir) else None
    if resume is not None:
        if init_from is not None:
            raise UserError(
                f"resume={resume} and init_from={init_from}: a resumed run has its weights; give one of them"
            )
        found = find_checkpoint(Path(resume), "resume")
        if found.name.endswith((".safetensors", ".json")):
            raise UserError(f"resume={resume}: holds weights and nothing to go on from; use init_from={resume}")
        return found
    if has_checkpoints(run_dir):
        raise UserError(f"run_dir={run_dir}: holds a training; go on with resume={run_dir}, or choose another folder")
    return None


def has_checkpoints(run_dir: Path) -> bool:
    """Tell whether a folder holds a training, be its checkpoints whole or torn."""
    return any(list_checkpoints(run_dir))
