"""benchmarks/encoder_reuse.py at a tiny size: its shares are those of clips whose frames are known."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.tiny import tiny_batch

SMALL = ("encoder.image_size=32", "encoder.config.depth=1", "data.sampling.num_frames=8")


@pytest.fixture
def encoder_reuse(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[1] / "benchmarks"), *sys.path])
    import encoder_reuse

    return encoder_reuse


def test_shares_times_and_deviations(encoder_reuse: ModuleType, tmp_path: Path) -> None:
    words = encoder_reuse.over_tower(SMALL)
    arms = {arm: encoder_reuse.build(words, more, tmp_path) for arm, more in encoder_reuse.ARMS.items()}
    batch = tiny_batch(["see", 8, "?"])
    level_F = torch.tensor([10, 10, 11, 12, 10, 14, 14, 30], dtype=torch.uint8)
    object.__setattr__(batch, "frames_FCHW", level_F.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous())
    rows = encoder_reuse.compare("levels", [batch], arms, tmp_path, turns=1)
    cells = {row[18:32].strip(): [float(cell) for cell in row[32:].split()] for row in rows}
    shares = {arm: row[1] for arm, row in cells.items()}
    assert {arm: round(share * 8) for arm, share in shares.items()} == {
        "off": 8, "tolerance 0": 5, "tolerance 1": 4, "tolerance 2": 3, "tolerance 4": 2, "cache, cold": 8,
        "cache, warm": 0,
    }  # fmt: skip
    assert cells["off"][3] == 1.0 and cells["off"][4] == cells["cache, warm"][4] == 0.0
    assert cells["tolerance 0"][4] < 1e-4 < cells["tolerance 4"][5] < cells["tolerance 4"][4]


def test_films_that_stand_still(encoder_reuse: ModuleType) -> None:
    films = dict(encoder_reuse.still_clips(4, 32))
    assert set(films) == {"still picture", "still, noise", "four slides"}
    (slides,) = films["four slides"]
    apart = slides.frames_FCHW.float().diff(dim=0).abs().mean(dim=(1, 2, 3))
    assert slides.frames_FCHW.shape == (4, 3, 32, 32) and float(apart.min()) > 10
