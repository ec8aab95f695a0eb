"""The benchmarks as users run them, tiny: do their tables agree with what was measured?"""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.tars import clip

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = (
    "data.probe.clips={train: 8, val: 4, test: 4}",
    "data.probe.clips_per_shard=8",
    "data.probe.questions_per_clip=2",
    "data.probe.num_frames=2",
    "data.sampling.num_frames=2",
    "data.encoder_fit=null",
    "data.global_batch_size=4",
    "data.num_workers=0",
    "data.cache_dir=cache",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "callbacks.attention_picture=null",
    "logger.tensorboard=null",
)


def call(script: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_step_splits_its_time_without_loss(tmp_path: Path) -> None:
    options = ("--arms", "fusion=none", "fusion=crosslmm gradient_checkpointing=true", "--steps", "3", "--warmup", "1")
    done = call("step.py", *SMALL, *options, "--device", "cpu", "--json", "step.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arms = json.loads((tmp_path / "step.json").read_text())["arms"]
    printed = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()}
    for number, arm in enumerate(arms.values()):
        parts = {name: row["mean_ms"] for name, row in arm["parts"].items()}
        total_ms = parts.pop("total")
        assert min(parts.values()) >= 0 and sum(parts.values()) == pytest.approx(total_ms)
        spent = ("data wait", "encoder", "pooler, projector", "LLM", "head, loss", "backward", "optimizer")
        assert all(parts[name] > 0 for name in spent)
        assert sum(row["share"] for row in arm["parts"].values()) == pytest.approx(2)  # parts once, total once
        assert arm["steps"] == 3 and arm["samples_per_step"] == 4
        assert arm["frames_per_s"] == pytest.approx(4 * 2 / total_ms * 1e3)
        assert float(printed["total"][3 * number]) == pytest.approx(arm["parts"]["total"]["median_ms"], abs=0.01)
        assert float(printed["frames/s"][number]) == pytest.approx(arm["frames_per_s"], abs=0.1)
        assert int(printed["parameters"][number].replace(",", "")) == sum(arm["parameters"].values())
        assert arm["peak_bytes"] > 2**20  # activations and gradients of a million parameters
    plain, fused = arms.values()
    assert plain["parts"]["fusion"]["mean_ms"] == 0 < fused["parts"]["fusion"]["mean_ms"]
    assert plain["parameters"]["llm"] == fused["parameters"]["llm"]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import probe

    return probe


def test_probe_prints_what_the_runs_measured(
    probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--seeds", "3", "--out", "out")
    done = call("probe.py", *SMALL, "--arms", "fusion=crosslmm", "ckpt=nowhere", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout and "Failed: ckpt=nowhere, seed 3: exit code 2: error: ckpt=nowhere" in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    method, failed = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert set(failed.values()) == {"ckpt=nowhere", "-"}
    folder = tmp_path / "out" / "fusion-crosslmm_seed3"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert method["seed 3"] == method["mean"] == f"{metrics['val/accuracy']:.3f}"
    assert method["training s"] == f"{metrics['train/seconds']:.0f}"
    assert (method["arm"], method["steps"], method["tokens/frame"]) == ("fusion=crosslmm", "2", "1")
    runs = json.loads((tmp_path / "out" / "table.json").read_text())
    assert runs[0]["metrics"] == metrics and [run["error"] is None for run in runs] == [True, False]

    # a second arm is there already, so that nothing is trained anew
    shutil.copytree(folder, tmp_path / "out" / "fusion-none_seed3")
    provenance = tmp_path / "out" / "fusion-none_seed3" / "provenance.json"
    provenance.write_text(
        provenance.read_text().replace("fusion=crosslmm", "fusion=none").replace("n-crosslmm", "n-none")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe.subprocess, "run", None)
    monkeypatch.setattr(
        sys, "argv", ["probe.py", *SMALL, *options, "--arms", "fusion=crosslmm", "fusion=none", "--check"]
    )
    with pytest.raises(SystemExit, match="seed 3: fusion=crosslmm has 0.* below 0.95") as ended:
        probe.main()
    assert "| fusion=none |" in capsys.readouterr().out and isinstance(ended.value.code, str)  # Python exits with 1


def test_probe_skips_what_is_done_and_resumes_what_is_not(
    probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    process = SimpleNamespace(
        run=lambda command, **_: called.append(command) or SimpleNamespace(returncode=0), STDOUT=None
    )
    monkeypatch.setattr(probe, "subprocess", process)
    (run,) = probe.plan(["fusion=none"], [1], ["trainer.max_steps=2"], tmp_path / "it's (here)")
    assert run.words[:3] == ["trainer.max_steps=2", "fusion=none", "seed=1"]
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "metrics.json").write_text('{"val/accuracy": 0.5}')
    record = {"command": ["train.py", *run.words, "resume=x"], "ended": "today", "error": None}
    (run.folder / "provenance.json").write_text(json.dumps(record))
    run.train()
    assert not called
    (run.folder / "provenance.json").write_text(json.dumps({**record, "error": "KeyboardInterrupt"}))
    run.train()
    (run.folder / "checkpoints" / "step-00000001").mkdir()
    run.train()
    assert called[0][2:] == run.words and called[1][2:-1] == run.words
    assert probe.compose_overrides(probe.TRAIN.parent / "conf", called[1][2:]).resume == str(run.folder)
    (run.folder / "provenance.json").write_text(json.dumps({**record, "command": ["train.py", "seed=1"]}))
    with pytest.raises(probe.UserError, match="holds a run of `seed=1`; choose another --out"):
        run.train()


@pytest.mark.parametrize(
    ("method", "baseline", "missed"),
    [(0.95, 0.65, 0), (0.949, 0.2, 1), (0.97, 0.7, 1), (0.9, 0.8, 2), (None, 0.2, 1)],
)
def test_probe_bar(probe: ModuleType, method: float | None, baseline: float, missed: int) -> None:
    runs = []
    for seed, scores in ((0, (1.0, 0.1)), (1, (method, baseline))):
        for arm, score in zip((probe.METHOD, probe.BASELINE), scores, strict=True):
            metrics = {} if score is None else {"val/accuracy": score}
            runs.append(probe.Run(arm, seed, Path("nowhere"), [], metrics=metrics))
    found = probe.shortfalls(runs)
    assert len(found) == missed and all(line.startswith("seed 1: ") for line in found)


def test_probe_refuses_a_mistake_before_it_trains(tmp_path: Path) -> None:
    done = call("probe.py", "--arms", "fusion=crosslmm", "fusion=crossllm", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert "did you mean 'crosslmm'?" in done.stderr and len(done.stderr.splitlines()) == 1


def test_decode_prints_a_rate_for_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    done = call("decode.py", "--clips", "1", "--frames", "10", "--size", "32", "48", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rates = [re.split(r"\s{2,}", line)[1:] for line in done.stdout.splitlines()[1:]]
    assert len(rates) == 3 and all(float(rate) > 0 for row in rates for rate in row)


def here(script: str, *words: str, patch: pytest.MonkeyPatch) -> None:
    """Run a script in this process, which has paid for the imports already."""
    patch.syspath_prepend(str(BENCHMARKS))
    patch.setattr(sys, "argv", [script, *words])
    import_module(script).main()


def test_stream_prints_rates_of_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(clip())
    small = ("--count", "2", "--turns", "1", "--workers", "0", "--batch", "2", "--num-frames", "2")
    table = tmp_path / "stream.json"
    here("stream", "--clips", str(tmp_path / "clips"), *small, "--json", str(table), patch=monkeypatch)
    rows = json.loads(table.read_text())
    printed = [re.split(r"\s{2,}", line)[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    for row, cells in zip(rows.values(), printed, strict=True):
        assert row["ratio"] == pytest.approx(row["clips_per_s"]["stream"] / row["clips_per_s"]["PyAV"])
        assert [float(cell) for cell in cells[:2]] == pytest.approx(list(row["clips_per_s"].values()), abs=0.06)


def test_index_scale_opens_what_it_wrote_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--shards", "3", "--samples", "20", "--batches", "4", "--batch", "2", "--workers", "0")
    here("index_scale", *small, "--dir", str(tmp_path), patch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 shards, 60 samples") and not list(tmp_path.iterdir())
    rows = [line.split() for line in lines[5:-1]]
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3] and all(float(row[2]) > 10 for row in rows)
    samples = [int(row[1]) for row in rows]
    assert samples == sorted(samples) and samples[-1] > 4, "rows hold several"


def test_kill_resume_kills_at_epoch_ends_and_sees_every_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kill_resume

    (tmp_path / "steps").mkdir()
    trained = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 1), (2, 1, 1), (1, 0, 0)]  # step 1 came again
    lines = [json.dumps([*place, [f"s{number}"]]) for number, place in enumerate(trained)]
    (tmp_path / "steps" / "rank-0.jsonl").write_text("\n".join(lines) + "\n")
    assert kill_resume.epoch_ends(tmp_path) == [(1, 1)] and kill_resume.last_of(tmp_path) == (2, 1)
    assert kill_resume.batches_of(tmp_path)[1, 0, 0] == (0, ["s6"])
    assert len(kill_resume.arms()) == 16
    one = {"a": [torch.ones(2), {"b": 1}], "train/seconds": 3.0}
    assert kill_resume.different(one, {"a": [torch.ones(2), {"b": 1}], "train/seconds": 4.0}) == []
    assert kill_resume.different(one, {"a": [torch.ones(2).double(), {"b": 2}]}) == ["/a/0", "/a/1/b"]
    assert kill_resume.different(one, {"a": []}) == ["/a"]


def test_gauges_leave_recomputing_out_and_see_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gauges import Stopwatch, peak_bytes

    cpu = torch.device("cpu")
    watch, layer, runs = Stopwatch(cpu), nn.Linear(4, 4), []
    layer.register_forward_pre_hook(lambda *_: runs.append(watch.listening))
    watch.watch("layer", layer)
    watch.open("total")
    watch.listening = True
    loss = checkpoint(layer, torch.ones(2, 4), use_reentrant=False).sum()
    watch.listening = False
    inside_ms = watch.read_ms()["layer"]
    loss.backward()
    watch.close()
    later = watch.read_ms()
    assert runs == [True, False] and later["layer"] == 0 and later["total"] >= inside_ms > 0
    assert 0.9 * 2**26 < peak_bytes(cpu, lambda: torch.ones(2**24).add_(1).add_(1)) < 2**27
