"""The data module of the probe suite: what ``conf/data/suite.yaml`` builds."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.rendered import RenderedDataModule
from data.suite import SPLITS, Suite, write_task
from data.suite_scene import Task
from lightning_crosslmm.errors import UserError, nearest

_DRAWN_BY = ("probe_scene.py", "suite.py", "suite_scene.py", "suite_things.py", "suite_time.py")


class SuiteDataModule(RenderedDataModule):
    """The probe suite: tasks alone or mixed, each rendered into shards on first use.

    Args:
        cache_dir: folders named after each task and the hash of its settings and renderer lie here, one split and
            number of frames in each.
        tasks: which tasks, mixed in equal numbers of clips; names in `difficulty`.
        suite: settings of ``data.suite.Suite``, the same for each task.
        difficulty: the tasks by name, each with its own settings.
        encoder_fit: as for ``RenderedDataModule``.
        stream: every other setting of ``VideoDataModule``; ``predict`` answers the test split.

    Raises:
        UserError: a task that there is not, that stands twice, or that does not fit the numbers of frames.
    """

    def __init__(
        self,
        *,
        cache_dir: str | Path,
        tasks: Sequence[str],
        suite: Mapping[str, Any],
        difficulty: Mapping[str, Task],
        encoder_fit: Mapping[str, Any] | None = None,
        **stream: Any,
    ) -> None:
        known = Suite(**suite)
        if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
            raise UserError(f"data.tasks: must list different tasks of {', '.join(difficulty)}, got {tasks!r}")
        folders: dict[Path, Callable[[Path], None]] = {}
        splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
        for name in tasks:
            if name not in difficulty:
                right = ", ".join(difficulty)
                raise UserError(f"data.tasks: names '{name}'; right are {right}{nearest(str(name), difficulty)}")
            task = difficulty[name]
            known.check(name, task)
            root = Path(cache_dir) / f"suite-{name}-{_fingerprint(name, task, suite)}"
            for split in SPLITS:
                for num_frames in known.frames[split]:
                    path = root / f"{split}-{num_frames}"
                    splits[split].append(path)
                    folders[path] = partial(
                        write_task, name=name, task=task, suite=known, split=split, num_frames=num_frames
                    )
        pictures = known.image_size, known.noise
        super().__init__(folders=folders, pictures=pictures, encoder_fit=encoder_fit, **splits, **stream)


def _fingerprint(name: str, task: Task, suite: Mapping[str, Any]) -> str:
    """Hash what a task's clips depend on, its renderer's own code included; not which lengths there are."""
    facts = {"name": name, "class": f"{type(task)}", "task": vars(task)}
    facts |= {key: value for key, value in suite.items() if key != "frames"}
    drawn_by = b"".join((Path(__file__).parent / file).read_bytes() for file in _DRAWN_BY)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + drawn_by).hexdigest()[:16]
