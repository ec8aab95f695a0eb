import json
from pathlib import Path

import pytest

from callbacks.predictions import PredictionWriter


def test_one_line_for_each_answer_in_order(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(PredictionWriter()).predict(tiny(), batches(3), return_predictions=False)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == [
        f"clip{batch}-{sample}" for batch in range(3) for sample in (0, 1)
    ]
    assert all('"grün"' in line for line in lines)
    assert not list(tmp_path.glob("*.rank*"))


def test_a_broken_run_makes_no_whole_file_and_keeps_the_part(make_trainer, tiny, batches, tmp_path: Path) -> None:
    class FailsLater(tiny):
        def predict_step(self, batch, batch_index):
            if batch_index == 2:
                raise FloatingPointError
            return super().predict_step(batch, batch_index)

    with pytest.raises(FloatingPointError):
        make_trainer(PredictionWriter()).predict(FailsLater(), batches(3), return_predictions=False)
    assert not (tmp_path / "predictions.jsonl").exists()
    assert len((tmp_path / "predictions.jsonl.rank0").read_text().splitlines()) == 4
