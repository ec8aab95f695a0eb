"""The page in a browser: it renders, sorts, says nothing on the console and asks nobody for anything."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_crosslmm.report import write_report
from tests.sweeps import cost_of, named, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
NASTY = "<script>document.title='owned'</script> \"quoted\" & <img src=x>"
SCORES = {("average", "none"): (0.31, 0.35), ("tome", "none"): (0.9, 0.8), ("max", "crosslmm"): (0.5, 0.52)}

SCRIPT = """
const table = document.querySelector("table");
const buttons = [...table.querySelectorAll("th button")];
const seen = [];
const look = (column) => {
  const head = table.querySelector("th[aria-sort]");
  const name = head ? head.textContent : "";
  seen.push([head ? head.ariaSort : "", name, [...table.tBodies[0].rows].map((row) => row.cells[column].textContent)]);
};
look(1);
for (const column of [3, 3, 1, 1]) {
  buttons[column].click();
  look(column);
}
buttons[2].focus();
const images = [...document.images];
document.title = JSON.stringify({
  seen,
  images: images.length,
  drawn: images.every((image) => image.complete && image.naturalWidth > 300),
  focus: document.activeElement === buttons[2] && buttons[2].tabIndex === 0,
});
"""


class Cells(HTMLParser):
    """Collects the text of each table's rows, every attribute of every tag, and the title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.in_cell, self.in_title, self.title = False, False, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.in_title = tag == "title"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_title = False
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for (pooler, fusion), values in SCORES.items():
        for seed, value in enumerate(values):
            metrics = {"val/accuracy": value, "prefill/time_s": value / 100}
            place = {"pooler": pooler, "fusion": fusion, "seed": seed}
            cost = cost_of(9, 1e9 * value)
            write_run(folder / named(**place), **place, metrics=metrics, curve=[(1, 0.0), (2, value)], cost=cost)
    write_run(folder / "pooler=bad,seed=0", pooler="bad", failed=NASTY)
    paths = write_report(folder)
    return next(path for path in paths if path.suffix == ".html")


def browse(page: Path, tmp_path: Path, script: str = "") -> tuple[str, str]:
    """Open a copy of the page whose script ends in one of ours; give its DOM and what the console said."""
    assert CHROMIUM is not None
    copy = tmp_path / "page.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>\n</body>") == 1
    copy.write_text(text.replace("</script>\n</body>", f"{script}</script>\n</body>"), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000"]
    words.append(f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(
        [CHROMIUM, *words, copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_values_are_escaped_and_nothing_is_fetched(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert NASTY not in text and [row[2] for row in Cells(text).rows if len(row) == 3][-1] == NASTY
    for tag, name, value in Cells(text).attributes:
        if name in ("src", "href", "action", "srcset", "data"):
            assert value.startswith("data:"), f"{tag} {name}={value[:80]}"
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


@needs_chromium
def test_it_renders_and_sorts_without_a_word_on_the_console(page: Path, tmp_path: Path) -> None:
    dom, console = browse(page, tmp_path, SCRIPT)
    assert console == ""
    found = json.loads(Cells(dom).title)
    assert found["images"] == 3 and found["drawn"] and found["focus"]
    by_score = ["0.330 ± 0.254", "0.510 ± 0.127", "0.850 ± 0.635"]
    names = [f"pooler={pooler}, fusion={fusion}" for pooler, fusion in SCORES]
    assert found["seen"] == [
        ["", "", sorted(names)],
        ["descending", "val/accuracy", by_score[::-1]],
        ["ascending", "val/accuracy", by_score],
        ["ascending", "arm", sorted(names)],
        ["descending", "arm", sorted(names)[::-1]],
    ]


@needs_chromium
def test_a_console_error_and_a_fetch_would_be_seen(page: Path, tmp_path: Path) -> None:
    console = browse(page, tmp_path, "console.error('on purpose'); fetch('https://example.org');")[1]
    assert "on purpose" in console and "Content Security Policy" in console
