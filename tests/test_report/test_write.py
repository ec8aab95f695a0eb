import json
import re
from pathlib import Path

import matplotlib.image
import pytest

import train
from lightning_crosslmm import cli
from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.report import write_report
from tests.sweeps import named, write_run

TINY = (
    "data.probe.clips={train: 4, val: 4, test: 2}",
    "data.probe.num_frames=2",
    "data.probe.questions_per_clip=2",
    "data.encoder_fit=null",
    "data.global_batch_size=2",
    "data.num_workers=0",
    "data.sampling.num_frames=2",
    "trainer.max_steps=2",
    "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1",
)
FILES = {"report.md", "report.html", "report.tex", "report.csv", "arms.csv", "curves.png", "pareto_time.png"}


def generated(folder: Path) -> Path:
    for pooler, score in (("average", 0.5), ("tome", 0.6)):
        for seed in (0, 1):
            metrics = {"val/accuracy": score + seed / 10, "prefill/time_s": 0.01 * score}
            place = {"pooler": pooler, "fusion": "none", "seed": seed}
            write_run(folder / named(**place), **place, metrics=metrics, curve=[(1, 0.1), (2, score)])
    return folder


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Checkpoint directory .* exists")
def test_trainings_and_their_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fusion in ("none", "crosslmm"):
        run_dir = tmp_path / "sweep" / f"fusion={fusion},seed=0"
        words = [*TINY, f"fusion={fusion}", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir='{run_dir}'"]
        train.run(compose_overrides(train.CONF_DIR, words))
    capsys.readouterr()
    words = ["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "out"), "--baseline", "fusion=none"]
    assert cli.main(words) == 0
    written = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert written >= FILES and {path.name for path in (tmp_path / "out").iterdir()} == written
    text = (tmp_path / "out" / "report.md").read_text()
    metrics = json.loads((tmp_path / "sweep" / "fusion=crosslmm,seed=0" / "metrics.json").read_text())
    assert metrics["prefill/pooled_per_frame"] == 1 and metrics["prefill/samples"] == 2
    row = next(line for line in text.splitlines() if line.startswith("| 2 | fusion=crosslmm | 1 |"))
    assert f"| {metrics['val/accuracy']:.3f} |" in row and f"| {metrics['train/seconds']:,.0f} |" in row
    assert f"| {metrics['prefill/time_s'] * 1e3:.3g}" in row
    assert "| all | none < both |" in text and "None." in text.partition("not in the tables")[2]
    assert re.search(r"Commits:\n\n```text\n[0-9a-f]{8}\+?\n", text)
    assert f"crosslmm report {tmp_path / 'sweep'} --out {tmp_path / 'out'} --baseline fusion=none" in text


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    sweep = generated(tmp_path / "sweep")
    paths = write_report(sweep)
    assert {path.name for path in paths} == FILES and {path.parent for path in paths} == {sweep / "report"}
    before = {path: path.read_bytes() for path in paths}
    assert {path: path.read_bytes() for path in write_report(sweep)} == before
    for path in paths:
        if path.suffix == ".png":
            assert matplotlib.image.imread(path)[..., :3].std() > 0.02


def test_what_is_undone_or_of_another_origin_is_said(tmp_path: Path) -> None:
    sweep = generated(tmp_path / "sweep")
    write_run(sweep / named("max", "none", 0), pooler="max", fusion="none", failed="<b>no room</b>")
    write_run(sweep / named("max", "none", 1), pooler="max", fusion="none", seed=1)
    other = {"provenance": {"commit": "deadbeef0", "uncommitted_changes": True}, "metrics": {"val/accuracy": 0.1}}
    write_run(sweep / named("strided", "none", 0), pooler="strided", fusion="none", **other)
    write_report(sweep)
    text = (sweep / "report" / "report.md").read_text()
    assert "3 arms, seeds 0, 1, 7 run folders" in text
    assert "- **Note** Runs are of more than one commit: c0ffee01 (4 runs), deadbeef+ (1 runs)" in text
    assert "- **Note** A commit with + is one whose tree had changes" in text
    assert "| pooler=max,fusion=none,seed=0 | failed | &lt;b>no room&lt;/b> |" in text
    assert "| pooler=max,fusion=none,seed=1 | unfinished |" in text
    assert "| pooler=strided, seed=1 | missing | no run folder |" in text
    assert "python train.py -m pooler=average,tome fusion=none,crosslmm  # 7 runs" in text
    page = (sweep / "report" / "report.html").read_text()
    tiles = re.findall(r'<div class="tile"><b>(\d+)</b><span>([\w ]+)</span>', page)
    assert tiles == [("3", "arms"), ("5", "runs done"), ("1", "failed"), ("1", "unfinished"), ("1", "missing")]


def test_users_are_told_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "pooler=max,seed=0", pooler="max", failed="no room")
    with pytest.raises(UserError, match=r"none of its 1 runs is done.*\(pooler=max,seed=0 failed: no room\)"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith("nowhere: there is no such folder; give one with run folders in it\n")
    sweep = generated(tmp_path / "sweep")
    assert cli.main(["report", str(sweep), "--baseline", "pooler=tom"]) == 2
    assert "--baseline pooler=tom: no arm has these settings" in capsys.readouterr().err
