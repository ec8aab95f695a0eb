"""The report as one HTML page that needs nothing else: styles, script and pictures lie in it."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from lightning_crosslmm.report.figures import Drawing
from lightning_crosslmm.report.tables import FAILS, HOLDS, UNDECIDED, Cell, Table

CLASSES = {HOLDS: "holds", FAILS: "fails", UNDECIDED: "open"}
CLASSES |= {word: word for word in ("failed", "unfinished", "missing")}


def page(
    title: str,
    lead: str,
    tiles: Mapping[str, int],
    warnings: Sequence[str],
    parts: Sequence[Table | Drawing],
    origins: Mapping[str, Sequence[str]],
) -> str:
    """Write the page.

    Args:
        title: its heading.
        lead: the sentence below it.
        tiles: counts to see first, by their names.
        warnings: what to know before reading on.
        parts: tables and figures as they follow each other.
        origins: lines to show as they are, by heading: commands, commits.

    Returns:
        The text of the file, every value escaped.
    """
    blocks = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>', '<div class="tiles">']
    blocks += [f'<div class="tile"><b>{count}</b><span>{escape(name)}</span></div>' for name, count in tiles.items()]
    blocks.append("</div>")
    if warnings:
        blocks.append(f'<section class="warnings">{_list(warnings)}</section>')
    blocks += [_table(part) if isinstance(part, Table) else _figure(part) for part in parts]
    shown = "".join(f"<p>{escape(name)}</p>\n<pre>{escape(chr(10).join(of))}</pre>\n" for name, of in origins.items())
    blocks.append(f"<section>\n<h2>Where this comes from</h2>\n{shown}</section>")
    template = Template(files("lightning_crosslmm.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(blocks))


def _table(table: Table) -> str:
    if not table.rows:
        return f"<section>\n<h2>{escape(table.title)}</h2>\n<p>None.</p>\n</section>"
    numeric = [cell.value is not None for cell in table.rows[0]]
    heads = "".join(
        f'<th scope="col"{" class=number" if is_number else ""}><button type="button">{_breakable(name)}</button></th>'
        for name, is_number in zip(table.columns, numeric, strict=True)
    )
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f'<section>\n<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n{_list(table.notes)}</section>"
    )


def _cell(cell: Cell) -> str:
    kind = "number" if cell.value is not None else CLASSES.get(cell.text, "label" if len(cell.text) < 80 else "long")
    key = cell.text if cell.value is None else f"{cell.value:.10g}" if math.isfinite(cell.value) else ""
    return f'<td class="{kind}" data-value="{escape(key)}">{escape(cell.text)}</td>'


def _breakable(name: str) -> str:
    return escape(name).replace("/", "/<wbr>")


def _figure(drawing: Drawing) -> str:
    title, source = escape(drawing.title), f"data:image/png;base64,{base64.b64encode(drawing.png).decode('ascii')}"
    return (
        f'<section>\n<h2>{title}</h2>\n<figure><img alt="{title}" src="{source}">\n'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>\n</section>"
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>\n" if lines else ""
