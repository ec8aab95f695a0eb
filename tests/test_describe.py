"""The description of a config: exact counts, the paper's 43 million, and no trace left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.describe import describe
from lightning_crosslmm.model import ROLES
from lightning_crosslmm.pooler import NoPooler
from lightning_crosslmm.video import FrameSampling
from tests.tiny import tiny_model

EIGHT = FrameSampling("uniform", num_frames=8)


def counts(lines: list[str]) -> dict[str, tuple[int, int]]:
    """The exact numbers of the table's rows: all parameters and the trained ones."""
    rows = [line.split() for line in lines if line.count(" M ") == 2]
    return {row[0]: (int(row[3].replace(",", "")), int(row[6].replace(",", ""))) for row in rows}


def rounded(lines: list[str]) -> dict[str, list[float]]:
    rows = [line.split() for line in lines if line.count(" M ") == 2]
    return {row[0]: [float(row[1].replace(",", "")), float(row[4].replace(",", ""))] for row in rows}


def test_every_role_and_their_exact_sum() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.role_of(name) in ("projector", "fusion"))
    table = counts(describe(model, EIGHT))
    assert list(table) == [*ROLES, "total"]
    of_projector = sum(parameter.numel() for parameter in model.projector.parameters())
    assert table["projector"] == (of_projector, of_projector) and table["fusion"][0] == table["fusion"][1] > 0
    assert table["encoder"][1] == table["llm"][1] == 0 < table["encoder"][0]
    assert table["total"] == tuple(map(sum, zip(*(table[role] for role in ROLES), strict=True)))
    assert table["total"][0] == sum(parameter.numel() for parameter in model.parameters())


def test_tied_weights_count_once() -> None:
    tied, apart = tiny_model(), tiny_model()
    tied.llm.lm_head.weight = tied.llm.model.embed_tokens.weight
    surplus = apart.llm.lm_head.weight.numel()
    assert counts(describe(apart, EIGHT))["llm"][0] - counts(describe(tied, EIGHT))["llm"][0] == surplus


def test_tokens_of_frame_clip_and_prompt() -> None:
    text = "\n".join(describe(tiny_model(), EIGHT))
    assert "16x16 pixels, grid 4x4 = 16 source tokens, 1 pooled" in text and "8 frames, 128 source tokens" in text
    assert "prompt      8 pooled tokens and the text, in a context of 512" in text and "4, fused: 0, 2" in text
    plain = "\n".join(describe(tiny_model(pooler=NoPooler(), v2v=False, t2v=False), EIGHT))
    assert "16 pooled" in plain and "128 pooled tokens" in plain and "fused: none" in plain
    at_a_rate = "\n".join(describe(tiny_model(), FrameSampling("rate", rate_hz=1.0, max_frames=6)))
    assert "at most 6 frames" in at_a_rate and "at most 6 pooled tokens" in at_a_rate


def test_a_pooler_without_a_fixed_count_is_told_so() -> None:
    model = tiny_model()
    model.tokens_per_frame = None
    text = "\n".join(describe(model, EIGHT))
    assert "a varying number of pooled" in text and "as many pooled tokens as the pictures ask for" in text


def describe_config(*words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    train.run(compose_overrides(train.CONF_DIR, ["mode=describe", "run_dir=nowhere", *words]))
    return capsys.readouterr().out.splitlines()


def test_the_first_stage_trains_what_the_paper_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = describe_config("experiment=[crosslmm_2b,align]", capsys=capsys)
    table = counts(lines)
    assert 42e6 <= table["total"][1] <= 44e6  # 43 M in Table 3
    assert table["total"][1] == table["projector"][0] + table["fusion"][0]
    assert table["encoder"][1] == table["llm"][1] == 0 and 1.5e9 < table["llm"][0] < 1.6e9
    assert rounded(lines)["total"][1] == round(table["total"][1] / 1e6, 1)
    assert "grid 27x27 = 729 source tokens, 9 pooled" in "\n".join(lines)
    assert "288 pooled tokens and the text" in "\n".join(lines)


@pytest.mark.parametrize(("size", "billions"), [("2b", (1.9, 2.2)), ("7b", (8.2, 8.6))])
def test_at_their_true_sizes(size: str, billions: tuple[float, float], capsys: pytest.CaptureFixture[str]) -> None:
    table = counts(describe_config(f"experiment=crosslmm_{size}", capsys=capsys))
    assert billions[0] * 1e9 < table["total"][0] == table["total"][1] < billions[1] * 1e9
    assert torch.get_default_device().type == "cpu"


def test_the_command_prints_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(train.CONF_DIR.parent / "train.py"), "-m", "mode=describe", "pooler.rows=1,2"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env={"PATH": "", "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("prompt")] == [
        "prompt      4 pooled tokens and the text, in a context of 4,096",
        "prompt      16 pooled tokens and the text, in a context of 4,096",
    ]
    assert list(tmp_path.iterdir()) == []
