import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_crosslmm.report.arms import group_runs, varying_settings
from lightning_crosslmm.report.formats import arms_csv, latex, markdown, runs_csv
from lightning_crosslmm.report.runs import read_runs
from lightning_crosslmm.report.tables import Cell, Table
from tests.sweeps import cost_of, named, write_run

TABLE = Table("Of 50 %", ("name_a", "x|y"), ((Cell("<b>a|b</b>\nc"), Cell("−1 ± 2", -1.0)),), ("a note",))


def test_markdown_keeps_cells_in_their_columns() -> None:
    assert markdown(TABLE) == (
        "## Of 50 %\n\n| name_a | x\\|y |\n| --- | ---: |\n| &lt;b>a\\|b&lt;/b> c | −1 ± 2 |\n\n- a note\n"
    )
    assert markdown(Table("Nothing", ("a",), ())) == "## Nothing\n\nNone.\n"


def test_latex_escapes_what_it_would_read() -> None:
    nasty = Table("t", ("a_b", "c"), ((Cell(r"100% & #1 {x} ~^ \cmd $"), Cell("0.5 ± 0.1", 0.5)),))
    assert latex([nasty]).splitlines()[2:] == [
        "% t",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b & c \\",
        r"\midrule",
        r"100\% \& \#1 \{x\} \textasciitilde{}\textasciicircum{} \textbackslash{}cmd \$ & 0.5 $\pm$ 0.1 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_latex_compiles(tmp_path: Path) -> None:
    (tmp_path / "report.tex").write_text(latex([TABLE, TABLE]))
    page = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{report}\end{document}"
    (tmp_path / "page.tex").write_text(page)
    done = subprocess.run(["pdflatex", "-halt-on-error", "page"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_of_runs_and_of_arms(tmp_path: Path) -> None:
    for seed, value in enumerate((0.25, 0.75)):
        metrics = {"val/accuracy": value, "prefill/time_s": 0.25}
        folder = tmp_path / named("average", "none", seed)
        write_run(folder, fusion="none", seed=seed, metrics=metrics, cost=cost_of(9, 3e6))
    write_run(tmp_path / named("tome", "none", 0), pooler="tome", fusion="none", metrics={"val/accuracy": 0.5})
    write_run(tmp_path / named("tome", "none", 1), pooler="tome", fusion="none", seed=1, failed="a, b\nc")
    runs = read_runs(tmp_path)
    found = rows(runs_csv(runs, varying_settings(runs)))
    assert [(row["run"], row["status"], row["val/accuracy"], row["message"]) for row in found] == [
        (named("average", "none", 0), "done", "0.25", ""),
        (named("average", "none", 1), "done", "0.75", ""),
        (named("tome", "none", 0), "done", "0.5", ""),
        (named("tome", "none", 1), "failed", "", "a, b\nc"),
    ]
    assert found[0]["pooler._target_"].endswith("AveragePooler") and found[0]["cost/flops/prefill/total"] == "3000000"
    average, tome = rows(arms_csv(group_runs(runs)[0], None))
    assert (average["arm"], average["seeds"], average["val/accuracy mean"]) == ("pooler=average", "0 1", "0.5")
    assert float(average["val/accuracy half_width"]) == pytest.approx(12.7062 * 0.25, rel=1e-5)
    assert average["val/accuracy difference"] == "" and average["baseline"] == "pooler=average"
    assert (tome["val/accuracy difference"], tome["val/accuracy shared"], tome["prefill_time_s"]) == ("0.25", "1", "")
    assert (average["prefill_flops"], average["prefill_time_s"]) == ("3000000", "0.25")
