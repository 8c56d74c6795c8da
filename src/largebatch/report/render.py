"""A report's sections as one self-contained HTML page, or as Markdown beside its pictures."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from largebatch.report.style import Picture, css_palette, inline_svg
from largebatch.report.summary import KeyFigure
from largebatch.report.tables import Table


@dataclass(frozen=True)
class Notes:
    """Remarks that a reader should not miss."""

    lines: list[str]


@dataclass(frozen=True)
class KeyFigures:
    """The final figures of one run."""

    figures: list[KeyFigure]


Block = str | Notes | KeyFigures | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading (level 2 or 3) and what stands under it."""

    title: str
    blocks: list[Block]
    level: int = 2


_CSS = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .2rem}
h2{font-size:1.25rem;margin:2.4rem 0 .6rem;border-bottom:1px solid var(--grid);padding-bottom:.2rem}
h3{font-size:1.05rem;margin:1.6rem 0 .4rem}
.notes{border-left:3px solid var(--series-2);padding:.1rem 0 .1rem .9rem;margin:1rem 0}
.notes p{margin:.25rem 0}
.key{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.8rem;margin:.8rem 0 1.4rem}
.key div{border:1px solid var(--grid);border-radius:6px;padding:.6rem .8rem}
.key b{display:block;font-size:1.35rem;font-weight:600;line-height:1.3}
.key small{display:block;color:var(--muted);font-size:.8rem;line-height:1.35}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1rem 1.4rem;margin:1rem 0}
figure{margin:0;break-inside:avoid}
figure.wide{grid-column:1/-1}
figure svg{display:block;width:100%;height:auto}
figcaption{font-size:.82rem;color:var(--muted);margin-top:.3rem;line-height:1.4}
.scroll{overflow-x:auto;margin:.4rem 0 1.2rem}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:.3rem;white-space:nowrap}
th,td{text-align:left;padding:.22rem .9rem .22rem 0;vertical-align:top}
th,td{border-bottom:1px solid var(--grid)}
td{overflow-wrap:anywhere}
th{font-weight:500}
tbody th,.n{white-space:nowrap}
.n{text-align:right}
thead th{color:var(--muted);vertical-align:bottom}
thead .n{white-space:normal}
@media(max-width:40rem){.figures{grid-template-columns:minmax(0,1fr)}}
@media print{body{font-size:10pt;max-width:none;margin:0}h2,h3,caption{break-after:avoid}
tr{break-inside:avoid}.scroll{overflow:visible}}
"""


def to_html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page: figures inline, no script, nothing fetched."""
    body = [f"<h1>{_text(title)}</h1>", f"<p>{_text(lead)}</p>"]
    for section in sections:
        body.append(f"<h{section.level}>{_text(section.title)}</h{section.level}>")
        for figures, run in _split_pictures(section.blocks):
            inner = "\n".join(map(_html_block, run))
            body.append(f'<div class="figures">\n{inner}\n</div>' if figures else inner)
    page = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{css_palette()}{_CSS}</style>\n</head>\n<body>\n{page}\n</body>\n</html>\n"
    )


def to_markdown(title: str, lead: str, sections: Sequence[Section], folder: str) -> str:
    """The same as GitHub's Markdown, with the pictures linked from `folder`."""
    parts = [f"# {_escape(title)}", _escape(lead)]
    for section in sections:
        parts.append(f"{'#' * section.level} {_escape(section.title)}")
        parts += [_markdown_block(block, folder) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _split_pictures(blocks: Sequence[Block]) -> list[tuple[bool, list[Block]]]:
    """Consecutive pictures share a grid."""
    runs: list[tuple[bool, list[Block]]] = []
    for block in blocks:
        is_picture = isinstance(block, Picture)
        if runs and runs[-1][0] == is_picture:
            runs[-1][1].append(block)
        else:
            runs.append((is_picture, [block]))
    return runs


def _html_block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{_text(block)}</p>"
        case Notes():
            return '<div class="notes">' + "".join(f"<p>{_text(line)}</p>" for line in block.lines) + "</div>"
        case KeyFigures():
            cells = [
                f"<div><small>{_text(figure.label)}</small><b>{_text(figure.value)}</b>"
                + "".join(f"<small>{_text(line)}</small>" for line in figure.against)
                + "</div>"
                for figure in block.figures
            ]
            return f'<div class="key">{"".join(cells)}</div>'
        case Picture():
            svg = inline_svg(block).replace("<svg", f'<svg role="img" aria-label="{_text(block.caption)}"', 1)
            wide = ' class="wide"' if block.wide else ""
            return (
                f'<figure id="{_text(block.name)}"{wide}>{svg}<figcaption>{_text(block.caption)}</figcaption></figure>'
            )
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    numeric = [_is_numeric([row[i] for row in table.rows]) for i in range(len(table.columns))]
    kind = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(f'<th scope="col"{k}>{_text(name)}</th>' for name, k in zip(table.columns, kind, strict=True))
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{k}>{_text(cell)}</td>" for cell, k in zip(rest, kind[1:], strict=True))
        rows.append(f'<tr><th scope="row"{kind[0]}>{_text(first)}</th>{cells}</tr>')
    body = "\n".join(rows)
    caption = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _markdown_block(block: Block, folder: str) -> str:
    match block:
        case str():
            return _escape(block)
        case Notes():
            return "\n".join(f"> {_escape(line)}\n>" for line in block.lines).removesuffix("\n>")
        case KeyFigures():
            rows = [[figure.label, figure.value, "; ".join(figure.against)] for figure in block.figures]
            return _markdown_table(Table("", ["", "Reached", "Against"], rows))
        case Picture():
            return f"![{_escape(block.caption)}]({folder}/{block.name}.png)\n\n*{_escape(block.caption)}*"
        case Table():
            return (f"**{_escape(block.title)}**\n\n" if block.title else "") + _markdown_table(block)


def _markdown_table(table: Table) -> str:
    numeric = [_is_numeric([row[i] for row in table.rows]) for i in range(len(table.columns))]
    rule = ["---:" if is_number else "---" for is_number in numeric]
    lines = [[_escape(cell) for cell in table.columns], rule, *([_escape(cell) for cell in row] for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_numeric(cells: Sequence[str]) -> bool:
    return bool(cells) and all(re.match(r"[–+−-]?$|[+−-]?[\d.]", cell) for cell in cells)


def _text(text: str) -> str:
    return html.escape(text)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*~\[\]|])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)  # within a word it is no emphasis
    return re.sub(r"^(\d*)(?=([-+.)]|#+) )", r"\1\\", text)  # a list, a heading
