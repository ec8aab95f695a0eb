"""The crosslmm command as users meet it: what it prints, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_crosslmm.checkpoint_folder import begin_checkpoint, show_checkpoint
from lightning_crosslmm.cli import main
from lightning_crosslmm.compose import build_model, compose_overrides
from lightning_crosslmm.shards import open_shards
from lightning_crosslmm.video import encode_video
from tests.tars import LLAVA, flip, write_tar

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    frames_FHWC = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    path.write_bytes(encode_video(frames_FHWC, 4.0))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, of a model that was not trained."""
    folder = tmp_path_factory.mktemp("run")
    config = compose_overrides(ROOT / "conf", ["decoding.max_new_tokens=3", f"run_dir={folder}"])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    part = begin_checkpoint(folder, 1)
    part.mkdir(parents=True)
    torch.manual_seed(0)
    state = {f"model.{name}": tensor for name, tensor in build_model(config, ("",)).state_dict().items()}
    torch.save({"state_dict": state}, part / "state.ckpt")
    about = {"epoch": 0, "monitor": "val/accuracy", "mode": "max", "metric": None, "world_size": 1, "versions": {}}
    show_checkpoint(part, step=1, **about)
    return folder


def changed(run_dir: Path, folder: Path, **settings: str | int) -> Path:
    """Copy a run folder with other settings in its config."""
    config = OmegaConf.load(run_dir / "config.yaml")
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / "checkpoints").symlink_to(run_dir / "checkpoints")
    return folder


def pack_words(folder: Path, *videos: str) -> list[str]:
    """Write conversations about videos; words of the command that packs them."""
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    entries = [{"id": f"clip {video}", "video": video, "conversations": turns} for video in videos]
    (folder / "data.json").write_text(json.dumps(entries))
    return ["pack", str(folder / "data.json")]


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in ("pack", "index", "verify", "ask"))])
def test_help_is_told_before_anything_heavy_is_imported(words: list[str]) -> None:
    code = (
        "import sys; from lightning_crosslmm.cli import main\n"
        f"try: main({words!r})\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: crosslmm") and len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["pakc"],
        ["ask", "a.mp4", "what?"],
        ["pack", "a", "b", "c", "--samples-per-shard", "x"],
        ["index"],
        ["verify", "a", "--workers", "x"],
    ],
)
def test_a_command_that_is_none_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "usage: crosslmm" in capsys.readouterr().err


def test_packing_says_what_it_wrote(tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*pack_words(tmp_path, "a.mp4"), str(clip.parent), str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("1 conversations in 1 shards, ") and str(tmp_path / "out") in said.out and not said.err
    assert open_shards(tmp_path / "out").num_samples == (1,)
    assert main(words) == 2
    assert "overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_damaged_files_stop_packing_unless_they_are_to_be_skipped(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*pack_words(tmp_path, "a.mp4", "gone.mp4"), str(clip.parent), str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "gone.mp4" in said.err and said.err.count("\n") == 1 and not said.out
    assert main([*words, "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("skipped clip_gone_mp4: ") and said.out.startswith("1 conversations")


def others(folder: Path, clip: Path, **more: bytes) -> Path:
    """A tar as others write it, of two samples, and more members of the first."""
    members = [(f"a.{name}", data) for name, data in {"json": LLAVA, "mp4": clip.read_bytes(), **more}.items()]
    return write_tar(folder / "others.tar", [*members, ("b.json", LLAVA), ("b.mp4", clip.read_bytes())])


def test_shards_of_others_are_indexed(tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others(tmp_path, clip, m4a=b"sound")
    assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == "2 samples in 1 shards with an index\n"
    assert said.err == "left out, as they are neither texts nor visuals: m4a (1)\n"
    assert main(["index", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "2 samples in 1 shards with an index, 1 of them as before\n"
    assert open_shards(tmp_path).num_samples == (2,)


def test_shards_that_cannot_be_indexed_are_named(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = others(tmp_path, clip)
    flip(path, 512)
    assert main(["index", str(tmp_path), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"not indexed: {path}: sample 'a'") and said.err.count("\n") == 1
    assert said.out == "0 samples in 0 shards with an index\n"
    assert main(["index", str(tmp_path), "--workers", "1", "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"skipped {path}: sample 'a'") and said.out.startswith("1 samples in 1 shards")
    assert main(["verify", str(tmp_path)]) == 0
    assert "1 samples are in no index" in capsys.readouterr().out


def test_verifying_names_all_that_is_damaged(tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = others(tmp_path, clip)
    assert main(["verify", str(path), "--decode"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"1 shards have no index, so no checksum holds their bytes ({path} first)"
    assert last.startswith("1 shards, 2 samples, 4 members, ") and last.endswith(" MiB: nothing is damaged")
    main(["index", str(path)])
    capsys.readouterr()
    for entry in open_shards(path).index(0).entries:
        flip(path, entry.members["mp4"].offset + 100)
    assert main(["verify", str(path), "--workers", "1"]) == 1
    *damaged, last = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"damaged: {path}: sample '{key}'") for key, line in zip("ab", damaged, strict=True)]
    assert last.endswith(": 2 are damaged")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "none.json", ".", "out"], "none.json"),
        (["pack", "none.json", ".", "out", "--samples-per-shard", "0"], "error: "),
        (["index", "."], ".: holds no .tar file"),
        (["verify", "pipe:cat a.tar"], "pipe:cat a.tar: is not opened"),
        (["ask", "a.mp4", "what?", "--run", "nowhere"], "nowhere: there is no such folder"),
        (["ask", "a.mp4", "what?", "--run", "."], "has no config.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_crosslmm.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_a_run_answers(run_dir: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(clip), "t0 disc?", "and then?", "--run", str(run_dir)]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") >= 2 and said.err == ""  # an answer ends its line, if it is empty, too
    assert main(["ask", str(clip), "t0 disc?", "and then?", "--run", str(run_dir)]) == 0
    assert capsys.readouterr().out == said.out


@pytest.mark.parametrize(
    ("video", "questions", "message"),
    [
        ("gone.mp4", ["what?"], "gone.mp4"),
        ("config.yaml", ["what?"], "config.yaml"),
        (None, ["  "], "question 1 is empty"),
    ],
)
def test_what_cannot_be_asked_is_told(
    run_dir: Path, clip: Path, video: str | None, questions: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clip if video is None else run_dir / video
    assert main(["ask", str(path), *questions, "--run", str(run_dir)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.Popen", "lightning_crosslmm.pack.pack", "lightning_crosslmm.encoder.timm.torch.load"],
)
def test_a_strangers_run_runs_no_code_of_its_choice(
    target: str, run_dir: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(run_dir, tmp_path / "run", pooler___target_=target)
    assert main(["ask", str(clip), "what?", "--run", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: pooler._target_: {target} is not run") and error.count("\n") == 1


def test_a_part_of_the_users_own_answers_once_it_is_allowed(
    run_dir: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from lightning_crosslmm.pooler import AveragePooler\nclass MyPooler(AveragePooler): ...\n"
    (tmp_path / "my_parts.py").write_text(source)
    folder = changed(run_dir, tmp_path / "run", pooler___target_="my_parts.MyPooler")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["ask", str(clip), "what?", "--run", str(folder)]
    assert main(words) == 2
    assert "my_parts.MyPooler is not run" in capsys.readouterr().err
    assert main([*words, "--allow", "my_parts"]) == 0


def test_a_checkpoint_of_another_configuration_is_refused(
    run_dir: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(run_dir, tmp_path / "run", fusion__interval=3)
    assert main(["ask", str(clip), "what?", "--run", str(folder)]) == 2
    assert "is from another configuration" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(run_dir: Path, clip: Path) -> None:
    command = f"'{sys.executable}' -m lightning_crosslmm.cli ask '{clip}' 'what?' --run '{run_dir}' | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
