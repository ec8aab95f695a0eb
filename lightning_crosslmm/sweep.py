"""A sweep: one process works at each run, a run that fails stops no other, and at the end it is told what came of all.

Hydra's own sweeper and launcher go through the runs; :func:`attempt` is what they do of each, :class:`SweepEnd` what
follows. Any number of processes may go through one sweep folder: each claims its runs by a lock that the system frees
when the holder ends, however it ends.
"""

import errno
import fcntl
import gc
import hashlib
import json
import logging
import re
import shlex
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import AUTO, has_checkpoints, replacing
from lightning_crosslmm.same_run import OtherRunError, as_word, has_ended
from lightning_crosslmm.stop_signals import RESUME_ME, STOP, Stopped

log = logging.getLogger(__name__)

_IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
LOCK, FAILURE = ".lock", "failed.json"
_LONGEST_NAME = 160  # bytes; most file systems take 255, and checkpoints add nothing to a folder's own name


class Outcome(StrEnum):
    """What came of a run of a sweep."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    HELD = "held"
    STOPPED = "stopped"


_MEANING = {
    Outcome.DONE: "by this command",
    Outcome.SKIPPED: "done before",
    Outcome.FAILED: "see failed.json in the run's folder",
    Outcome.HELD: "another process works at it",
    Outcome.STOPPED: "goes on with the same command",
}


@dataclass(frozen=True)
class Ended:
    """How a run of a sweep ended.

    Args:
        outcome: in a word.
        message: why, where it is not done.
        ends_sweep: whether the process was asked to stop meanwhile.
    """

    outcome: Outcome
    message: str = ""
    ends_sweep: bool = False


def folder_name(overrides: Sequence[str]) -> str:
    """Name a run's folder after its settings, ``fusion=none,pooler=tome,seed=1``; the resolver of ``conf/train.yaml``.

    Sorted, arms first, so that the order of the words does not matter. Characters that folders may not have, or a shell
    would mind, become ``-``; a name that was changed or cut ends in a hash of the settings, so that different ones have
    different folders. ``mode`` and ``resume`` name none: a training's folder is where it is measured, too.
    """
    naming = [word for word in overrides if not re.match(r"(mode|resume)=", word)]
    name = ",".join(sorted(naming, key=lambda word: ("." in word.partition("=")[0], word)))
    plain = re.sub(r"[^\w.,=+~\[\]-]+", "-", name)
    if plain == name and len(plain.encode()) <= _LONGEST_NAME:
        return plain or "default"
    short = plain.encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"{short},{hashlib.sha256(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def check_sweep(jobs: Sequence[DictConfig]) -> None:
    """Refuse what no run of a sweep can do, before the first one begins.

    Raises:
        UserError: a trainer of several processes, or a checkpoint for all runs to go on with.
    """
    for job in jobs:
        if job.trainer.get("strategy") not in ("auto", None):
            raise UserError("trainer.strategy: -m runs jobs of one process; start each distributed run by itself")
        if job.resume not in (AUTO, None):
            raise UserError(
                f"resume={job.resume}: the runs of a sweep go on by themselves, each from its own folder under "
                "hydra.sweep.dir; leave it out, or use init_from for weights to start from"
            )


def describe_error(error: BaseException) -> str:
    """Say an error in one line, without the traceback that a loader's worker puts before it."""
    if isinstance(error, UserError):
        return " ".join(str(error).rpartition("UserError: ")[2].split())
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def claim(run_dir: Path) -> Iterator[bool]:
    """Hold a run's folder, so that no other process of a sweep works at it.

    Yields:
        Whether it is held; not if another process holds it.

    Raises:
        UserError: the file system has no locks.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: is a file; sweep in another folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{run_dir / LOCK}: cannot be locked ({error.strerror}); sweep in another folder"
                ) from error
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a worker that got the file by fork would hold it on


def attempt(config: DictConfig, run: Callable[[DictConfig], bool]) -> Ended:
    """Do a run of a sweep, or find that it is done, held, or fails; raises nothing but what ends the process.

    A failure is written to ``failed.json`` in the run's folder (modes other than fit: ``failed_<mode>.json``), which
    goes away once the run succeeds.

    Args:
        config: of the run, with its folder; a training goes on where its folder has a checkpoint.
        run: does it; tells whether there was anything to do.
    """
    if config.mode == "fit":
        config.resume = AUTO
    listens = config.mode == "fit" and config.callbacks.get("preemption")
    if listens:
        STOP.listen()
        if STOP.received:  # while no run trained
            return Ended(Outcome.STOPPED, f"{STOP.received.name} before it began", ends_sweep=True)
    try:
        with claim(Path(config.run_dir)) as is_held:
            ended = _attempt(config, run) if is_held else Ended(Outcome.HELD)
    except UserError as error:
        ended = Ended(Outcome.FAILED, describe_error(error))
    gc.collect()  # a model and its trainer know each other, and the next run needs the memory
    if listens:
        ended = replace(ended, ends_sweep=ended.ends_sweep or STOP.received is not None)
        STOP.listen()  # the run has given the signals back, and the next one is composed first
    return ended


def _attempt(config: DictConfig, run: Callable[[DictConfig], bool]) -> Ended:
    failure = Path(config.run_dir) / (FAILURE if config.mode == "fit" else f"failed_{config.mode}.json")
    try:
        outcome = Outcome.DONE if run(config) else Outcome.SKIPPED
    except Stopped as stop:
        return Ended(Outcome.STOPPED, str(stop), ends_sweep=True)
    except OtherRunError as error:  # whose folder this is has not failed
        return Ended(Outcome.FAILED, describe_error(error))
    except Exception as error:
        record = {
            "message": describe_error(error),
            "traceback": traceback.format_exc(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with replacing(failure) as part:
            part.write_text(json.dumps(record, indent=2) + "\n")
        return Ended(Outcome.FAILED, record["message"])
    failure.unlink(missing_ok=True)
    return Ended(outcome)


class SweepEnd(Callback):
    """Tell each failure as it happens, what came of all runs at the end, write the report, and choose the exit code.

    It is 1 where a run failed, 75 where the sweep or one of its runs was asked to stop, and 0 else, whatever becomes of
    the report. A launcher that runs jobs elsewhere is told what came of them by their folders.

    Args:
        report: whether to write a report about the sweep's folder at the end.
    """

    def __init__(self, report: bool) -> None:
        self.report = report
        self._ended: dict[str, Ended] = {}

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note how a run ended, and stop where the process was asked to."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        ended, sweep_dir = job_return.return_value, Path(config.hydra.sweep.dir)
        name = Path(config.hydra.runtime.output_dir).name
        self._ended[name] = ended
        if ended.outcome is Outcome.FAILED:
            sys.stderr.write(f"failed: {name}: {ended.message}\n")
        elif ended.outcome in (Outcome.HELD, Outcome.SKIPPED):
            log.info("%s: %s, %s", name, ended.outcome, _MEANING[ended.outcome])
        if ended.ends_sweep and config.hydra.launcher._target_ == _IN_THIS_PROCESS:
            self._stop(sweep_dir, ended.message or name)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sum up and write the report."""
        STOP.forget()
        sweep_dir = Path(config.hydra.sweep.dir)
        ended = self._ended or read_sweep(sweep_dir)
        sys.stdout.write(summary(sweep_dir, ended))
        if self.report:
            self._write_report(sweep_dir)
        outcomes = {each.outcome for each in ended.values()}
        if outcomes & {Outcome.FAILED, Outcome.STOPPED}:
            raise SystemExit(1 if Outcome.FAILED in outcomes else RESUME_ME)

    def _stop(self, sweep_dir: Path, reason: str) -> NoReturn:
        STOP.ignore()
        sys.stdout.write(summary(sweep_dir, self._ended))
        words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
        command = shlex.join([sys.argv[0], *words, as_word("hydra.sweep.dir", sweep_dir)])
        sys.stderr.write(f"stopped: {reason}; go on with: python {command}\n")
        raise SystemExit(RESUME_ME)

    def _write_report(self, sweep_dir: Path) -> None:
        try:
            from lightning_crosslmm.report import write_report  # here, because it draws

            paths = write_report(sweep_dir)
        except Exception as error:  # the runs are done all the same
            sys.stderr.write(f"no report of {sweep_dir}: {describe_error(error)}\n")
        else:
            sys.stdout.write("".join(f"report: {folder}\n" for folder in sorted({path.parent for path in paths})))


def read_sweep(sweep_dir: Path) -> dict[str, Ended]:
    """Tell from the folders of a sweep what came of its runs."""
    found = {}
    for lock in sorted(sweep_dir.glob(f"*/{LOCK}")):
        failure = lock.with_name(FAILURE)
        if failure.is_file():
            found[lock.parent.name] = Ended(Outcome.FAILED, json.loads(failure.read_text())["message"])
        else:
            is_done = has_checkpoints(lock.parent) and has_ended(lock.parent)
            found[lock.parent.name] = Ended(Outcome.DONE if is_done else Outcome.STOPPED)
    return found


def summary(sweep_dir: Path, ended: Mapping[str, Ended]) -> str:
    """Count the runs of a sweep by outcome, and name those that are not done."""
    names = defaultdict(list)
    for name, each in ended.items():
        names[each.outcome].append(f"{name}: {each.message}" if each.message else name)
    lines = [f"sweep {sweep_dir}: {len(ended)} runs"]
    for outcome, meaning in _MEANING.items():
        lines.append(f"{outcome:>9} {len(names[outcome]):3}  {meaning if names[outcome] else ''}".rstrip())
        if outcome not in (Outcome.DONE, Outcome.SKIPPED):
            lines.extend(f"{'':15}{name}" for name in names[outcome])
    return "\n".join(lines) + "\n"
