"""benchmarks/prefill.py, attention.py, train_step.py and geometry.py: what they count and print, at tiny sizes."""

import csv
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_crosslmm.cost import Meter
from lightning_crosslmm.fusion import attention as fusion_attention
from lightning_crosslmm.fusion import choose_backend

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])

    def load(name: str, *words: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [name, *words])
        return import_module(name)

    return load


def cells(page: str, first: str) -> list[dict[str, list[str]]]:
    """Rows of the Markdown table that starts with this heading, its columns by name; a name may stand twice."""
    lines = page.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    head, *rows = [[each.strip() for each in line.strip("|").split("|")] for line in lines[start:]]
    table = []
    for row in rows[1:]:
        if len(row) != len(head):
            break
        found: dict[str, list[str]] = {}
        for name, cell in zip(head, row, strict=True):
            found.setdefault(name, []).append(cell)
        table.append(found)
    return table


def test_the_scaled_geometry_keeps_the_ratios_of_the_7b(script) -> None:
    geometry = script("geometry")
    true, scaled = geometry.work_ratios(geometry.TRUE), geometry.work_ratios(geometry.SCALED)
    assert list(true) == list(scaled) and len(true) == 6
    for name, ratio in true.items():
        assert scaled[name] == pytest.approx(ratio, rel=0.2), name
    assert true["source / pooled tokens, LLaVA-OneVision"] == pytest.approx(729 / 196, rel=1e-3)


def test_what_is_counted_is_what_both_models_do(script) -> None:
    geometry = script("geometry")
    config = geometry.configure(geometry.SCALED)
    for is_plain, build in ((False, lambda *words: geometry.build_ours(words[0], "", words[1])),
                            (True, geometry.build_theirs)):  # fmt: skip
        reader = build(config, "cpu")
        with torch.no_grad(), Meter(reader.module) as meter:
            reader.read(reader.clip(3, 5))
        work = geometry.count_work(config, 3, 5, is_plain=is_plain)
        assert sum(meter.flops.values()) == pytest.approx(sum(work.flops.values()), rel=0.01)
        assert work.causal_flops < sum(work.flops.values())


def test_prefill_prints_what_it_measured(script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--frames", "1", "24", "--turns", "2", "--tokens", "1", "--text", "4", "--out", str(tmp_path))
    script("prefill", *words).main()
    page, printed = (tmp_path / "prefill.md").read_text(), capsys.readouterr().out
    with (tmp_path / "prefill.csv").open() as file:
        turns = list(csv.DictReader(file))
    rows = cells(page, "model")
    assert len(rows) == 6 and len(turns) == 12 and (tmp_path / "prefill.png").stat().st_size > 5000
    peaks = {(each["model"], each["frames"]): float(each["peak_mib"]) for each in turns}
    for row in rows:
        name, frames = row["model"][0], row["frames"][0]
        assert f"| {name} | {frames} | {row['prefill ms'][0]} |" in printed
        same = [each for each in turns if (each["model"], each["frames"]) == (name, frames)]
        ms = [float(each["prefill_ms"]) for each in same]
        assert float(row["prefill ms"][0].replace(",", "")) == pytest.approx(sum(ms) / 2, abs=0.06)  # median of two
        assert all(0 < float(each["encoder_ms"]) < float(each["prefill_ms"]) for each in same)
        ratio = peaks[name, frames] / peaks["LLaVA-OneVision", frames]
        assert float(row["ratio"][1]) == pytest.approx(ratio, abs=1e-3)
    small, ours, theirs = (peaks[name, "24"] for name in ("CrossLMM, small cache", "CrossLMM", "LLaVA-OneVision"))
    assert 0 < small < ours < theirs


def test_attention_times_every_backend_and_auto_goes_by_its_table(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--queries", "2", "9", "--keys", "20", "500", "--max-cells", "1e5", "--turns", "1", "--out", str(tmp_path))
    attention = script("attention", *words)
    attention.main()
    with (tmp_path / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["backend"] for row in rows} == {"sdpa", "reference"}  # all that a CPU runs
    assert len(rows) == 2 * (8 + 8 - 2) and all(float(row["forward_ms"]) > 0 for row in rows)
    assert "2 of 16 calls are past" in (tmp_path / "attention.md").read_text()
    copy = tmp_path / "fastest.py"
    copy.write_text(attention.TABLE.read_text())
    attention.write_table({64: "sdpa", 128: "varlen"}, torch.device("cpu"), torch.bfloat16, copy)
    written = runpy.run_path(str(copy))["FASTEST"]
    assert written.items() >= {("cpu", "bfloat16", 64): "sdpa", ("cpu", "bfloat16", 128): "varlen"}.items()

    monkeypatch.setattr(fusion_attention, "FASTEST", {("cuda", "bfloat16", 64): "sdpa", **written})
    monkeypatch.setattr(fusion_attention, "_has_varlen", lambda: True)
    monkeypatch.setattr(fusion_attention.torch.cuda, "is_available", lambda: False)  # so that it is called cuda
    choose_backend.cache_clear()
    assert choose_backend("cuda", torch.bfloat16, 64) == "sdpa"
    assert choose_backend("cuda", torch.bfloat16, 128) == "varlen"
    assert choose_backend("cpu", torch.bfloat16, 128) == "sdpa", "the table names one that cannot run"
    choose_backend.cache_clear()


def test_ragged_calls_cover_all_keys_once(script) -> None:
    attention = script("attention")
    for queries in (1, 3, 9):
        spans = attention.Case(64, "ragged", queries, 100).spans()
        assert int(spans.query_offsets[-1]) == queries and int((spans.key_end - spans.key_start).sum()) == 100
        assert spans.num_groups == min(4, queries)


def test_train_step_prints_its_share_of_the_peak(script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--samples", "2", "--num-frames", "2", "--text", "4", "--steps", "1", "--warmup", "1")
    train_step = script("train_step", *words, "--out", str(tmp_path))
    train_step.main()
    printed = dict(
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.count(" | ") == 1
    )
    with (tmp_path / "train_step.csv").open() as file:
        names, values = csv.reader(file)
    row = dict(zip(names, map(float, values), strict=True))
    assert float(printed["MFU"].rstrip("%")) == pytest.approx(100 * row["MFU"], abs=0.06)
    config = train_step.compose_arm([*train_step.GEOMETRIES["scaled"], "trainer=cpu"], None)
    assert row["TFLOP"] == pytest.approx(2 * train_step.step_flops(config, train_step.Sample(2, 4, 2)) / 1e12)
    assert 0 < row["MFU"] < 1 and row["step memory, MiB"] > 1


def test_rows_of_a_train_step_hold_several_samples(script) -> None:
    train_step = script("train_step")
    batch = train_step.packed(train_step.Sample(2, 4, 2), 3, 8)
    batch.validate()
    assert batch.num_samples == 3 and batch.row_of_sample.tolist() == [0, 0, 0] and len(batch.frames_FCHW) == 6
