"""Mixture: several shard sets as one, and what changed when they are no longer the same."""

import json
import shutil

import pytest

from data.mixture import Mixture, changes
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import open_shards


@pytest.fixture
def halves(text_folder, tmp_path):
    """The shards of one folder in two: 18 and 8 samples."""
    for name, numbers in (("a", (0, 1, 2)), ("b", (3, 4))):
        (tmp_path / name).mkdir()
        for number in numbers:
            for ending in ("tar", "index.json"):
                shutil.copy(text_folder / f"shard-{number:06d}.{ending}", tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def keys(mixture, epoch=0, **options):
    return [mixture.entry(ref).key for ref in mixture.order(0, epoch, 2, **options)]


def test_one_set_is_itself(text_folder):
    mixture = Mixture.open(text_folder, "data.train")
    shards = open_shards(text_folder)
    assert mixture.fingerprint == shards.fingerprint and mixture.paths == shards.paths
    assert mixture.num_samples == 26 and mixture.answer_kinds == {"number", "surety"}
    assert keys(mixture, shuffle=False) == [f"s{number:02d}" for number in range(26)]
    assert Mixture.open([{"shards": text_folder, "weight": 3}], "data.train").fingerprint == shards.fingerprint


def test_sets_in_a_row_give_every_sample_once(halves):
    mixture = Mixture.open([str(halves[0]), {"shards": str(halves[1])}], "data.train")
    assert sorted(keys(mixture)) == [f"s{number:02d}" for number in range(26)] != keys(mixture)
    assert keys(mixture, shuffle=False) == sorted(keys(mixture))
    swapped = Mixture.open([str(halves[1]), str(halves[0])], "data.train")
    assert swapped.fingerprint != mixture.fingerprint


def test_what_is_measured_has_no_weights(halves):
    with pytest.raises(UserError, match=r"data.val: gives the weight 2, .* leave weights out"):
        Mixture.open([{"shards": halves[0], "weight": 2}], "data.val", mixes=False)


def test_weights_are_proportions(halves):
    mixture = Mixture.open([{"shards": halves[0], "weight": 1}, {"shards": halves[1], "weight": 1}], "data.train")
    read = keys(mixture)
    assert len(read) == 26 and sum(key >= "s18" for key in read) == 13
    both = read + keys(mixture, epoch=1)
    assert [sum(key == f"s{number:02d}" for key in both) in (3, 4) for number in range(18, 26)] == [True] * 8
    ref = next(ref for ref in mixture.order(0, 0, 2) if mixture.entry(ref).key == "s20")
    assert mixture.path(ref) == halves[1] / "shard-000003.tar"
    assert json.loads(mixture.read(ref, mixture.entry(ref))["json"])["messages"][1]["content"] == "20"
    heavier = Mixture.open([{"shards": halves[0], "weight": 1}, {"shards": halves[1], "weight": 2}], "data.train")
    assert heavier.fingerprint != mixture.fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "data.train: is an empty list"),
        ([{"shards": "A", "weight": 1}, "B"], "data.train: 'B' has no weight and others have"),
        ([{"shards": "A", "weight": 0}, "B"], "the weight of 'A' must be a number above 0, got 0"),
        ([{"shards": "A", "weight": float("nan")}], "got nan"),
        ([{"shards": "A", "wieght": 2}], "'wieght' is not read; did you mean 'weight'?"),
        ([{"weight": 2}], "a set is a text or {shards: ..., weight: ...}, got {'weight': 2}"),
        ([3], "got 3"),
        (["A", "A"], r"shard-000000.tar 2 times; name each shard once"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(halves, spec, message):
    names = {"A": str(halves[0]), "B": str(halves[1])}
    named = [
        {k: names.get(v, v) for k, v in one.items()} if isinstance(one, dict) else names.get(one, one) for one in spec
    ]
    with pytest.raises(UserError) as caught:
        Mixture.open(named, "data.train")
    told = str(caught.value)
    for name, path in names.items():
        told = told.replace(path, name)
    assert message in told


def test_what_changed_is_named(halves, text_folder):
    a, b = map(str, halves)
    then = json.loads(json.dumps(Mixture.open([a, b], "data.train").record()))
    assert changes(then, Mixture.open([b, a], "data.train").record()) == ["the order of its sets or shards"]
    assert changes(then, Mixture.open(a, "data.train").record()) == [f"the set '{b}' was removed"]
    weighted = Mixture.open([{"shards": a, "weight": 1}, {"shards": b, "weight": 2}], "data.train").record()
    assert changes(then, weighted)[1] == f"the weight of '{b}' was None and is 2"
    for ending in ("tar", "index.json"):
        (halves[0] / f"shard-000001.{ending}").unlink()
        for other in (0, 2):
            shutil.copy(text_folder / f"shard-000004.{ending}", halves[0] / f"shard-{other:06d}.{ending}")
    for other in (0, 2):  # an index names its shard
        beside = halves[0] / f"shard-{other:06d}.index.json"
        beside.write_text(beside.read_text().replace("shard-000004", f"shard-{other:06d}"))
    shutil.copy(halves[1] / "shard-000003.tar", halves[1] / "shard-000009.tar")
    told = changes(then, Mixture.open([a, b], "data.train").record(), limit=1)
    assert told == [
        f"in '{a}' 1 shard(s) removed: shard-000001.tar",
        f"in '{a}' 2 shard(s) rewritten: shard-000000.tar, ...",
        f"in '{b}' 1 shard(s) added: shard-000009.tar",
    ]
