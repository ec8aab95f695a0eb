from pathlib import Path

from lightning_crosslmm.report.curves import read_curves


def test_a_resumed_part_replaces_what_was_lost(tmp_path: Path) -> None:
    parts = {
        0: "epoch,step,train/loss,val/loss\n0,1,4,\n0,3,3,\n0,5,2,\n",
        2: "step,train/loss\n3,30\n4,40\n",
        10: "step,lr\n9,1\n",
    }
    for version, text in parts.items():
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(text)
    assert read_curves(tmp_path) == {"train/loss": [(1, 4.0), (3, 30.0), (4, 40.0)], "lr": [(9, 1.0)]}


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text("step,a,b\n1,nan,inf\n2,3,\n")
    assert read_curves(tmp_path) == {"a": [(2, 3.0)]}
