"""Random numbers that a resumed run draws as the uninterrupted one would have."""

import hashlib
import logging
import random
from typing import Any

import lightning
import numpy as np
import torch

from callbacks.agreement import Agreement

log = logging.getLogger(__name__)


class RandomState(lightning.Callback):
    """Save the random state of every process, and go on from it.

    A fresh run, and one that is resumed by another number of processes, starts each process's streams from
    ``(seed, step, rank)``: where the numbers cannot be the same, they are at least independent and repeatable.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._agreement = Agreement()
        self._device = torch.device("cpu")
        self._restored: list[dict[str, Any]] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the restored state, or derive one."""
        self._device = trainer.strategy.root_device
        states, self._restored = self._restored, None
        if states is not None and len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank], self._device)
            return
        if states is not None and trainer.is_global_zero:
            log.warning(
                "random state: saved by %d processes, resumed by %d: it starts anew from (seed %d, step %d, rank)",
                len(states), trainer.world_size, self.seed, trainer.global_step,
            )  # fmt: skip
        start_random_state(self.seed, trainer.global_step, trainer.global_rank)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Hold on to the state: a validation that is cut short is done again from its beginning."""
        self._before_validation = random_state(self._device)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let go of it."""
        self._before_validation = None

    def state_dict(self) -> dict[str, Any]:
        """Collect the states of all processes; all of them must ask."""
        return {"states": self._agreement.gather(self._before_validation or random_state(self._device))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until training starts, because setting up draws numbers, too."""
        self._restored = state_dict["states"]


def random_state(device: torch.device) -> dict[str, Any]:
    """Read the state of Python's, numpy's and torch's generators, on the CPU and on a GPU of its own.

    Returns:
        Tensors and plain values, which ``torch.load(weights_only=True)`` reads.
    """
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937", "numpy's global generator has no other kind"
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "keys": torch.tensor(keys.astype(np.int64)), "place": int(place), "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }  # fmt: skip


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put all generators where :func:`random_state` found them; a GPU's only where both have one."""
    python, own = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = own["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, own["place"], own["has_gauss"], own["cached"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def start_random_state(seed: int, step: int, rank: int) -> None:
    """Start all generators from three integers, so that other steps and ranks have unrelated streams."""
    word = int.from_bytes(hashlib.sha256(repr((seed, step, rank)).encode()).digest()[:8])
    random.seed(word)
    np.random.seed(word % 2**32)
    torch.manual_seed(word)  # of GPUs, too
