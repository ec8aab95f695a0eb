"""A sweep's report: tables, figures and a page from the run folders below a folder."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.report.arms import Arm, group_runs, varying_settings
from lightning_crosslmm.report.figures import Drawing, draw_learning, draw_pareto
from lightning_crosslmm.report.formats import arms_csv, latex, markdown, runs_csv
from lightning_crosslmm.report.measures import FLOPS, TIME, tasks
from lightning_crosslmm.report.page import page
from lightning_crosslmm.report.runs import DONE, FAILED, UNFINISHED, Run, read_runs
from lightning_crosslmm.report.tables import Table, arms_table, claim_table, undone_table
from lightning_crosslmm.run_folder import replacing

FOLDER, CURVES = "report", "curves.png"


def write_report(sweep_dir: Path, out_dir: Path | None = None, baseline: str | None = None) -> list[Path]:
    """Compare the arms of a sweep: ``report.md``, ``.html``, ``.tex``, ``.csv`` (runs), ``arms.csv`` and figures.

    The same run folders give the same files, byte for byte.

    Args:
        sweep_dir: the folder with the run folders, at any depth.
        out_dir: where to write; ``sweep_dir/report`` if not given.
        baseline: the arm to compare with, as ``fusion=none``; see `choose_baselines` for what it is without.

    Returns:
        The files written.

    Raises:
        UserError: no runs, none of them done, files that cannot be read, or a baseline that is no arm.
    """
    runs = read_runs(sweep_dir)
    arms, notes = group_runs(runs)
    if not arms:
        undone = "; ".join(f"{run.name} {run.status}: {run.message}" for run in runs[:3])
        raise UserError(f"{sweep_dir}: none of its {len(runs)} runs is done, so there is nothing to compare ({undone})")
    tables = [arms_table(arms, baseline), claim_table(arms), undone_table(runs, arms)]
    command = _command(sweep_dir, out_dir, baseline)
    warnings, origins = [*notes, *_origins_differ(runs)], _origins(runs, command)
    figures = _figures(arms)
    title, lead, tiles = f"Sweep {sweep_dir.resolve().name}", _lead(arms, runs), _tiles(arms, runs, tables[2])
    fronts, curves = ([figures[name] for name in figures if (name == CURVES) is wanted] for wanted in (False, True))
    placed: list[Table | Drawing] = [tables[0], *fronts, tables[1], *curves, tables[2]]
    texts = {
        "report.md": _markdown(title, lead, warnings, tables, figures, origins),
        "report.tex": latex(tables[:2]),
        "report.csv": runs_csv(runs, varying_settings(runs)),
        "arms.csv": arms_csv(arms, baseline),
        "report.html": page(title, lead, tiles, warnings, placed, origins),
    }
    contents = {name: text.encode() for name, text in texts.items()}
    contents |= {name: drawing.png for name, drawing in figures.items()}
    written = []
    for name, content in contents.items():
        path = (out_dir or sweep_dir / FOLDER) / name
        with replacing(path) as part:
            part.write_bytes(content)
        written.append(path)
    return written


def _figures(arms: Sequence[Arm]) -> dict[str, Drawing]:
    """Draw what the runs have numbers for, by the names of the files."""
    main = next(iter(tasks(arms)), None)
    if main is None:
        return {}
    front = "Numbers are those of the table; bars are 95 % intervals over seeds."
    band = "Lines are means over seeds, bands reach from the lowest to the highest; grey are the other arms."
    drawn = {
        "pareto_flops.png": (f"{main} against prefill FLOPs", front, draw_pareto(arms, main, FLOPS)),
        "pareto_time.png": (f"{main} against measured prefill time", front, draw_pareto(arms, main, TIME)),
        CURVES: ("Learning curves", band, draw_learning(arms, main)),
    }
    return {name: Drawing(title, caption, png) for name, (title, caption, png) in drawn.items() if png is not None}


def _markdown(
    title: str,
    lead: str,
    warnings: Sequence[str],
    tables: Sequence[Table],
    figures: dict[str, Drawing],
    origins: dict[str, list[str]],
) -> str:
    parts = [f"# {title}\n", f"{lead}\n"]
    if warnings:
        parts.append("".join(f"- **Note** {line}\n" for line in warnings))
    parts += [markdown(table) for table in tables]
    parts += [f"## {of.title}\n\n![{of.title}]({name})\n\n{of.caption}\n" for name, of in figures.items()]
    parts.append("## Where this comes from\n")
    for name, lines in origins.items():
        parts.append(f"{name}:\n\n```text\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


def _lead(arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    return f"{len(arms)} arms, seeds {', '.join(map(str, seeds)) or 'unknown'}, {len(runs)} run folders."


def _tiles(arms: Sequence[Arm], runs: Sequence[Run], undone: Table) -> dict[str, int]:
    of = Counter(run.status for run in runs)
    missing = sum(row[1].text == "missing" for row in undone.rows)
    tiles = {"arms": len(arms), "runs done": of[DONE], "failed": of[FAILED], "unfinished": of[UNFINISHED]}
    return tiles | {"missing": missing}


def _origins_differ(runs: Sequence[Run]) -> list[str]:
    done, notes = [run for run in runs if run.status == DONE], []
    commits, data = Counter(run.commit or "unknown" for run in done), Counter(run.data or "unknown" for run in done)
    for what, found in (("commit", commits), ("data fingerprint", data)):
        if len(found) > 1:
            told = ", ".join(f"{name} ({count} runs)" for name, count in sorted(found.items()))
            notes.append(f"Runs are of more than one {what}: {told}")
    if any(commit.endswith("+") for commit in commits):
        notes.append("A commit with + is one whose tree had changes when the run started")
    return notes


def _origins(runs: Sequence[Run], command: str) -> dict[str, list[str]]:
    commands = Counter(run.command for run in runs if run.command)
    commits, data = (sorted({getattr(run, name) for run in runs} - {""}) for name in ("commit", "data"))
    found = {
        "Commands that made the runs": [
            f"{words}  # {count} runs" if count > 1 else words for words, count in sorted(commands.items())
        ],
        "Commits": commits,
        "Data fingerprints": data,
        "Command that made this report": [command],
    }
    return {name: lines for name, lines in found.items() if lines}


def _command(sweep_dir: Path, out_dir: Path | None, baseline: str | None) -> str:
    words = ["crosslmm", "report", str(sweep_dir)]
    words += ["--out", str(out_dir)] if out_dir else []
    words += ["--baseline", baseline] if baseline else []
    return shlex.join(words)
