import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lightning_crosslmm.report.arms import group_runs
from lightning_crosslmm.report.estimates import Estimate
from lightning_crosslmm.report.measures import number, share, tasks
from lightning_crosslmm.report.runs import read_runs
from lightning_crosslmm.report.tables import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Table,
    arms_table,
    claim_table,
    undone_table,
    verdict,
)
from tests.sweeps import cost_of, named, write_run


def write_arms(folder: Path, accuracies: Mapping[tuple[str, str], Sequence[float]], **settings: object) -> None:
    for (pooler, fusion), values in accuracies.items():
        for seed, value in enumerate(values):
            place = {"pooler": pooler, "fusion": fusion, "seed": seed}
            write_run(folder / named(*place.values()), **place, metrics={"val/accuracy": value}, **settings)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_arms_against_tasks_and_costs_by_hand(tmp_path: Path) -> None:
    for seed, (plain, fused) in enumerate([(0.20, 0.32), (0.30, 0.40), (0.40, 0.48)]):
        for fusion, value, cost_s in (("none", plain, 0.0105), ("crosslmm", fused, 0.0125)):
            metrics = {"val/accuracy": value, "val/accuracy/needle@8": value / 2, "val/loss": 3.0}
            metrics |= {"train/accuracy": 1.0, "train/seconds": 100.0 + seed, "prefill/time_s": cost_s + seed / 1e3}
            metrics |= {"prefill/peak_bytes": 3 * 2**20, "prefill/samples": 8.0, "prefill/pooled_per_frame": 2.5}
            name = named("average", fusion, seed)
            write_run(tmp_path / name, fusion=fusion, seed=seed, metrics=metrics, cost=cost_of(30, 2.5e9))
    table = arms_table(group_runs(read_runs(tmp_path))[0], None)
    assert table.columns == (
        "#", "arm", "seeds", "val/accuracy", "against baseline", "val/accuracy/needle@8", "tokens per frame",
        "LLM tokens", "prefill, GFLOP", "prefill, ms", "peak memory, MiB", "parameters, M", "trained, M", "training, s",
    )  # fmt: skip
    # 4.3027 * 0.1 / sqrt(3) = 0.248, of 0.32, 0.40, 0.48: 0.199; of the differences 0.12, 0.10, 0.08: 0.0497
    costs = ["2.50", "30", "2.50", "13.5", "3", "1.50", "0.500", "101"]
    assert texts(table) == [
        ["1", "fusion=none", "3", "0.300 ± 0.248", "baseline", "0.150 ± 0.124", *costs[:3], "11.5", *costs[4:]],
        ["2", "fusion=crosslmm", "3", "0.400 ± 0.199", "+0.100 ± 0.050", "0.200 ± 0.099", *costs],
    ]
    assert table.rows[1][3].value == pytest.approx(0.4) and table.rows[0][8].value == 2.5e9
    told = " ".join(table.notes)
    assert "Baseline: fusion=none. Differences are paired" in told and "of 8 samples at once" in told
    assert "no interval" not in told


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    write_arms(tmp_path, {("average", "none"): [0.5], ("average", "v2v"): [0.4]})
    table = arms_table(group_runs(read_runs(tmp_path))[0], None)
    assert [row[2:] for row in texts(table)] == [["1", "0.500", "baseline"], ["1", "0.400", "−0.100"]]
    assert "Where only one seed is done there is no interval." in table.notes


def test_fewer_shared_seeds_than_an_arm_has_are_told(tmp_path: Path) -> None:
    write_arms(tmp_path, {("average", "none"): [0.5, 0.6], ("average", "v2v"): [0.4, 0.6, 0.9]})
    assert texts(arms_table(group_runs(read_runs(tmp_path))[0], None))[1][4] == "−0.050 ± 0.635 (n=2)"


def test_arms_on_other_data_are_not_compared(tmp_path: Path) -> None:
    write_arms(tmp_path, {("average", "none"): [0.5, 0.6]})
    write_arms(tmp_path, {("tome", "none"): [0.5, 0.6]}, provenance={"data_fingerprint": {"val": "d" * 9}})
    assert [row[4] for row in texts(arms_table(group_runs(read_runs(tmp_path))[0], None))] == ["baseline", "other data"]


def test_a_task_that_repeats_another_is_told_once(tmp_path: Path) -> None:
    metrics = {"val/accuracy": 0.5, "val/accuracy/colour": 0.5, "val/circular/colour": 0.1, "test/accuracy": 0.4}
    write_run(tmp_path / "a", metrics=metrics)
    arms, _ = group_runs(read_runs(tmp_path))
    assert tasks(arms) == ["test/accuracy", "val/accuracy", "val/circular/colour"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.1, HOLDS), (-0.01, 0.1, UNDECIDED), (-0.1, -0.01, FAILS), (0.0, 0.1, UNDECIDED)],
)
def test_verdicts(low: float, high: float, said: str) -> None:
    assert verdict(Estimate((low + high) / 2, (high - low) / 2, 3)) == said


def test_nothing_is_decided_by_one_seed() -> None:
    assert verdict(Estimate(0.5, None, 1)) == UNDECIDED and verdict(None) == UNDECIDED


def test_the_claim_step_by_step(tmp_path: Path) -> None:
    four = {"none": [0.1, 0.2, 0.3], "t2v": [0.2, 0.31, 0.4], "v2v": [0.1, 0.2, 0.3], "crosslmm": [0.1, 0.3, 0.2]}
    write_arms(tmp_path, {("average", fusion): values for fusion, values in four.items()})
    write_arms(tmp_path, {("tome", "none"): [0.1, 0.2], ("tome", "crosslmm"): [0.2], ("max", "v2v"): [0.2]})
    table = claim_table(group_runs(read_runs(tmp_path))[0])
    assert [[row[0], row[1], row[3], row[4]] for row in texts(table)] == [
        ["pooler=average", "none < T2V", "3", HOLDS],
        ["pooler=average", "T2V < V2V", "3", FAILS],
        ["pooler=average", "V2V < both", "3", UNDECIDED],
        ["pooler=tome", "none < both", "1", UNDECIDED],
    ]
    half_width = 4.30265 * math.sqrt((0.1 - 0.31 / 3) ** 2 * 2 / 2 + (0.11 - 0.31 / 3) ** 2 / 2) / math.sqrt(3)
    assert texts(table)[0][2] == f"+0.103 ± {half_width:.3f}"
    assert table.notes[1] == "All four are there for 1 of the 3 groups of arms that share all other settings."


def test_runs_that_are_not_in_the_tables_are_listed(tmp_path: Path) -> None:
    write_arms(tmp_path, {("average", "none"): [0.5, 0.6, 0.7], ("tome", "none"): [0.5]})
    write_run(tmp_path / named("tome", "none", 1), pooler="tome", fusion="none", seed=1, failed="no\nroom")
    runs = read_runs(tmp_path)
    assert texts(undone_table(runs, group_runs(runs)[0])) == [
        ["pooler=tome,fusion=none,seed=1", "failed", "no\nroom"],
        ["pooler=tome, seed=2", "missing", "no run folder"],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (7.0, "7"), (1234.0, "1,234"), (1234.5, "1,234"), (12.34, "12.3"), (1.2, "1.20"), (0.01234, "0.0123")],
)
def test_numbers_show_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_show_their_sign_where_they_are_differences() -> None:
    assert share(Estimate(-0.05, 0.01, 2), signed=True) == "−0.050 ± 0.010"
    assert share(Estimate(0.05, None, 1)) == "0.050" and share(None) == "–"
