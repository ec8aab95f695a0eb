"""Going on with a run by itself (``resume=auto``): which one a command means, and whether anything is left to do."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_crosslmm.checkpoint_folder import list_checkpoints
from lightning_crosslmm.compose import load_run
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import AUTO

log = logging.getLogger(__name__)

PLACES = ("run_dir", "resume")
"""Settings that say where a run lies and how it began, and nothing about what it trains."""


class OtherRunError(UserError):
    """The folder holds a run of another configuration, or of other data: it is not gone on with, nor overwritten."""


def differences(config: DictConfig, run_dir: Path) -> list[str]:
    """Name the settings in which a run differs from a config, with both values; :data:`PLACES` do not count.

    Raises:
        UserError: the folder has no config that can be read.
    """
    there = load_run(run_dir)
    here = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for name in PLACES:  # others may be made of them
        OmegaConf.update(here, name, there.get(name), merge=False)
    ours, theirs = (_leaves(OmegaConf.to_container(each, resolve=True)) for each in (here, there))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return [f"{name} is {theirs.get(name)} there and {ours.get(name)} here" for name in sorted(names)]


def newest_same_run(config: DictConfig, parent: Path) -> Path | None:
    """Find the run of a configuration whose last checkpoint is the newest; None if no such run has any."""
    found: list[tuple[str, Path]] = []
    for path in sorted(parent.glob("*/config.yaml")):
        saved, _ = list_checkpoints(path.parent)
        try:
            if saved and not differences(config, path.parent):
                found.append((saved[-1].marker.saved, path.parent))
        except UserError:  # somebody's folder, and no run
            continue
    return max(found)[1] if found else None


def words_of_newest(config: DictConfig, words: Sequence[str]) -> list[str]:
    """Say which folder ``resume=auto`` means where the command names none, as a word to add to it.

    Processes that Lightning starts get the words of the first one, which has decided for all of them then.

    Args:
        config: of the command.
        words: the command line without the program.
    """
    names_folder = any(re.match(r"run_dir=|hydra\.|-", word) for word in words)
    if config.mode != "fit" or config.resume != AUTO or names_folder:
        return []
    found = newest_same_run(config, Path(config.run_dir).parent)
    return [as_word("run_dir", found)] if found else []


def words_to_resume(words: Sequence[str], run_dir: Path) -> list[str]:
    """Change the words of a command so that it goes on with the run in a folder."""
    kept = [word for word in words if not re.match(r"(resume|run_dir|init_from|hydra\.\w+\.dir)=", word)]
    return [*kept, as_word("resume", run_dir), as_word("run_dir", run_dir)]


def as_word(key: str, path: Path) -> str:
    """Write a setting whose value is any path, quoted where Hydra's grammar needs it."""
    text = str(path)
    return f"{key}={text}" if re.fullmatch(r"[\w./-]+", text) else f"{key}='" + text.replace("'", "\\'") + "'"


def is_done(config: DictConfig) -> bool:
    """Say what ``resume=auto`` found in the run folder, and tell whether that training is at its end.

    Raises:
        OtherRunError: a run of another configuration lies there.
    """
    run_dir, say = Path(config.run_dir), log.info if is_first_process() else log.debug
    saved, _ = list_checkpoints(run_dir)
    if not saved:
        say("resume=auto: no run of this configuration has a checkpoint, so a new one starts in %s", run_dir)
        return False
    if different := differences(config, run_dir):
        raise OtherRunError(
            f"run_dir={run_dir}: holds a run of another configuration ({'; '.join(different[:3])}); start another "
            "one in another run_dir (a sweep: hydra.sweep.dir), or go on with this one all the same with "
            f"resume={run_dir}"
        )
    step = saved[-1].marker.step
    done = step >= config.trainer.max_steps and has_ended(run_dir)
    say("resume=auto: %s stands at step %d: %s", run_dir, step, "done, nothing to do" if done else "going on")
    return done


def has_ended(run_dir: Path) -> bool:
    """Whether a run wrote its final numbers; one that keeps no record is taken by its checkpoint."""
    record = _record(run_dir)
    return bool(record.get("ended", not record)) and not record.get("error")


def refuse_other_data(run_dir: Path, fingerprint: Mapping[str, str]) -> None:
    """Refuse to take a run for done whose data were not those that are there now.

    Args:
        run_dir: of a run that is done; one that keeps no record is taken by its configuration.
        fingerprint: of the data of each split, as they are now.

    Raises:
        OtherRunError: a split differs.
    """
    there = _record(run_dir).get("data_fingerprint") or {}
    changed = [
        f"{split} was {there[split]:.12}, is {now:.12}"
        for split, now in fingerprint.items()
        if there.get(split, now) != now
    ]
    if changed:
        raise OtherRunError(
            f"run_dir={run_dir}: holds a run on other data ({'; '.join(changed)}); put the data back, or start another "
            "run in another run_dir (a sweep: hydra.sweep.dir)"
        )


def is_first_process() -> bool:
    """Tell so before Lightning knows, by what launchers tell their processes."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _record(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {
        name: value for key, child in node.items() for name, value in _leaves(child, f"{path}.{key}".strip(".")).items()
    }
