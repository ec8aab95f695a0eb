"""The cost card of a run: for the mean sample of its validation, with what the pooler was measured to leave."""

import json
from pathlib import Path

import pytest

import train
from tests.probes import small

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def test_a_run_leaves_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small("pooler=prumerge", "encoder.config.global_pool=map")
    train.run(config)
    card = json.loads((Path(config.run_dir) / "cost.json").read_text())
    tokens = card["tokens"]
    assert tokens["pooled_per_frame_min"] <= tokens["pooled_per_frame"] <= tokens["pooled_per_frame_max"]
    assert tokens["frames"] == config.data.sampling.num_frames
    text = (Path(config.run_dir) / "cost.md").read_text()
    assert f"{card['parameters']['total']['total']:,}" in text
