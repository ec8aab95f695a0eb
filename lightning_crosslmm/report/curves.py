"""What the CSV logger of a run has written, as curves over optimizer steps."""

import csv
import math
from pathlib import Path

Curve = list[tuple[int, float]]


def read_curves(csv_dir: Path) -> dict[str, Curve]:
    """Read ``version_*/metrics.csv`` of one run; where a resumed part repeats a metric's steps, the later part counts.

    Returns:
        For each metric its (step, value) pairs, steps rising; values that are not finite are left out.
    """
    merged: dict[str, dict[int, float]] = {}
    for path in sorted(csv_dir.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        part: dict[str, dict[int, float]] = {}
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if name not in ("step", "epoch") and value:
                        part.setdefault(name, {})[int(row["step"])] = float(value)
        for name, points in part.items():
            before = merged.get(name, {})
            merged[name] = {step: value for step, value in before.items() if step < min(points)} | points
    finite = {name: {s: v for s, v in points.items() if math.isfinite(v)} for name, points in merged.items()}
    return {name: sorted(points.items()) for name, points in finite.items() if points}
