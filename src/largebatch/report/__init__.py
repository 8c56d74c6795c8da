"""Tables and figures from run directories, and from those alone: no torch, nothing of the training system.

report([Path("runs/bert-tiny")])      # -> runs/bert-tiny/report/report.html, report.md, figures/
summarize([Path("runs/bert-tiny")])   # -> the short tables a terminal shows
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from largebatch.errors import UserError
from largebatch.report.read import read_runs
from largebatch.report.summary import summary_tables
from largebatch.report.tables import Table

__all__ = ["Table", "report", "summarize"]

FIGURES = "figures"


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html`, `report.md` and the figures of one run, or of several side by side.

    The page stands alone: figures inside, readable in light and dark, ready to print. The Markdown links the PNGs in
    `figures/`, which hold an SVG of each figure as well. The same runs give the same bytes. In the place of an earlier
    report, the figures that came with it go.

    Args:
        runs: run directories, of any kinds; runs of one kind are drawn over each other. A run that goes on, was
            resumed, crashed or diverged is reported as it stands.
        out: folder for the report, made where it is missing; `report/` in the first run by default.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: a folder that is no run directory, a file in it that cannot be read or understood, or an `out` that
            cannot be written.
    """
    from largebatch.report import build, render, style

    read = read_runs(runs)
    out = (read[0].path / "report" if out is None else Path(out).expanduser()).absolute()
    with style.style():
        sections = build.build(read)
    title, lead = build.title_of(read), build.lead_of(read)
    files = {
        f"{FIGURES}/{block.name}.{ending}": content
        for section in sections
        for block in section.blocks
        if isinstance(block, style.Picture)
        for ending, content in (("png", block.png), ("svg", block.svg.encode()))
    }
    markdown = render.to_markdown(title, lead, sections, FIGURES) + f"\n<!-- figures: {' '.join(files)} -->\n"
    files["report.md"] = markdown.encode(errors="backslashreplace")
    files["report.html"] = render.to_html(title, lead, sections).encode(errors="backslashreplace")
    try:
        earlier = _figures_of(out / "report.md")
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(out / name, content)
        for name in earlier - set(files):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error.strerror}; name another folder") from None
    return out / "report.html"


def summarize(runs: Sequence[Path]) -> list[Table]:
    """The short form for a terminal of 80 columns.

    Args:
        runs: run directories.

    Returns:
        For one run a table of its figures (two columns without headings), for several a table of each kind of run.
        `Table` has `title`, `columns` and `rows`, all text.

    Raises:
        UserError: as `report`.
    """
    return summary_tables(read_runs(runs))


def _figures_of(page: Path) -> set[str]:
    """The figures that came with a report, by the last line of its Markdown; none where there is no report."""
    text = page.read_text(errors="replace") if page.is_file() else ""
    last = re.search(rf"^<!-- figures:((?: {FIGURES}/[\w-]+\.(?:png|svg))*) -->$", text, re.MULTILINE)
    return set(last[1].split()) if last else set()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
