import csv
import time
from pathlib import Path

import pytest

from callbacks.throughput import Throughput


def logged(folder: Path, name: str) -> list[float]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


@pytest.mark.parametrize(("read_s", "step_s"), [(0.06, 0.02), (0.02, 0.06)])
def test_wait_share_of_a_slow_loader(make_trainer, tiny, batches, tmp_path: Path, read_s: float, step_s: float) -> None:
    throughput = Throughput()
    trainer = make_trainer(throughput, max_steps=8, limit_val_batches=0)
    trainer.fit(tiny(on_step=lambda: time.sleep(step_s)), batches(on_read=lambda: time.sleep(read_s)), batches(1))
    share = read_s / (read_s + step_s)
    assert throughput.wait_share == pytest.approx(share, abs=0.12)
    windows = logged(tmp_path, "train/wait_share")
    assert len(windows) == 4 and windows == pytest.approx([share] * 4, abs=0.2)
    assert logged(tmp_path, "train/steps_per_s")[-1] == pytest.approx(1 / (read_s + step_s), rel=0.4)
    assert logged(tmp_path, "train/clips_per_s")[-1] == pytest.approx(2 / (read_s + step_s), rel=0.4)


def test_validation_and_saving_are_no_wait(
    make_trainer, tiny, batches, keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowToValidate(tiny):
        def validation_step(self, batch, batch_index) -> None:
            time.sleep(0.2)

    module = SlowToValidate(accuracies=[0.5] * 9, on_step=lambda: time.sleep(0.02))
    throughput, saving = Throughput(), keeping(1)
    write = saving.save
    monkeypatch.setattr(saving, "save", lambda *arguments: (time.sleep(0.2), write(*arguments)))
    make_trainer(throughput, saving, enable_checkpointing=True, limit_val_batches=1).fit(module, batches(), batches(1))
    assert throughput.wait_share is not None and throughput.wait_share < 0.2
    assert throughput.work_s == pytest.approx(5 * 0.02, abs=0.06)  # the first of 6 batches is left out


def test_accumulated_batches_are_one_step(make_trainer, tiny, batches, tmp_path: Path) -> None:
    module = tiny(on_step=lambda: time.sleep(0.02))
    make_trainer(Throughput(), accumulate_grad_batches=2, max_steps=4, limit_val_batches=0).fit(
        module, batches(), batches(1)
    )
    assert len(logged(tmp_path, "train/steps_per_s")) == 2
    clips, steps = (logged(tmp_path, f"train/{name}_per_s")[-1] for name in ("clips", "steps"))
    assert clips == pytest.approx(4 * steps)  # 2 clips a batch, 2 batches a step
