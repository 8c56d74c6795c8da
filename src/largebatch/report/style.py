"""How figures look: one typography, one palette for paper and another for dark screens, sizes of a paper's columns."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_IN, WIDE_IN = 3.4, 7.0  # one column of a two-column paper, and both
LONGEST = 32  # characters of a run's name in a figure; the eight names of a sweep must leave room for its curves

INK, MUTED, GRID, PAPER = "#1f2328", "#656d76", "#e3e6e9", "#ffffff"
# Six hues that stay apart in protanopia, deuteranopia and tritanopia: the least OKLab distance of any two is 0.077, of
# the first three 0.107 (red and green of matplotlib's default: 0.04), and no contrast with the paper is under 2.8.
SERIES = ("#1670c4", "#c4510a", "#0b5437", "#e86fbb", "#c29218", "#6a1f8a")
DARK = {
    INK: "#e6e8ea",
    MUTED: "#9aa3ad",
    GRID: "#30363d",
    PAPER: "#15181c",
    **dict(zip(SERIES, ("#3d8ff5", "#ee7716", "#93e6c8", "#c9608f", "#f9cf30", "#bfa3ea"), strict=True)),
}
NAMES = dict(zip(DARK, ("ink", "muted", "grid", "paper", *(f"series-{i + 1}" for i in range(6))), strict=True))
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # a second and third turn through the hues

_RC = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same figure on every machine
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "legend.handletextpad": 0.5,
    "legend.borderpad": 0.1,
    "figure.constrained_layout.w_pad": 0.02,
    "figure.constrained_layout.h_pad": 0.02,
    "svg.hashsalt": "largebatch",  # identifiers that do not change from one report to the next
    "svg.fonttype": "path",
    "text.parse_math": False,  # a run may be called what it likes, dollars included
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its file name without ending, what it shows, and its bytes."""

    name: str
    caption: str
    png: bytes
    svg: str
    wide: bool


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this: whatever the user's matplotlibrc says, and without a trace afterwards."""
    import matplotlib.style

    with matplotlib.style.context(_RC, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a run's name in another script
        yield


def legend_labels(names: Sequence[str]) -> list[str]:
    """Runs' names for a figure: not too long, all different, no leading underscore, which matplotlib would hide.

    Long names lose the words that all runs share, except beside words that differ, and then their middle; but what
    would make two of them equal is not cut.
    """
    split = [re.split(r"(?<=[-_/ ])|(?=[-_/ ])", name) for name in names]
    shared = set.intersection(*map(set, split)) if split else set()
    distinct = [n if len(n) <= LONGEST else _distinctive(words, shared) for n, words in zip(names, split, strict=True)]
    cut = [label if len(label) <= LONGEST else f"{label[:15]}…{label[-16:]}" for label in distinct]
    labels = next((short for short in (cut, distinct) if len(set(short)) == len(names)), names)
    return [f" {label}" if label.startswith("_") else label for label in labels]


def _distinctive(words: Sequence[str], shared: set[str]) -> str:
    """The words that are not shared, with a neighbour on each side; all words when each is shared."""
    own = [i for i, word in enumerate(words) if word not in shared]
    kept = [any(abs(i - k) <= 2 for k in own) for i in range(len(words))]  # 2: a separator counts as a word
    text = "".join(word if keep else "\0" for word, keep in zip(words, kept, strict=True))
    return re.sub("\0+", "…", text) if own else "".join(words)


def superscript(number: int) -> str:
    """-3 -> "⁻³"."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def new_figure(wide: bool, height_in: float) -> "Figure":
    """A figure of one or two columns; without pyplot, so that no global state is touched and none leaks."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDE_IN if wide else COLUMN_IN, height_in), layout="constrained")


def picture(figure: "Figure", name: str, caption: str, *, wide: bool = False) -> Picture:
    """Encode a figure, the same bytes every time."""
    png, svg = BytesIO(), BytesIO()
    figure.savefig(png, format="png", dpi=220)
    figure.set_layout_engine("none")  # the layout stands: finding it a second time would take as long as drawing
    figure.savefig(svg, format="svg", dpi=220, metadata={"Date": None, "Creator": None})
    return Picture(name, caption, png.getvalue(), svg.getvalue().decode(), wide)


def inline_svg(image: Picture) -> str:
    """The figure as an element of a page: scales to its box, takes the page's colours, keeps its identifiers apart."""
    svg = image.svg[image.svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{image.name}-", svg)
    for colour, name in NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def css_palette() -> str:
    """The colours as CSS variables, for light and for dark."""
    light = "".join(f"--{name}:{colour};" for colour, name in NAMES.items())
    dark = "".join(f"--{name}:{DARK[colour]};" for colour, name in NAMES.items())
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{@media screen{{:root{{{dark}}}}}}}"
