"""``crosslmm show`` end to end: real runs, clips and pictures, and what is said of mistakes."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from lightning_crosslmm.answer import Answerer
from lightning_crosslmm.cli import main
from lightning_crosslmm.video import encode_video, probe_video
from tests.runs import small_config, write_run


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "a.b.mp4"
    frames_FHWC = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    path.write_bytes(encode_video(frames_FHWC, 4.0))
    return path


@pytest.fixture(scope="module")
def image(clip: Path) -> Path:
    path = clip.with_name("one.png")
    matplotlib.image.imsave(path, np.random.default_rng(1).random((40, 30, 3)))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, small_config("pooler=tome"))
    return folder


def show(*words: str | Path) -> int:
    return main(["show", *map(str, words)])


def test_a_clip_becomes_a_sheet_and_a_video(
    run_dir: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert show(clip, "t0 disc?", "--run", run_dir, "--out", out) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(out / "sheet.png"), str(out / "video.mp4")] and said.err == ""
    assert {path.name for path in out.iterdir()} == {"sheet.png", "video.mp4"}
    asked = matplotlib.image.imread(out / "sheet.png")
    assert probe_video(out / "video.mp4", "video.mp4").num_frames == 3
    assert show(clip, "--run", run_dir, "--out", out) == 2
    error = capsys.readouterr().err
    assert error == f"error: --out {out}: is not empty; give another folder, or --overwrite\n"
    assert show(clip, "--run", run_dir, "--out", out, "--overwrite") == 0
    assert matplotlib.image.imread(out / "sheet.png").shape[0] < asked.shape[0]  # no rows of T2V without a question


def test_an_image_becomes_a_sheet_below_the_run(run_dir: Path, image: Path) -> None:
    assert show(image, "--run", run_dir) == 0
    assert [path.name for path in (run_dir / "show" / "one").iterdir()] == ["sheet.png"]


def test_what_is_told_is_the_answer_that_ask_gives(run_dir: Path, clip: Path) -> None:
    answerer = Answerer.from_run(run_dir)
    look = answerer.see(clip, "t0 disc?")
    assert [look.answer] == answerer.ask(clip, ["t0 disc?"]) and look.key == "a.b.mp4"
    assert {branch for branch, _ in look.sight.layers} == {"v2v", "t2v"} and look.t2v_FHW is not None
    silent = answerer.see(clip)
    assert {branch for branch, _ in silent.sight.layers} == {"v2v"} and silent.t2v_FHW is None and silent.answer == ""


@pytest.mark.parametrize("pooler", ["dymu", "prumerge", "temporal_merge", "qformer", "strided", "random", "vistog"])
def test_every_kind_of_map_is_drawn(pooler: str, clip: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", small_config(f"pooler={pooler}", "fusion=v2v"))
    assert show(clip, "--run", tmp_path / "run", "--out", tmp_path / "out") == 0


def test_a_pooler_that_reads_the_question_wants_one(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", small_config("pooler=quecc", "fusion=none"))
    assert show(clip, "--run", tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: pooler QueccPooler reads the question; give one after the file\n"
    assert show(clip, "t0 disc?", "--run", tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{clip}", "--run", "nowhere"], "nowhere: there is no such folder"),
        (["gone.mp4", "--run", "{run}"], "gone.mp4: there is no such file; give a video or an image"),
        (["{run}/config.yaml", "--run", "{run}"], "config.yaml"),
        (["{clip}", "  ", "--run", "{run}"], "the question is empty"),
        (["{clip}", "--run", "{run}", "--out", "{clip}"], "is a file; give a folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str],
    message: str,
    run_dir: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert show(*(word.format(clip=clip, run=run_dir) for word in words)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1 and not said.out
    assert not any(tmp_path.iterdir())
