from pathlib import Path

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.report.arms import Arm, choose_baselines, group_runs, varying_settings
from lightning_crosslmm.report.runs import read_runs
from tests.sweeps import named, write_run

GOOD = {"val/accuracy": 0.5}


def sweep(folder: Path, *runs: tuple[str, str, int], prefix: str = "", **settings: object) -> None:
    for pooler, fusion, seed in runs:
        name = prefix + named(pooler, fusion, seed)
        write_run(folder / name, pooler=pooler, fusion=fusion, seed=seed, metrics=GOOD, **settings)


def grid(folder: Path) -> list[Arm]:
    sweep(folder, *((p, f, s) for p in ("tome", "average") for f in ("none", "crosslmm") for s in (0, 1)))
    return group_runs(read_runs(folder))[0]


def test_arms_are_all_that_varies_but_the_seed(tmp_path: Path) -> None:
    arms = grid(tmp_path)
    varying = varying_settings(read_runs(tmp_path))
    assert varying == ["fusion.t2v", "fusion.v2v", "pooler._target_"]  # and neither data.seed nor default_root_dir
    assert [(arm.label, arm.kind, arm.pooler, sorted(arm.by_seed)) for arm in arms] == [
        ("pooler=average, fusion=none", "none", "AveragePooler", [0, 1]),
        ("pooler=average, fusion=crosslmm", "both", "AveragePooler", [0, 1]),
        ("pooler=tome, fusion=none", "none", "ToMe", [0, 1]),
        ("pooler=tome, fusion=crosslmm", "both", "ToMe", [0, 1]),
    ]
    assert len({arm.family for arm in arms}) == 2
    assert {arm.family_label for arm in arms} == {"pooler=average", "pooler=tome"}


def test_words_that_tell_no_arm_from_another_are_left_out(tmp_path: Path) -> None:
    for seed in (0, 1):
        for fusion in ("none", "v2v"):
            cut = {"none": "9,tra", "v2v": "9,train"}[fusion]  # the names of folders end somewhere
            folder = tmp_path / f"experiment=small,fusion={fusion},seed={seed},trainer.max_steps={cut},0123abcd"
            write_run(folder, fusion=fusion, seed=seed, metrics=GOOD)
    assert [arm.label for arm in group_runs(read_runs(tmp_path))[0]] == ["fusion=none", "fusion=v2v"]


def test_where_words_do_not_tell_arms_apart_settings_do(tmp_path: Path) -> None:
    for number, pooler in enumerate(("average", "tome")):
        write_run(tmp_path / str(number), pooler=pooler, metrics=GOOD)
    arms, notes = group_runs(read_runs(tmp_path))
    assert [arm.label for arm in arms] == ["pooler=AveragePooler", "pooler=ToMe"] and notes == []


def test_a_single_arm(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"seed={seed}", seed=seed, metrics=GOOD)
    (arm,), _ = group_runs(read_runs(tmp_path))
    assert (arm.label, sorted(arm.by_seed)) == ("all runs", [0, 1])


def test_runs_of_other_data_or_another_commit_stay_apart_and_are_named(tmp_path: Path) -> None:
    sweep(tmp_path, ("average", "none", 0), ("tome", "none", 0))
    sweep(tmp_path, ("average", "none", 1), provenance={"commit": "deadbeef0"})
    sweep(tmp_path, ("average", "none", 2), provenance={"data_fingerprint": {"val": "cccccccccc"}})
    arms, notes = group_runs(read_runs(tmp_path))
    data = "train:aaaaaaaa val:bbbbbbbb"
    assert {arm.label: sorted(arm.by_seed) for arm in arms} == {
        f"pooler=average [data {data}] [commit c0ffee01]": [0],
        f"pooler=average [data {data}] [commit deadbeef]": [1],
        "pooler=average [data val:cccccccc] [commit c0ffee01]": [2],
        "pooler=tome": [0],
    }
    assert notes == ["pooler=average: its runs are of 3 origins (data, commit), each in a row of its own"]


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    sweep(tmp_path, ("average", "none", 0))
    sweep(tmp_path, ("average", "none", 0), prefix="z/")
    (arm,), notes = group_runs(read_runs(tmp_path))
    assert arm.by_seed[0].name == named("average", "none", 0)
    assert notes == [f"z/{named('average', 'none', 0)} repeats a run of all runs: left out"]


def test_the_baseline_is_the_plainest_arm(tmp_path: Path) -> None:
    arms = grid(tmp_path)
    assert choose_baselines(arms, None) == [arms[0]] * 4
    assert choose_baselines(arms[1:], None) == [arms[2]] * 3
    assert choose_baselines(arms[3:], None) == [arms[3]]


def test_a_baseline_of_ones_own(tmp_path: Path) -> None:
    arms = grid(tmp_path)
    assert choose_baselines(arms, "pooler=tome,fusion=none") == [arms[2]] * 4
    assert choose_baselines(arms, "fusion=none") == [arms[0], arms[0], arms[2], arms[2]]
    assert choose_baselines(arms[1:], "fusion=none") == [arms[2]] * 3
    assert choose_baselines([arms[0], arms[2], arms[3]], "fusion=crosslmm") == [arms[3]] * 3
    with pytest.raises(UserError, match="--baseline fusion=non: no arm has these settings.*; arms are pooler=average"):
        choose_baselines(arms, "fusion=non")
