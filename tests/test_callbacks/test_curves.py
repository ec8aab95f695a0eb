from pathlib import Path

import matplotlib.image
import pytest

from callbacks.curves import LearningCurve, draw_curves
from lightning_crosslmm.report.curves import read_curves


def test_a_training_leaves_its_curve(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(LearningCurve(train_window=1), limit_val_batches=1).fit(tiny(), batches(), batches(1))
    picture = matplotlib.image.imread(tmp_path / "learning_curve.png")
    assert picture.shape[:2] == (480, 1200) and picture[..., :3].std() > 0.01
    curves = read_curves(tmp_path / "csv")
    assert curves["train/loss"] == [(step, pytest.approx(0.8 ** (2 * step))) for step in (1, 3, 5)]
    assert [value for _, value in curves["val/accuracy"]] == [0.25, 0.75]
    assert "val/loss" not in curves  # infinite


def test_lines_hold_the_points(tmp_path: Path) -> None:
    curves = {
        "train/loss": [(step, float(step)) for step in range(1, 8)],
        "val/loss": [(3, 1.0), (6, 0.5)],
        "val/accuracy": [(3, 0.1)],
    }
    loss, accuracy = draw_curves(curves, 3, tmp_path / "curve.png").axes
    assert [line.get_label() for line in loss.lines] == ["train", "val"]
    assert loss.lines[0].get_xydata().tolist() == [[3, 2], [6, 5], [7, 7]]  # means of three, at the last of them
    assert loss.lines[1].get_xydata().tolist() == [[3, 1.0], [6, 0.5]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[3, 0.1]]]
    assert (loss.get_ylabel(), accuracy.get_ylabel(), loss.get_xlabel()) == ("loss", "accuracy", "optimizer steps")


def test_nothing_logged_draws_nothing(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(LearningCurve(1), log_every_n_steps=50, limit_val_batches=0).fit(tiny(), batches(), batches(1))
    assert not (tmp_path / "learning_curve.png").exists()
