"""How long a clip takes to read, and how much memory: CrossLMM beside LLaVA-OneVision as transformers has it.

    OMP_NUM_THREADS=1 python benchmarks/prefill.py
    python benchmarks/prefill.py --geometry 7b --device cuda --out OUT

Both models have the same encoder, LLM and clip, random weights, and take turns in one process; LLaVA-OneVision runs its
own code on every token of every frame. The scaled geometry keeps the 7B's ratios of work and of tokens, which are
counted from the modules and printed. What the columns mean stands in `benchmarks/README.md`.
"""

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from gauges import Stopwatch, peak_bytes
from geometry import (
    CHEAP,
    SCALED,
    TRUE,
    Reader,
    build_ours,
    build_theirs,
    configure,
    count_work,
    heading_words,
    peak_rates,
    title,
    work_ratios,
)

from lightning_crosslmm.cost import Meter
from lightning_crosslmm.errors import UserError

GEOMETRIES = {"scaled": SCALED, "7b": TRUE}
ARMS = {"": "CrossLMM", CHEAP: "CrossLMM, small cache"}
TARGET_FRAMES, TARGETS = 256, {"prefill_ms": 0.25, "peak_mib": 0.1}
MIB = 2**20
NOTES = """
![prefill time and peak memory over frames](prefill.png)

- Same encoder, LLM, frames and question for all; random weights. LLaVA-OneVision is transformers' own class and code:
  all frames through the tower at once, all their pooled tokens through the LLM, nothing cut off. Its pixels are
  normalised before the clock starts, ours while it runs.
- Models take turns, medians over turns; every turn is in `prefill.csv`. Prefill ends with the logits of the answer's
  first token; `ms/token` is the mean over those that follow. Memory is of one reading, caches included.
- GFLOP: 2 per multiply-accumulate, attention over all pairs; roofline: the least time that causal attention and all
  else need at the peak above, over the measured time.
- The encoder does the same work on both sides, so it bounds the ratio from below: its shares are in the first table.
"""


@dataclass
class Turn:
    """One reading of one clip by one model; what did not fit has no numbers."""

    model: str
    frames: int
    turn: int
    prefill_ms: float = float("nan")
    encoder_ms: float = float("nan")
    token_ms: float = float("nan")
    peak_mib: float = float("nan")
    gflop: float = float("nan")
    least_ms: float = float("nan")


class Bench:
    """Models that take turns at the same clips.

    Args:
        readers: the models, LLaVA-OneVision last.
        configs: the settings of each.
        text_tokens: of the question.
        num_tokens: decoded after the first one of the answer.
    """

    def __init__(self, readers: Sequence[Reader], configs: Sequence[Any], text_tokens: int, num_tokens: int) -> None:
        self.readers, self.configs = readers, configs
        self.text_tokens, self.num_tokens = text_tokens, num_tokens
        self.device = next(readers[0].module.parameters()).device
        self.watches = []
        for reader in readers:
            # on a CPU the process's own time: other work on the machine does not count
            self.watches.append(Stopwatch(self.device, time.process_time))
            self.watches[-1].watch("encoder", reader.encoder)
        self.precision = str(configs[0].trainer.precision)
        self.peak_flops_per_s, self.bandwidth = peak_rates(self.device, self.precision)

    @torch.no_grad()
    def measure(self, num_frames: int, turns: int) -> list[Turn]:
        """Let each model read a clip once for its memory, which warms up, and then `turns` times for the clock."""
        found = []
        for number in range(turns + 1):
            for place, reader in enumerate(self.readers):
                gc.collect()
                try:
                    if number == 0:
                        found += self._count(place, reader, num_frames, turns)
                    else:
                        self._time(place, reader, found[place * turns + number - 1])
                except torch.OutOfMemoryError:
                    found += [Turn(reader.name, num_frames, each + 1) for each in range(turns)][: turns * (not number)]
        return found

    def _count(self, place: int, reader: Reader, num_frames: int, turns: int) -> list[Turn]:
        work = count_work(self.configs[place], num_frames, self.text_tokens, is_plain=place == len(self.readers) - 1)
        least_s = max(work.causal_flops / self.peak_flops_per_s, work.moved_bytes / self.bandwidth)
        clip = reader.clip(num_frames, self.text_tokens)
        if self.device.type == "cuda":
            peak = peak_bytes(self.device, lambda: reader.read(clip))
        else:
            meter = Meter(reader.module)
            with meter:
                reader.read(clip)
            peak = meter.peak_bytes
        counts = {"peak_mib": peak / MIB, "gflop": sum(work.flops.values()) / 1e9, "least_ms": least_s * 1e3}
        return [Turn(reader.name, num_frames, each + 1, **counts) for each in range(turns)]

    def _time(self, place: int, reader: Reader, turn: Turn) -> None:
        clip, watch = reader.clip(turn.frames, self.text_tokens), self.watches[place]
        watch.listening = True
        watch.open("prefill")
        decode = reader.read(clip)
        watch.close()
        watch.listening = False
        watch.open("tokens")
        for _ in range(self.num_tokens):
            decode()
        watch.close()
        ms = watch.read_ms()
        turn.prefill_ms, turn.encoder_ms, turn.token_ms = ms["prefill"], ms["encoder"], ms["tokens"] / self.num_tokens


def medians(turns: Sequence[Turn]) -> dict[str, dict[int, dict[str, float]]]:
    """Take medians over turns: by model, then frames, then column."""
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for name in dict.fromkeys(turn.model for turn in turns):
        for frames in sorted({turn.frames for turn in turns}):
            same = [asdict(turn) for turn in turns if turn.model == name and turn.frames == frames]
            columns = list(same[0])[3:]
            rows.setdefault(name, {})[frames] = {c: statistics.median(each[c] for each in same) for c in columns}
    return rows


def slope(row: dict[int, dict[str, float]], column: str) -> float:
    """Fit a line over frames by least squares and give what one more adds; clips that did not fit are left out."""
    points = [(frames, each[column]) for frames, each in row.items() if each[column] == each[column]]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else float("nan")


def table(rows: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """Lay medians out as Markdown, a ratio to LLaVA-OneVision beside time and memory, and slopes below."""
    head = (
        "model",
        "frames",
        "prefill ms",
        "ratio",
        "encoder ms",
        "ms/token",
        "peak MiB",
        "ratio",
        "GFLOP",
        "roofline",
    )
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    theirs = list(rows.values())[-1]
    for name, row in rows.items():
        for frames, each in row.items():
            time_ratio, memory_ratio = (each[c] / theirs[frames][c] for c in ("prefill_ms", "peak_mib"))
            cells = [
                name, str(frames), f"{each['prefill_ms']:,.1f}", f"{time_ratio:.3f}", f"{each['encoder_ms']:,.1f}",
                f"{each['token_ms']:.2f}", f"{each['peak_mib']:,.1f}", f"{memory_ratio:.3f}", f"{each['gflop']:,.1f}",
                f"{each['least_ms'] / each['prefill_ms']:.1%}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "One more frame adds (least squares over the clips above):", ""]
    lines += ["| model | ms | MiB | GFLOP |", "| --- | ---: | ---: | ---: |"]
    for name, row in rows.items():
        lines.append(
            "| " + " | ".join([name, *(f"{slope(row, c):.3f}" for c in ("prefill_ms", "peak_mib", "gflop"))]) + " |"
        )
    if TARGET_FRAMES in theirs:
        lines += ["", f"At {TARGET_FRAMES} frames, of LLaVA-OneVision's:", ""]
    for name, row in list(rows.items())[:-1] if TARGET_FRAMES in theirs else []:
        shares = {c: row[TARGET_FRAMES][c] / theirs[TARGET_FRAMES][c] for c in TARGETS}
        lines.append(f"- {name}: " + ", ".join(f"{c} {shares[c]:.3f} (target {most})" for c, most in TARGETS.items()))
    return lines


def draw(rows: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Plot time and memory over frames, both axes logarithmic."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, column, label in zip(axes, ("prefill_ms", "peak_mib"), ("prefill, ms", "peak, MiB"), strict=True):
        for name, row in rows.items():
            axis.plot(list(row), [each[column] for each in row.values()], marker="o", label=name)
        axis.set(xlabel="frames", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(list(row), [str(frames) for frames in row])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def heading(bench: Bench, geometry: str) -> list[str]:
    """Say where and with what the numbers were measured, and how alike the geometries are."""
    on_cuda = bench.device.type == "cuda"
    clock = "CUDA events" if on_cuda else "the process's CPU time"
    memory = "max_memory_allocated" if on_cuda else "tensors alive at once"
    lines = [
        "- " + heading_words(bench.device, f"{geometry} geometry", bench.precision),
        f"- time: {clock}; memory: {memory}, above weights and inputs",
        f"- peak: {bench.peak_flops_per_s / 1e12:.3f} TFLOP/s",
        f"- CrossLMM, small cache: `{CHEAP}`; {{kv}} is as wide as the keys of one layer",
        "",
        f"| ratio | 7b | {geometry} | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    here = work_ratios(GEOMETRIES[geometry])
    for name, true in work_ratios(TRUE).items():
        lines.append(f"| {name} | {true:.3f} | {here[name]:.3f} | {here[name] / true - 1:+.1%} |")
    return [*lines, ""]


def main() -> None:
    """Measure, print the tables, and write them."""
    parser = argparse.ArgumentParser(description="Prefill of CrossLMM beside transformers' LLaVA-OneVision.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="scaled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument(
        "--arms", nargs="+", default=["", CHEAP], help="settings of ours; {kv}: as wide as a layer's keys"
    )
    parser.add_argument("--text", type=int, default=64, help="tokens of the question")
    parser.add_argument("--tokens", type=int, default=8, help="decoded after the first one")
    parser.add_argument("--turns", type=int, default=3, help="timed, after one that measures memory and warms up")
    parser.add_argument("--out", type=Path, default=Path("runs/prefill"), help="folder of prefill.csv, .md and .png")
    chosen = parser.parse_args()
    try:
        configs = [configure(GEOMETRIES[chosen.geometry], arm) for arm in (*chosen.arms, "")]
        names = [ARMS.get(arm, f"CrossLMM {arm}") for arm in chosen.arms]
        ours = [build_ours(*pair, chosen.device) for pair in zip(configs[:-1], names, strict=True)]
        bench = Bench([*ours, build_theirs(configs[-1], chosen.device)], configs, chosen.text, chosen.tokens)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    print("\n".join(heading(bench, chosen.geometry)), flush=True)
    turns = []
    for frames in chosen.frames:
        turns += bench.measure(frames, chosen.turns)
        done = medians(turns)
        print(
            f"{frames} frames: " + ", ".join(f"{row[frames]['prefill_ms']:,.0f} ms" for row in done.values()),
            flush=True,
        )
    rows, chosen.out = medians(turns), chosen.out.resolve()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "prefill.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(turns[0])))
        writer.writeheader()
        writer.writerows(asdict(turn) for turn in turns)
    page = "\n".join([*title("Prefill"), *heading(bench, chosen.geometry), *table(rows)])
    (chosen.out / "prefill.md").write_text(f"{page}\n{NOTES}")
    draw(rows, chosen.out / "prefill.png")
    print("\n" + "\n".join(table(rows)))


if __name__ == "__main__":
    main()
