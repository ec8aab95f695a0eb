"""Tells transformers' Auto classes about us when they come in, and costs nothing before.

``import lightning_crosslmm`` must stay light, and ``AutoModelForImageTextToText.from_pretrained(FOLDER)`` must work
after it, whichever of the two packages was imported first. So a finder waits for the modules of transformers that hold
the Auto classes and imports ours right after them; where they are there already, ours come at once.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_OURS = {
    "transformers.models.auto.configuration_auto": "lightning_crosslmm.hf.configuration",
    "transformers.models.auto.processing_auto": "lightning_crosslmm.hf.processing",
}
"""Ours register themselves when they are imported. The model comes with the first configuration that is made."""


class _Announcer:
    """Finds what the others find, and adds a step after it has been run."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """Give the ordinary spec of a module that we wait for, and nothing for the rest."""
        if name not in _OURS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            _follow(spec, _OURS[name])
        return spec


def _follow(spec: ModuleSpec, ours: str) -> None:
    loader: Any = spec.loader
    run = loader.exec_module

    def run_both(module: ModuleType) -> None:
        run(module)
        importlib.import_module(ours)

    loader.exec_module = run_both


def announce() -> None:
    """Let the Auto classes of transformers know about us, now or as soon as they are imported."""
    for theirs, ours in _OURS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    if not any(isinstance(finder, _Announcer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Announcer())
