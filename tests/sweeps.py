"""Writes run folders as train.py leaves them, with numbers that a test chooses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FUSIONS = {"none": (False, False), "t2v": (False, True), "v2v": (True, False), "crosslmm": (True, True)}
POOLERS = {"average": "AveragePooler", "max": "MaxPooler", "tome": "ToMe"}


def write_run(
    folder: Path,
    *,
    pooler: str = "average",
    fusion: str = "crosslmm",
    seed: int = 0,
    metrics: Mapping[str, float] | None = None,
    curve: Sequence[tuple[int, float]] = (),
    cost: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    failed: str | None = None,
) -> Path:
    """Write one run folder; without metrics it has not ended."""
    folder.mkdir(parents=True)
    v2v, t2v = FUSIONS[fusion]
    config = {
        "pooler": {"_target_": f"lightning_crosslmm.pooler.{POOLERS.get(pooler, pooler)}"},
        "fusion": {"v2v": v2v, "t2v": t2v},
        "data": {"seed": seed},
        "trainer": {"default_root_dir": str(folder), "max_steps": 9},
        "seed": seed,
        "run_dir": str(folder),
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    record = {
        "mode": "fit",
        "ended": None if metrics is None else "2026-01-01T00:00:00+00:00",
        "error": None,
        "command": ["somewhere/train.py", "-m", "pooler=average,tome", "fusion=none,crosslmm"],
        "commit": "c0ffee0123456789",
        "uncommitted_changes": False,
        "data_fingerprint": {"train": "a" * 64, "val": "b" * 64},
        "seed": seed,
    }
    (folder / "provenance.json").write_text(json.dumps({**record, **(provenance or {})}))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if cost is not None:
        (folder / "cost.json").write_text(json.dumps(cost))
    if failed is not None:
        (folder / "failed.json").write_text(json.dumps({"message": failed, "traceback": "", "time": ""}))
    if curve:
        (folder / "csv" / "version_0").mkdir(parents=True)
        lines = ["epoch,step,val/accuracy", *(f"0,{step - 1},{value}" for step, value in curve)]
        (folder / "csv" / "version_0" / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def cost_of(llm_tokens: int, flops: float, per_frame: float = 1.0) -> dict[str, Any]:
    """What is read of a cost card."""
    return {
        "tokens": {"frames": 4, "source": 64, "pooled_per_frame": per_frame, "text": 9, "llm": llm_tokens},
        "parameters": {"llm": {"total": 10, "trained": 10}, "total": {"total": 1_500_000, "trained": 500_000}},
        "flops": {"prefill": {"llm_linear": flops / 2, "total": flops}},
    }


def named(pooler: str, fusion: str, seed: int) -> str:
    """Name of a run's folder in a sweep."""
    return f"pooler={pooler},fusion={fusion},seed={seed}"
