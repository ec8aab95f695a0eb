"""How fast each backend of cross-attention is, by number of queries and keys; and what `backend=auto` takes.

    OMP_NUM_THREADS=1 python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --max-cells inf --write --out OUT

Forward, and forward with backward, of grouped heads as in the 7B (28 over 4, 128 channels) and the 0.5B (14 over 2, 64
channels); dense: one range of keys for all queries; ragged: four ranges of unequal length, or fewer where there are
fewer queries. Backends take turns; medians of `--turns`. `--write` writes the backend with the least time over the
sizes that all of them ran into `lightning_crosslmm/fusion/fastest.py`, which `auto` goes by.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

import torch
from gauges import Stopwatch
from geometry import heading_words, title
from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion.attention import BACKENDS, Spans, cross_attention, device_name
from lightning_crosslmm.fusion.fastest import FASTEST

QUERIES, KEYS = (1, 9, 96, 352, 2368), (5_832, 23_328, 93_312, 186_624)  # keys: 8, 32, 128, 256 frames of 729
HEADS = {64: (14, 2), 128: (28, 4)}
SHARES = torch.tensor([1, 2, 3, 4]) / 10  # of a ragged call's keys
TABLE = Path(__file__).resolve().parents[1] / "lightning_crosslmm" / "fusion" / "fastest.py"


@dataclass(frozen=True)
class Case:
    """One shape of call."""

    channels: int
    layout: str
    queries: int
    keys: int

    @property
    def cells(self) -> int:
        """Scores of all heads, were the call dense."""
        return self.queries * self.keys * HEADS[self.channels][0]

    def spans(self) -> Spans:
        """Who reads what."""
        if self.layout == "dense":
            return Spans(torch.tensor([0, self.queries]), torch.tensor([0]), torch.tensor([self.keys]))
        groups = min(len(SHARES), self.queries)
        ends = (SHARES[:groups].cumsum(0) / SHARES[:groups].sum() * self.keys).round().long()
        count_G = torch.full((groups,), self.queries // groups)
        count_G[-1] += self.queries - count_G.sum()
        zero = torch.zeros(1, dtype=torch.int64)
        return Spans(torch.cat([zero, count_G.cumsum(0)]), torch.cat([zero, ends[:-1]]), ends)


@dataclass(frozen=True)
class Timed:
    """What one backend took for one case."""

    channels: int
    layout: str
    queries: int
    keys: int
    backend: str
    forward_ms: float
    both_ms: float
    forward_tflops: float


def call(case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> Callable[[bool], None]:
    """Make the call of a case; it runs forward, and backward, too, where asked to."""
    heads, kv_heads = HEADS[case.channels]
    shapes = ((case.queries, heads), (case.keys, kv_heads), (case.keys, kv_heads))
    inputs = [torch.randn(*shape, case.channels, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    spans, grad_QHK = case.spans(), torch.ones_like(inputs[0])

    def run(has_backward: bool) -> None:
        if not has_backward:
            with torch.no_grad():
                cross_attention(*_three(inputs), spans, backend)
            return
        torch.autograd.grad(cross_attention(*_three(inputs), spans, backend), inputs, grad_QHK)

    return run


def _three(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs
    return query, key, value


def time_case(case: Case, backends: Sequence[str], device: torch.device, dtype: torch.dtype, turns: int) -> list[Timed]:
    """Let backends take turns at a case; one that cannot run it here is left out and named on stderr."""
    calls, spent_ms = {}, {}
    for backend in backends:
        try:
            calls[backend] = call(case, backend, device, dtype)
            for has_backward in (False, True):
                calls[backend](has_backward)
        except (UserError, RuntimeError) as error:
            sys.stderr.write(f"{backend}, {case}: {str(error).splitlines()[0]}\n")
            calls.pop(backend, None)
    watch = Stopwatch(device, time.process_time)
    for backend, has_backward in product(calls, (False, True)):
        spent_ms[backend, has_backward] = []
    for _ in range(turns):
        for backend, has_backward in spent_ms:
            watch.open("call")
            calls[backend](has_backward)
            watch.close()
            spent_ms[backend, has_backward].append(watch.read_ms()["call"])
    flops = 4 * case.spans().num_pairs * HEADS[case.channels][0] * case.channels
    found = []
    for backend in calls:
        forward, both = (statistics.median(spent_ms[backend, has_backward]) for has_backward in (False, True))
        found.append(Timed(**asdict(case), backend=backend, forward_ms=forward, both_ms=both,
                           forward_tflops=flops / forward / 1e9))  # fmt: skip
    return found


def fastest(rows: Sequence[Timed]) -> dict[int, str]:
    """Name the backend with the least time, forward and with backward, by channels, over cases that all ran."""
    best = {}
    for channels in sorted({row.channels for row in rows}):
        mine = [row for row in rows if row.channels == channels]
        backends = {row.backend for row in mine}
        cases: dict[tuple[str, int, int], dict[str, float]] = {}
        for row in mine:
            cases.setdefault((row.layout, row.queries, row.keys), {})[row.backend] = row.forward_ms + row.both_ms
        shared = [times for times in cases.values() if set(times) == backends]
        best[channels] = min(sorted(backends), key=lambda backend: sum(times[backend] for times in shared))
    return best


def write_table(best: dict[int, str], device: torch.device, dtype: torch.dtype, path: Path = TABLE) -> None:
    """Write what `auto` takes on this device and dtype; lines of others stay."""
    kind = str(dtype).removeprefix("torch.")
    known = {**FASTEST, **{(device_name(device.type), kind, channels): name for channels, name in best.items()}}
    head = path.read_text().split("FASTEST", 1)[0]
    lines = [f'    ("{name}", "{kind}", {channels}): "{backend}",' for (name, kind, channels), backend in known.items()]
    body = "\n".join(["FASTEST: dict[tuple[str, str, int], str] = {", *lines, "}"])
    path.write_text(f"{head}{body}\n")


def table(rows: Sequence[Timed]) -> list[str]:
    """Lay the times out as Markdown."""
    head = ("channels", "layout", "queries", "keys", "backend", "forward ms", "with backward ms", "forward TFLOP/s")
    lines = ["| " + " | ".join(head) + " |", "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |"]
    for row in rows:
        cells = (f"{row.channels}", row.layout, f"{row.queries:,}", f"{row.keys:,}", row.backend,
                 f"{row.forward_ms:,.3f}", f"{row.both_ms:,.3f}", f"{row.forward_tflops:,.3f}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure, print the table and the choices, and write them."""
    parser = argparse.ArgumentParser(description="Time the backends of cross-attention.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES)
    parser.add_argument("--keys", type=int, nargs="+", default=KEYS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS[1:], choices=BACKENDS[1:])
    parser.add_argument("--max-cells", type=float, default=3e7, help="leave out calls with more scores than these")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write what auto takes on this device")
    parser.add_argument("--out", type=Path, default=Path("runs/attention"), help="folder of attention.csv and .md")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    backends = (
        chosen.backends if chosen.device == "cuda" else [b for b in chosen.backends if b in ("sdpa", "reference")]
    )
    cases = [Case(*words) for words in product(HEADS, ("dense", "ragged"), chosen.queries, chosen.keys)]
    rows = []
    for case in cases:
        if case.cells <= chosen.max_cells:
            rows += time_case(case, backends, device, dtype, chosen.turns)
    left_out = sum(case.cells > chosen.max_cells for case in cases)
    best = fastest(rows)
    choices = ", ".join(f"{backend} for {channels} channels" for channels, backend in best.items())
    page = [
        *title("Backends of cross-attention"),
        heading_words(device, "grouped heads", str(dtype).removeprefix("torch.")),
        f"{left_out} of {len(cases)} calls are past --max-cells {chosen.max_cells:g}; fastest: {choices}",
        "",
        *table(rows),
    ]
    print("\n".join(page))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "attention.md").write_text("\n".join(page) + "\n")
    with (chosen.out / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    if chosen.write:
        write_table(best, device, dtype)


if __name__ == "__main__":
    main()
