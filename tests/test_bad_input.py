"""Damaged shards as a user meets them: `crosslmm verify`, `crosslmm index` and a training, on the same folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from lightning_crosslmm.cli import main
from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.errors import UserError
from tests.tars import LLAVA, claim, clip, cut, flip, headers, write_tar

CLIP = clip()
WHOLE = [member for key in "abcd" for member in ((f"{key}.json", LLAVA), (f"{key}.mp4", CLIP))]
SMALL = ("data=shards", "data.global_batch_size=2", "data.num_workers=0", "data.sampling.num_frames=2")
SMALL += ("trainer.max_steps=2", "trainer.log_every_n_steps=1", "logger.tensorboard=null")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # a test has few
    pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero"),  # nothing is validated
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def shards(folder: Path, members: list[tuple[str, bytes]] = WHOLE, indexed: bool = True) -> Path:
    """A folder with one tar, `s.tar`."""
    folder.mkdir()
    write_tar(folder / "s.tar", members)
    assert not indexed or main(["index", str(folder), "--workers", "1"]) == 0
    return folder


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command."""
    capsys.readouterr()
    code = main([*words, "--workers", "1"])
    said = capsys.readouterr()
    return code, (said.out + said.err).splitlines()


def trained(spec: object, run_dir: Path, *words: str) -> str:
    """Train on shards, and give the message that ends it, or ""."""
    words = (*SMALL, f"data.train={spec}", f"run_dir={run_dir}", *words)
    try:
        train.run(compose_overrides(train.CONF_DIR, list(words)))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("at", "lost"),
    [
        (lambda h: h[2], "sample 'b', member 'json': is cut off"),  # between two samples
        (lambda h: h[3], "sample 'b', member 'mp4': is cut off"),  # at a header, amid a sample
        (lambda h: h[3] + 100, "is cut off inside a header after the sample 'b'"),
        (lambda h: h[3] + 700, "is cut off inside the member 'b.mp4'"),
    ],
    ids=["boundary", "header", "inside-header", "inside-member"],
)
def test_a_cut_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], at: Callable[[list[int]], int], lost: str
) -> None:
    folder = shards(tmp_path / "shards")
    cut(folder / "s.tar", at(headers(folder / "s.tar")))
    code, lines = asked(capsys, "verify", str(folder))
    assert code == 1 and any(f"{folder}/s.tar: {lost}" in line for line in lines)
    assert "s.index.json: was written for 's.tar'" in (said := trained(folder, tmp_path / "run"))
    assert "the tar was cut off or written later" in said and str(folder) in said
    code, lines = asked(capsys, "index", str(folder))
    assert code == 1 and any(f"not indexed: {folder}/s.tar: is cut off" in line for line in lines)


REFUSED = {
    "json-without-video": ([*WHOLE, ("z.json", LLAVA)], "sample 'z': 1 <video> mark(s) in the text"),
    "video-without-json": ([*WHOLE, ("z.mp4", CLIP)], "sample 'z': has neither 'json' nor 'txt'"),
    "duplicate-keys": ([*WHOLE, *WHOLE[:2]], "sample 'a'"),
    "leads-out": ([("../x.json", LLAVA), *WHOLE], "the member '../x.json' is not allowed"),
    "pyd": ([("x.pyd", b"1"), *WHOLE], "the member 'x.pyd' is not allowed"),
    "pkl": ([("x.pkl", b"1"), *WHOLE], "the member 'x.pkl' is not allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_shard_that_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    members, said = REFUSED[name]
    folder = shards(tmp_path / "shards", members, indexed=False)
    for command in ("verify", "index"):
        code, lines = asked(capsys, command, str(folder))
        assert code == 1 and any(f"{folder}/s.tar" in line and said in line for line in lines), lines
    told = trained(folder, tmp_path / "run")
    assert f"{folder}/s.tar" in told and said in told and not list(tmp_path.rglob("*.ckpt"))


def test_a_member_of_2_gb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with open(folder / "s.tar", "wb") as file:
        file.write(claim("a.json", len(LLAVA)) + LLAVA + bytes(-len(LLAVA) % 512) + claim("a.mp4", 2 << 30))
        file.seek(2 << 30, 1)  # a hole: no disk is taken
        file.write(bytes(1024))
    told = [trained(folder, tmp_path / "run")]
    for command in ("verify", "index"):
        code, lines = asked(capsys, command, str(folder))
        assert code == 1
        told.append("\n".join(lines))
    for said in told:
        assert "s.tar: sample 'a'" in said and "has 2147483648 bytes, and 1073741824 are allowed" in said


def test_an_index_older_than_its_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "shards")
    write_tar(folder / "s.tar", [*WHOLE, ("e.json", LLAVA), ("e.mp4", CLIP)])
    code, lines = asked(capsys, "verify", str(folder))
    assert code == 1 and any("bytes, but its index was made of" in line for line in lines)
    assert "the tar was cut off or written later" in trained(folder, tmp_path / "run")
    assert asked(capsys, "index", str(folder))[0] == 0 and trained(folder, tmp_path / "run") == ""


def test_what_names_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spec, said in ((tmp_path, "holds no .tar file"), ("pipe:cat s.tar", "is not opened")):
        for command in ("verify", "index"):
            code, lines = asked(capsys, command, str(spec))
            assert code == 2 and len(lines) == 1 and said in lines[0]
        assert said in trained(spec, tmp_path / "run")
    assert "data.train: is an empty list" in trained("[]", tmp_path / "run")


def test_what_is_left_out_is_listed_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards(tmp_path / "shards", [*WHOLE[:6], ("d.json", LLAVA), ("d.mp4", clip(400))])
    tar = folder / "s.tar"
    flip(tar, headers(tar)[3] + 700)
    code, lines = asked(capsys, "verify", str(folder))
    assert code == 1 and sum("damaged: " in line for line in lines) == 1
    assert f"{tar}: sample 'b', member 'mp4'" in lines[0]
    code, lines = asked(capsys, "verify", str(folder), "--decode", "--timeout", "0.01")
    assert code == 1 and any(f"{tar}: sample 'd', member 'mp4': decoding it did not end" in line for line in lines)
    run_dir = tmp_path / "run"
    assert trained(folder, run_dir, "data.max_bad_fraction=0.01", "data.sample_timeout_s=1e-9") == ""
    listed = {each["key"]: each for each in json.loads((run_dir / "skipped.json").read_text())["samples"]}
    assert listed.keys() == set("abcd") and {each["shard"] for each in listed.values()} == {str(tar)}
    assert "do not have the sha256 of the index" in listed["b"]["reason"]
    assert "is not decoded after 1e-09 s" in listed["d"]["reason"]
    assert "4 damaged sample(s) left out" in caplog.text and f"{tar}: sample 'b'" in caplog.text
    said = trained(folder, tmp_path / "strict", "data.max_bad_fraction=0")
    assert f"{tar}: sample 'b'" in said and "more than data.max_bad_fraction=0" in said
