"""The folder a run leaves: whole files only, and which checkpoint in it is meant."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_crosslmm.errors import UserError, nearest

MODES = ("fit", "validate", "test", "predict", "describe")
CHECKPOINTS = "checkpoints"


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

    Args:
        path: a checkpoint (a file, or a folder of shards with ``meta.pt`` in it), or a run folder.
        setting: whose value ``path`` is, for the message.
        names: which checkpoint of a run folder to take, the favourite first.

    Returns:
        The checkpoint's path.

    Raises:
        UserError: there is none.
    """
    if path.is_file() or (path / "meta.pt").is_file():
        return path
    places = [path / CHECKPOINTS / f"{name}.ckpt" for name in names]
    for place in places:
        if place.exists():
            return place
    if not path.exists():
        raise UserError(f"{setting}={path}: there is no such file or folder; give a checkpoint or a run folder")
    raise UserError(f"{setting}={path}: holds no checkpoint; expected {' or '.join(str(place) for place in places)}")


def choose_checkpoint(
    mode: str, run_dir: Path, resume: str | None, init_from: str | None, ckpt: str | None
) -> Path | None:
    """Tell which checkpoint a run starts from, and refuse settings that contradict each other.

    Args:
        mode: ``fit``, ``validate``, ``test``, ``predict`` or ``describe``.
        run_dir: folder of the run.
        resume: checkpoint or run folder whose training goes on; only for ``fit``.
        init_from: weights to start a new training from; only for ``fit``.
        ckpt: checkpoint or run folder to measure; for ``validate``, ``test`` and ``predict``. Without it ``run_dir``'s
            own is taken, the best one before the last one.

    Returns:
        The checkpoint, or None for a training from the start and for a description.

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
    if mode != "fit":
        for name, value in (("resume", resume), ("init_from", init_from)):
            if value is not None:
                raise UserError(f"{name}={value}: only mode=fit reads it, this is mode={mode}; use ckpt=PATH instead")
        return find_checkpoint(Path(ckpt or run_dir), "ckpt" if ckpt else "run_dir", ("best", "last"))
    if ckpt is not None:
        raise UserError(f"ckpt={ckpt}: mode=fit does not read it; use resume=PATH to go on, init_from=PATH for weights")
    if resume is not None:
        if init_from is not None:
            raise UserError(
                f"resume={resume} and init_from={init_from}: a resumed run has its weights; give one of them"
            )
        return find_checkpoint(Path(resume), "resume")
    if (run_dir / CHECKPOINTS / "last.ckpt").exists():
        raise UserError(f"run_dir={run_dir}: holds a training; go on with resume={run_dir}, or choose another folder")
    return None
