"""Tables as text: Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Sequence

from lightning_crosslmm.report.arms import Arm, choose_baselines
from lightning_crosslmm.report.estimates import estimate
from lightning_crosslmm.report.measures import MEASURES, tasks
from lightning_crosslmm.report.runs import Run
from lightning_crosslmm.report.tables import Table, difference

TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "±": r"$\pm$", "−": r"$-$",
    "–": "--",
}  # fmt: skip


def markdown(table: Table) -> str:
    """Write a table with its heading and notes."""
    if not table.rows:
        return f"## {table.title}\n\nNone.\n"
    numeric = [cell.value is not None for cell in table.rows[0]]
    lines = [_row(table.columns), _row(["---:" if is_number else "---" for is_number in numeric])]
    lines += [_row([cell.text for cell in row]) for row in table.rows]
    notes = "".join(f"- {_flat(note)}\n" for note in table.notes)
    return f"## {table.title}\n\n" + "\n".join(lines) + "\n" + (f"\n{notes}" if notes else "")


def latex(tables: Sequence[Table]) -> str:
    r"""Write tables for ``\input``, with the rules of the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        numeric = [cell.value is not None for cell in table.rows[0]] if table.rows else [False] * len(table.columns)
        rows = [[cell.text for cell in row] for row in table.rows]
        lines = [" & ".join(map(_tex, cells)) + r" \\" for cells in (table.columns, *rows)]
        begin = rf"\begin{{tabular}}{{{''.join('r' if is_number else 'l' for is_number in numeric)}}}"
        body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        notes = [f"% {_flat(note)}" for note in table.notes]
        parts.append("\n".join([f"% {_flat(table.title)}", begin, *body, r"\end{tabular}", *notes]))
    return "\n\n".join(parts) + "\n"


def runs_csv(runs: Sequence[Run], varying: Sequence[str]) -> str:
    """Write one row per run: how it ended, its varying settings, every number it left."""
    names = sorted({name for run in runs for name in run.numbers})
    head = ["run", "status", "seed", *varying, *names, "data", "commit", "message"]
    rows = [
        [run.name, run.status, "" if run.seed is None else run.seed]
        + [run.settings.get(name, "") for name in varying]
        + [_plain(run.numbers.get(name)) for name in names]
        + [run.data, run.commit, run.message]
        for run in runs
    ]
    return _csv([head, *rows])


def arms_csv(arms: Sequence[Arm], wanted_baseline: str | None) -> str:
    """Write one row per arm: accuracies with intervals, differences from the baseline, costs in units of one."""
    names, bases = tasks(arms), choose_baselines(arms, wanted_baseline)
    head = ["arm", "seeds", "baseline", "data"]
    for name in names:
        head += [f"{name} {what}" for what in ("mean", "half_width", "difference", "difference half_width", "shared")]
    rows = []
    for arm, base in zip(arms, bases, strict=True):
        row = [arm.label, " ".join(map(str, sorted(arm.by_seed))), base.label if base else "", arm.data]
        for name in names:
            for found in (estimate(list(arm.values(name).values())), difference(arm, base, name)):
                row += [_plain(found.mean), _plain(found.half_width)] if found else ["", ""]
            row.append(str(found.count) if found else "")
        rows.append([*row, *(_plain(measure.of(arm)) for measure in MEASURES)])
    return _csv([[*head, *(measure.key for measure in MEASURES)], *rows])


def _csv(rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"<(?=[\w/!])", "&lt;", _flat(cell)).replace("|", r"\|") for cell in cells) + " |"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, TEX)), lambda match: TEX[match[0]], _flat(text))
