"""Keys and latents that layers share, on two ranks: as on one, in training and in answering."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import trials
from tests.ranks import on_ranks

SETTINGS: dict[str, Any] = {"fusion": {"layers_per_kv": "all", "kv_latent": 8}, "checkpointing": True}
RECOMPUTED: dict[str, Any] = {"fusion": {"t2v_cache": "recompute"}}


def on_two() -> dict[str, Any]:
    """Train and answer with what each rank has."""
    answers = [trials.answer("fsdp", 2, **settings) for settings in (SETTINGS, RECOMPUTED)]
    return {"trained": trials.train("fsdp", 2, optim=trials.Momentum, **SETTINGS), "answers": answers}


@pytest.mark.filterwarnings("ignore:.*weights_only", "ignore:You defined a `validation_step`")
def test_two_ranks_share_as_one_does(tmp_path: Path) -> None:
    alone = trials.train("one", 1, optim=trials.Momentum, **SETTINGS)
    ranks = on_ranks(2, on_two, folder=tmp_path)
    shared = [name for name in alone["end"] if name.startswith("fusion_sources.")]
    assert len(shared) == 6
    for number, rank in enumerate(ranks):
        for name, weight in alone["end"].items():
            torch.testing.assert_close(rank["trained"]["end"][name], weight, rtol=0, atol=1e-6)
        for settings, found in zip((SETTINGS, RECOMPUTED), rank["answers"], strict=True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(os.environ, "RANK", str(number))
                expected = trials.answer("one", 1, **settings)
            assert found["ids"] == expected["ids"] and found["said"] == expected["said"]
            torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)
    assert all(not torch.equal(alone["start"][name], alone["end"][name]) for name in shared)
