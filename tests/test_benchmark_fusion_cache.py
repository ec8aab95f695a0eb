"""benchmarks/fusion_cache.py: its bytes against what an answer really keeps, and its timings at a tiny size."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_crosslmm.compose import ANY_TARGET, build_model


@pytest.fixture
def fusion_cache(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[1] / "benchmarks"), *sys.path])
    import fusion_cache

    return fusion_cache


@pytest.mark.parametrize("number", range(9))
def test_bytes_on_the_meta_device_are_those_of_an_answer(fusion_cache: ModuleType, number: int) -> None:
    arm = list(fusion_cache.ARMS.values())[number]
    model = build_model(fusion_cache.configure(fusion_cache.DEFAULT, arm), ANY_TARGET).eval()
    with torch.no_grad():
        prompt = model.prompt(fusion_cache.clip(3, 32), keeps_keys=True)
        model.run(prompt)
    counted = fusion_cache.bytes_per_frame(fusion_cache.DEFAULT, arm, torch.float32)
    assert prompt.context.cache_bytes() == 3 * counted > 0


def test_the_7b_keeps_what_its_shape_says(fusion_cache: ModuleType) -> None:
    kept = fusion_cache.bytes_per_frame(fusion_cache.LARGE, "", torch.bfloat16)
    assert kept == 7 * 729 * 2 * 4 * 128 * 2  # layers, tokens, keys and values, heads, channels, bytes
    shared = "fusion.layers_per_kv=all fusion.kv_latent={kv}"
    assert fusion_cache.bytes_per_frame(fusion_cache.LARGE, shared, torch.bfloat16) == 729 * 512 * 2


def test_times_of_arms_and_scopes(fusion_cache: ModuleType) -> None:
    for arms in (dict(list(fusion_cache.ARMS.items())[4:6]), fusion_cache.SCOPES):
        found = fusion_cache.time_arms(arms, num_frames=3, num_tokens=2, repeats=1)
        assert set(found) == {"prefill, ms", "fusion in prefill, ms", "per token, ms"}
        for column in found.values():
            assert list(column) == list(arms) and min(column.values()) > 0
        for name in arms:
            assert found["fusion in prefill, ms"][name] < found["prefill, ms"][name]


def test_accuracy_trains_each_arm_as_the_probe_does(fusion_cache: ModuleType, tmp_path: Path) -> None:
    arms = [fusion_cache.configured(arm) for arm in ("", "fusion.kv_latent={kv}")]
    assert arms == ["fusion=crosslmm", "fusion=crosslmm fusion.kv_latent=64"]
    (run, _) = fusion_cache.probe.plan(arms[1:], (0, 1), ["trainer.max_steps=1"], tmp_path)
    assert {"fusion.kv_latent=64", "seed=0", "trainer.max_steps=1"} <= set(run.words)
