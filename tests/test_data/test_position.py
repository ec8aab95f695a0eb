"""Position: a small record that is checked when it is read, and compared before it is believed."""

import pytest

from data.position import Place, Position
from lightning_crosslmm.errors import UserError

HERE = Position(1, 2, 3, 5, 7, 8, "f", "window_shards=8, pack_tokens=null")


def test_it_comes_back_from_its_record_and_moves():
    assert Position.from_dict(HERE.to_dict()) == HERE and HERE.place == Place(5, 7)
    assert HERE.at(4, Place(6, 0)).to_dict() == HERE.to_dict() | {"batch": 4, "chunk": 6, "row": 0}
    assert HERE.next_epoch().to_dict() == HERE.to_dict() | {"epoch": 3, "batch": 0, "chunk": 0, "row": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epoch": -1}, "epoch"), ({"batch": 1.0}, "batch"), ({"fingerprint": 5}, "fingerprint"), ({"version": 1}, "is 1"),
     ({"more": 1}, "more"), ({"seed": True}, "seed"), ({"row": -1}, "row")],
)  # fmt: skip
def test_a_wrong_record_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Position.from_dict(HERE.to_dict() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "data.seed: then 1, now 2"),
        ({"global_batch": 4}, "data.global_batch_size: then 8, now 4"),
        ({"plan": "window_shards=8, pack_tokens=64"}, "data.pack_tokens: then null, now 64"),
        ({"plan": HERE.plan + ", bytes_per_token=2"}, "data.bytes_per_token: then None, now 2"),
        ({"batch": 9, "row": 1}, ""),
    ],
)
def test_the_setting_that_differs_is_named(change, message):
    assert HERE.difference(Position(**HERE.to_dict() | change)) == message
