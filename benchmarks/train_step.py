"""How much of the hardware a training step uses: time and MFU of the 2B's finetune stage, on packed rows.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py
    python benchmarks/train_step.py --geometry 2b --device cuda --steps 10 --out OUT

Optimizer steps as `step.py` does them, on clips of noise: `--samples` of `--num-frames` frames in one packed row, so
that nothing waits for data. MFU is ``FLOPs / (seconds of a step * peak)``: forward and backward of every sample as the
cost card counts them, causal attention half, what checkpointing runs again left out; the peak is that of the GPU's
sheet, or of a product of two matrices on this CPU.
"""

import argparse
import csv
import itertools
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from geometry import SCALED, SEVEN, heading_words, peak_rates, title
from step import PARTS, REST, TOTAL, Arm, compose_arm

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.compose import ANY_TARGET, build_model, instantiate
from lightning_crosslmm.cost import Sample
from lightning_crosslmm.cost.meta import stored_dtype
from lightning_crosslmm.cost.phases import train_step
from lightning_crosslmm.errors import UserError

STAGE = ("experiment=[crosslmm_2b,finetune]", *SEVEN[1:], "llm.tokenizer=byte")
GEOMETRIES = {"scaled": (*STAGE, *SCALED[len(SEVEN) :]), "2b": STAGE}
TRAINERS = {"cpu": "trainer=cpu", "cuda": "trainer=gpu"}


def packed(sample: Sample, num_samples: int, image_size: int) -> VideoBatch:
    """Put samples of noise, all alike, into one row."""
    batch = sample.batch(image_size, num_samples, device="cpu")
    return replace(
        batch,
        frames_FCHW=torch.randint(0, 256, tuple(batch.frames_FCHW.shape), dtype=torch.uint8),
        row_of_sample=torch.zeros_like(batch.row_of_sample),
    )


def step_flops(config: Any, sample: Sample) -> int:
    """Count one sample's forward and backward pass, with what the settings freeze and without recomputation."""
    precision = str(config.trainer.precision)
    with torch.device("meta"):
        model = build_model(config, ANY_TARGET)
    instantiate(config.optim, ANY_TARGET).freeze(model)
    meter = train_step(model.to(stored_dtype(precision)), sample.batch(model.encoder.image_size), precision)
    return sum(meter.causal_flops.values())


def measure(config: Any, sample: Sample, num_samples: int, steps: int, warmup: int) -> dict[str, float]:
    """Train on one packed row again and again.

    Returns:
        Milliseconds of each part, FLOPs of a step, the share of the peak, and the most memory above weights and states.
    """
    flops = num_samples * step_flops(config, sample)
    device = torch.device("cuda" if config.trainer.accelerator == "gpu" else "cpu")
    batch = packed(sample, num_samples, config.encoder.image_size).to(device)
    arm = Arm(config, itertools.repeat(batch), ("noise",))
    for number in range(warmup + steps):
        arm.time_step(keep=number >= warmup)
    arm.measure_memory()
    found = arm.summary()
    row = {f"{part}, ms": found["parts"][part]["median_ms"] for part in (*PARTS, REST, TOTAL)}
    peak, _ = peak_rates(arm.device, str(config.trainer.precision))
    mfu = flops / (row[f"{TOTAL}, ms"] / 1e3 * peak)
    return {**row, "TFLOP": flops / 1e12, "MFU": mfu, "step memory, MiB": found["peak_bytes"] / 2**20}


def table(row: dict[str, float]) -> list[str]:
    """Write a row as Markdown, one line per column."""
    shown = {name: f"{value:.1%}" if name == "MFU" else f"{value:,.2f}" for name, value in row.items()}
    return ["| of a step | value |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in shown.items())]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time and MFU of a training step on packed rows of noise.")
    parser.add_argument("overrides", nargs="*", help="settings of train.py; before the options")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="scaled")
    parser.add_argument("--device", choices=TRAINERS, default="cpu")
    parser.add_argument("--samples", type=int, default=4, help="in the row, 2 or more")
    parser.add_argument("--num-frames", type=int, default=32, help="of a sample")
    parser.add_argument("--text", type=int, default=256, help="text tokens of a sample, half of them answer")
    parser.add_argument("--steps", type=int, default=5, help="timed, 1 or more")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/train_step"), help="folder of train_step.csv and .md")
    return parser.parse_args(words)


def main() -> None:
    """Measure, print the table, and write it."""
    chosen = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="You are trying to `self.log")  # no Trainer runs these steps
    try:
        words = [*GEOMETRIES[chosen.geometry], TRAINERS[chosen.device], *chosen.overrides]
        config = compose_arm(words, None)
        sample = Sample(chosen.num_frames, chosen.text, max(1, chosen.text // 2))
        row = measure(config, sample, chosen.samples, chosen.steps, chosen.warmup)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    row_of = f"{chosen.samples} samples of {chosen.num_frames} frames and {chosen.text} text tokens in a row"
    words = heading_words(torch.device(chosen.device), f"{chosen.geometry} geometry", str(config.trainer.precision))
    page = [*title("A training step"), f"{words}; {row_of}", "", *table(row)]
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "train_step.md").write_text("\n".join(page) + "\n")
    with (chosen.out / "train_step.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(row), list(row.values())])
    print("\n".join(page))


if __name__ == "__main__":
    main()
