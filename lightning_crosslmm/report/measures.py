"""What is told of an arm: which numbers of its runs, in which unit, as which text."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_crosslmm.report.arms import Arm
from lightning_crosslmm.report.estimates import Estimate

TASK = re.compile(r"(val|test)/(accuracy|circular)(/.+)?")
MAIN = ("val/accuracy", "test/accuracy")


@dataclass(frozen=True)
class Measure:
    """A cost of an arm.

    Args:
        key: its column in ``arms.csv``, with the unit there.
        title: its column in tables, with the unit there.
        names: where a run's numbers have it, the favourite first.
        scale: from the first unit to the second.
        digits: behind the point in tables; None for three that count.
    """

    key: str
    title: str
    names: tuple[str, ...]
    scale: float = 1.0
    digits: int | None = None

    def of(self, arm: Arm) -> float | None:
        """Give the mean over an arm's runs in the unit of ``arms.csv``; None where none tells."""
        for name in self.names:
            if values := arm.values(name):
                return statistics.fmean(values.values())
        return None

    def text(self, value: float | None) -> str:
        """Write a value for a table."""
        return number(value * self.scale, self.digits) if value is not None else "–"


FLOPS = Measure("prefill_flops", "prefill, GFLOP", ("cost/flops/prefill/total",), 1e-9)
TIME = Measure("prefill_time_s", "prefill, ms", ("prefill/time_s",), 1e3)
MEASURES = (
    Measure("tokens_per_frame", "tokens per frame", ("prefill/pooled_per_frame", "cost/tokens/pooled_per_frame")),
    Measure("llm_tokens", "LLM tokens", ("cost/tokens/llm", "prefill/llm_tokens")),
    FLOPS,
    TIME,
    Measure("peak_bytes", "peak memory, MiB", ("prefill/peak_bytes",), 2.0**-20),
    Measure("parameters", "parameters, M", ("cost/parameters/total/total",), 1e-6),
    Measure("trained_parameters", "trained, M", ("cost/parameters/total/trained",), 1e-6),
    Measure("training_s", "training, s", ("train/seconds",), 1.0, 0),
)


def tasks(arms: Sequence[Arm]) -> list[str]:
    """Name the accuracies of any run, the main one first; of equal ones (a single question type) the first."""
    found = {name for arm in arms for run in arm.by_seed.values() for name in run.numbers if TASK.fullmatch(name)}
    kept: dict[str, str] = {}
    for name in sorted(found, key=lambda name: (name not in MAIN, name)):
        values = str([arm.values(name) for arm in arms])
        kept.setdefault(values, name)
    return list(kept.values())


def number(value: float, digits: int | None = None) -> str:
    """Write a number with so many digits behind the point, or with three that count."""
    if digits is None and value == round(value):
        digits = 0
    elif digits is None:
        digits = 2 - min(2, math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def share(found: Estimate | None, signed: bool = False) -> str:
    """Write an accuracy, or with its sign a difference of two, and its interval."""
    if found is None:
        return "–"
    text = f"{found.mean:+.3f}".replace("-", "−") if signed else f"{found.mean:.3f}"
    return text if found.half_width is None else f"{text} ± {found.half_width:.3f}"
