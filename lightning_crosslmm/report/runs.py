"""The runs below a folder: what each was, how it ended and what it measured."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_crosslmm.compose import load_run
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.report.curves import Curve, read_curves

DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"
WORD = re.compile(r"([\w.@+~/]+)=(.*)", re.DOTALL)
BOOKKEEPING = {"run_dir", "resume", "ckpt", "mode", "sweep_dir"}
"""Settings that say where a run lies or how it went on, and nothing about what it trains."""


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        name: of the folder, from the sweep's on.
        status: ``done``, ``failed`` or ``unfinished``.
        message: why it is not done.
        seed: None where it failed before it had a configuration that names one.
        words: the settings that its folder's name tells, or its command.
        settings: every leaf of its configuration, as text; where it lies left out.
        numbers: final metrics by name, and the numbers of ``cost.json`` as ``cost/...``.
        curves: metrics over optimizer steps.
        data: fingerprints of its data, shortened.
        commit: shortened, with ``+`` where the tree differed from it.
        command: that made it.
    """

    name: str
    status: str
    message: str
    seed: int | None
    words: dict[str, str]
    settings: dict[str, str]
    numbers: dict[str, float]
    curves: dict[str, Curve]
    data: str
    commit: str
    command: str


def read_runs(sweep_dir: Path) -> list[Run]:
    """Read every run folder below a folder, in the order of their names.

    A folder that lies in a run's own is part of that run.

    Raises:
        UserError: there is no such folder, no run in it, or a file that cannot be read.
    """
    if not sweep_dir.is_dir():
        raise UserError(f"{sweep_dir}: there is no such folder; give one with run folders in it")
    marks = ("config.yaml", "provenance.json", "failed.json")
    folders = sorted({path.parent for mark in marks for path in sweep_dir.rglob(mark)})
    tops = [folder for folder in folders if not any(other in folder.parents for other in folders)]
    if not tops:
        raise UserError(f"{sweep_dir}: holds no run; a run's folder has a {marks[0]} and a {marks[1]}")
    return [read_run(folder, folder.relative_to(sweep_dir).as_posix()) for folder in tops]


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder, whatever of it there is.

    Args:
        folder: the run's.
        name: to call it by.
    """
    provenance, failed = _json(folder / "provenance.json"), _json(folder / "failed.json")
    settings = _settings(folder) if (folder / "config.yaml").is_file() else {}
    command = [str(word) for word in provenance.get("command") or []]
    named = re.sub(r",[0-9a-f]{8}$", "", folder.resolve().name)  # a sweep marks names that it had to change
    words = _words(re.split(r",(?=[\w.@+~/]+=)", named)) or _words_of(command)
    seed = settings.get("seed", words.get("seed", ""))
    status, message = _ending(folder, provenance, failed)
    data, commit = provenance.get("data_fingerprint") or {}, provenance.get("commit") or ""
    changed = "+" if provenance.get("uncommitted_changes") else ""
    return Run(
        name=name,
        status=status,
        message=message,
        seed=int(seed) if re.fullmatch(r"-?\d+", seed) else None,
        words=words,
        settings=settings,
        numbers=_numbers(folder),
        curves=read_curves(folder / "csv"),
        data=" ".join(f"{split}:{print_[:8]}" for split, print_ in sorted(data.items())),
        commit=commit[:8] + changed,
        command=shlex.join(["python", Path(command[0]).name, *command[1:]]) if command else "",
    )


def _ending(folder: Path, provenance: Mapping[str, Any], failed: Mapping[str, Any]) -> tuple[str, str]:
    if failed:
        return FAILED, str(failed.get("message", ""))
    error = provenance.get("error")
    if error:
        return (UNFINISHED if str(error).startswith("Stopped") else FAILED), str(error)
    if provenance.get("ended") and (folder / "metrics.json").is_file():
        return DONE, ""
    steps = [curve[-1][0] + 1 for curve in read_curves(folder / "csv").values()]
    reached = f"at step {max(steps)}" if steps else "before its first logged step"
    return UNFINISHED, f"{reached}; no end is recorded: it runs still, or was killed"


def _numbers(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("metrics_validate.json", "metrics_test.json", "metrics.json"):  # of equal names the training's count
        found |= _finite(_json(folder / name))
    return found | _finite(_json(folder / "cost.json"), "cost/")


def _finite(node: Any, name: str = "") -> dict[str, float]:
    """Every finite number below, by its path."""
    if isinstance(node, Mapping):
        return {
            path: value
            for key, child in node.items()
            for path, value in _finite(child, f"{name}{key}" + ("/" if isinstance(child, Mapping) else "")).items()
        }
    is_number = isinstance(node, int | float) and not isinstance(node, bool)
    return {name: float(node)} if is_number and math.isfinite(node) else {}


def _settings(folder: Path) -> dict[str, str]:
    config = load_run(folder)
    here = str(config.get("run_dir") or "")
    leaves = {key: value for key, value in _leaves(config) if key.partition(".")[0] not in BOOKKEEPING}
    return {key: value.replace(here, "RUN_DIR") if here else value for key, value in leaves.items()}


def _leaves(node: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(node, Mapping) and node:
        return [leaf for key, child in node.items() for leaf in _leaves(child, f"{path}.{key}".strip("."))]
    plain = {None: "null", True: "true", False: "false"} if node is None or isinstance(node, bool) else {}
    return [(path, plain.get(node) or str(node))]


def _words(parts: list[str]) -> dict[str, str]:
    found = [WORD.fullmatch(part) for part in parts]
    return {match[1]: match[2] for match in found if match} if all(found) else {}


def _words_of(command: list[str]) -> dict[str, str]:
    """Settings of a command; those of a sweep are of many runs and tell nothing about one."""
    if {"-m", "--multirun"} & set(command):
        return {}
    own = [word for word in command[1:] if WORD.fullmatch(word) and not word.startswith("hydra.")]
    return {key: value for key, value in _words(own).items() if key not in BOOKKEEPING}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be an object with names, found {type(content).__name__}")
    return content
