"""The needle's map: what is right, at which length and depth, as a table and a picture."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.needle_map import Cell, NeedleMap, draw_maps, write_table
from lightning_crosslmm.errors import UserError
from tests.test_callbacks.conftest import TinyModule, loader, make_batch

RIGHT = {("needle@8", 0.0): True, ("needle@8", 1.0): False, ("needle@16", 0.5): True, ("patch@8", 0.49): False}


class Told(TinyModule):
    """Answers as RIGHT says."""

    def validation_step(self, batch, batch_index):
        told = zip(batch.answer_kinds, batch.answer_facts, strict=True)
        right = [RIGHT.get((kind, facts.get("depth")), True) for kind, facts in told]
        return super().validation_step(batch, batch_index) or {"right_Z": torch.tensor(right)}

    test_step = validation_step


def batch_of(*answers):
    batch = make_batch(0, len(answers))
    kinds, facts = zip(*[(kind, {} if depth is None else {"depth": depth}) for kind, depth in answers], strict=True)
    return replace(batch, answer_kinds=kinds, answer_facts=facts)


def rows(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "needle.csv").open(newline="") as lines:
        return [tuple(row.values()) for row in csv.DictReader(lines)]


BATCHES = [
    batch_of(("needle@8", 0.0), ("needle@8", 1.0), ("count@8", None)),
    batch_of(("needle@16", 0.5), ("patch@8", 0.49), ("needle", 0.5), ("needle@8", 0.0)),
]


def test_answers_are_counted_by_task_length_and_depth(make_trainer, tmp_path):
    trainer = make_trainer(NeedleMap(depth_bins=2))
    for _ in range(2):  # the second validation begins anew
        trainer.validate(Told((0.5, 0.5)), DataLoader(BATCHES, batch_size=None))
        assert rows(tmp_path) == [
            ("needle", "8", "0.0", "0.5", "2", "1.0"),
            ("needle", "8", "0.5", "1.0", "1", "0.0"),
            ("needle", "16", "0.5", "1.0", "1", "1.0"),
            ("patch", "8", "0.0", "0.5", "1", "0.0"),
        ]
    with Image.open(tmp_path / "needle.png") as picture:
        assert picture.size[0] > 300
    (tmp_path / "needle.csv").unlink()
    trainer.test(Told(), DataLoader(BATCHES, batch_size=None))
    assert len(rows(tmp_path)) == 4


def test_data_without_depths_leave_nothing(make_trainer, tmp_path):
    make_trainer(NeedleMap(depth_bins=2)).validate(TinyModule(), loader(2))
    assert not list(tmp_path.glob("needle.*"))


def test_a_map_shows_every_cell_that_was_counted(tmp_path):
    cells = {Cell("needle", 8, 0): (1, 2), Cell("needle", 32, 2): (3, 3), Cell("patch", 8, 1): (0, 5)}
    write_table(cells, 3, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[1] == "needle,8,0.0,0.3333,2,0.5"
    figure = draw_maps(cells, 3, tmp_path / "a.png")
    needle, patch = figure.axes[:2]
    assert (needle.get_title(), patch.get_title()) == ("needle", "patch")
    shown = {(text.get_position(), text.get_text()) for text in needle.texts}
    assert shown == {((0, 0), "0.50"), ((1, 2), "1.00")}
    assert [tick.get_text() for tick in needle.get_xticklabels()] == ["8", "32"]


@pytest.mark.parametrize("bins", [0, -1, 2.0, True])
def test_bins_that_cannot_be(bins):
    with pytest.raises(UserError, match="callbacks.needle_map.depth_bins: must be a whole number, 1 or more"):
        NeedleMap(bins)
