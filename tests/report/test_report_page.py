"""Whole reports, end to end: every shape of run gives a page that stands alone, says what the run directory says, and
is the same each time; nothing of it leaks into the user's matplotlib."""

import html
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import synthetic
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table as RichTable

from largebatch.errors import UserError
from largebatch.report import render, report, summarize
from largebatch.report.read import read_runs
from largebatch.report.tables import evaluation_table

# A run with few figures, for what does not depend on their number: a report of it takes a second.
SMALL = {"stages": [("first", None, 64, 12, 4e-3, 3), ("second", None, 16, 4, 2e-3, 1)], "mfu": False}
SHORT = (("seq128", 128, 64, 12, 1e-2, 3), ("seq512", 512, 16, 4, 5e-3, 1))
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects identifiers, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.references.append(str(value))


def check(page: Path) -> Page:
    """A page that is well formed, whose parts are all inside, and whose Markdown twin links what is there."""
    content = page.read_text()
    parsed = Page(content)
    assert len(set(parsed.ids)) == len(parsed.ids)
    for reference in parsed.references:
        assert reference.startswith(("#", "data:image/png;base64,"))
    assert {r[1:] for r in parsed.references if r[0] == "#"} <= set(parsed.ids)
    assert set(re.findall(r"url\(#(.*?)\)", content)) <= set(parsed.ids)
    assert "script" not in parsed.tags
    markdown = (page.parent / "report.md").read_text()
    links = re.findall(r"^!\[.*\]\((.*?)\)$", markdown, re.MULTILINE)
    assert {page.parent / link for link in links} == set((page.parent / "figures").glob("*.png"))
    assert parsed.tags.count("figure") == len(links)
    for link in links:
        assert (page.parent / link).read_bytes().startswith(b"\x89PNG")
        assert (page.parent / link).with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    assert not list(page.parent.rglob("*partial*"))
    return parsed


def figures(page: Path) -> set[str]:
    return {path.stem for path in (page.parent / "figures").glob("*.png")}


def test_a_two_stage_pretraining_run(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "bert-tiny")
    page = report([folder])
    assert page == folder / "report" / "report.html"
    parsed = check(page)
    assert figures(page) == {
        "mlm-loss", "loss", "nsp-loss", "mlm-accuracy", "nsp-accuracy", "learning-rate", "gradient-norm",
        "tokens-per-s", "sequences-per-s", "mfu", "trust-ratios", "trust-ratios-over-time",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    reached = summary["evaluation"]["mlm_loss"]
    for text in (parsed.words, (page.parent / "report.md").read_text()):
        assert f"{reached:.3f} nat" in text
        assert f"unigram entropy: 6.930 nat (−{6.93 - reached:.3f} nat)" in text
        assert "AMD EPYC 7B13 (2 threads)" in text
        assert "stages.1.batch_size" in text
        assert "seq512" in text
        assert "4.42 million parameters" in text
    assert "prefers-color-scheme:dark" in page.read_text()
    assert "stroke: var(--series-1)" in page.read_text()


def test_runs_of_several_kinds(tmp_path: Path) -> None:
    """The demo's three runs: the two fine-tuning runs lie over each other, and the random encoder is the baseline."""
    runs = [
        synthetic.write_run(tmp_path / "pretraining", stages=SHORT, ratios_every=5, evaluate_every=5),
        synthetic.write_squad(tmp_path / "squad", random_encoder=False),
        synthetic.write_squad(tmp_path / "squad-random", random_encoder=True),
    ]
    page = report(runs, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    parsed = check(page)
    assert {"pretraining-mlm-loss", "squad-loss", "squad-f1", "squad-final"} < figures(page)
    tuned, untrained = (json.loads((run / "summary.json").read_text())["evaluation"]["f1"] for run in runs[1:])
    assert f"random encoder: {untrained:.2f} % ({tuned - untrained:+.2f} points)" in parsed.words
    assert "What differs" in parsed.words


def test_optimizers_over_each_other(tmp_path: Path) -> None:
    runs = [
        synthetic.write_mnist(tmp_path / f"mnist-{name}", name, mfu=False, evaluate_every=100)
        for name in ("lamb", "lars", "adamw", "sgd")
    ]
    parsed = check(report(runs, tmp_path / "out"))
    assert {"accuracy", "loss-by-time", "final"} < figures(tmp_path / "out" / "report.html")
    assert "the same in all runs" in parsed.words  # the learning rate
    assert re.search(r"AdamW\s*580", parsed.words)


def test_batches_over_each_other_by_samples(tmp_path: Path) -> None:
    """Steps are no common measure of runs whose batches differ; where they agree the figure would say nothing new."""
    runs = [
        synthetic.write_mnist(tmp_path / name, "sgd", mfu=False, stages=[("s", None, batch, 1600 // batch, 1e-2, 2)])
        for name, batch in (("a", 16), ("b", 32), ("c", 32))
    ]
    assert "loss-by-samp" in figures(report(runs[:2], tmp_path / "differ"))
    assert "loss-by-samp" not in figures(report(runs[1:], tmp_path / "agree"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stop_at": 7}, "The run is not complete"),
        ({"stop_at": 0}, "No step is recorded yet."),
        ({"stop_at": 1}, "1 of 16 steps"),
        ({"resumes": (4, 9)}, "Training was resumed after step 4, 9."),
        ({"diverge_at": -40}, "The loss is not finite in 16 of 16 steps"),
        ({"baselines": {"coin": "heads", "chance_accuracy": 0.1, "best_known": 3}}, "best known"),
        ({"baselines": {"chance_accuracy": math.nan, "best_known": math.inf}}, "not finite"),
        ({"optimizer": "lamb", "layers": [f"blocks.{i}.fc.weight" for i in range(60)]}, "fc L0–59"),
        ({"optimizer": "lamb", "layers": [f"w{i}" for i in range(90)]}, "w89"),
        ({"config": {"optim": "lamb", "stages": None, "max_grad_norm": None}}, "LAMB"),
    ],
    ids=[
        "in progress",
        "no step",
        "one step",
        "resumed",
        "diverged",
        "baselines",
        "not finite",
        "deep",
        "many layers",
        "odd config",
    ],
)
def test_every_shape_of_run_gives_a_report(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    folder = synthetic.write_mnist(tmp_path / "run", **{"optimizer": "sgd", "ratios_every": 5, **SMALL, **changes})
    page = report([folder])
    assert expected in check(page).words


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Markup in names is text; neither a dollar (mathematics to matplotlib), a leading underscore (hidden from its
    legends) nor a letter its font lacks may break or change a figure."""
    names = ["_<b>&amp;|x|*y*", "$a^{b", "試驗"]
    runs = [synthetic.write_mnist(tmp_path / name, "sgd", recipe="</title><script>", **SMALL) for name in names]
    page = report(runs, tmp_path / "out")
    parsed = check(page)
    for name in names:
        assert name in parsed.words
    assert "</title><script>" in parsed.words
    assert r"_<b>" not in (tmp_path / "out" / "report.md").read_text()
    assert r"\|x\|\*y\*" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "__main__.py _a_b_ snake_case_",
        "~~struck~~ ~a~",
        "R&D &lt; &amp; <b> `code`",
        "1. first: 2. second",
        "12) twelve",
        "- a - b",
        "+ a",
        "## heading ##",
        "*a* [b](c) | \\_",
        "6.153 nat, -0.5, #3",
    ],
)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    assert shown.render(render._escape(text)) == f"<p>{html.escape(text)}</p>\n"
    assert f"<td>{html.escape(text)}</td>" in shown.render(f"|a|\n|-|\n|{render._escape(text)}|")


def test_figures_are_left_as_they_are() -> None:
    assert render._escape("6.153 nat (−0.777), -0.5") == "6.153 nat (−0.777), -0.5"


def test_text_that_is_not_utf_8_is_spelled_out(tmp_path: Path) -> None:
    """Bytes in a name are lone surrogates in a string, which a page cannot hold; so are those of a recorded path."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    synthetic.write_mnist(folder, "sgd", **SMALL, config={"data": {"path": os.fsdecode(b"\xff")}})
    parsed = check(report([folder], tmp_path / "out"))
    assert r"Training report: caf\xe9" in parsed.words
    assert r"\udcff" in parsed.words


def test_a_single_evaluation_is_shown_whole(tmp_path: Path) -> None:
    """But for the number of questions, which is no result."""
    run = synthetic.write_squad(tmp_path / "squad", random_encoder=False, evaluate_every=1000)
    assert evaluation_table(read_runs([run])).columns == [
        "Step", "Split", "F1 (%)", "Exact match (%)", "F1, standard error (%)",
    ]  # fmt: skip


def test_a_report_takes_the_earlier_one_s_figures_away(tmp_path: Path) -> None:
    """Those that came with it, and nothing else that may lie there or that somebody added to its page."""
    out = tmp_path / "out"
    before = figures(report([synthetic.write_mnist(tmp_path / "a", "lamb", ratios_every=5, **SMALL)], out))
    own = [out / "figures" / name for name in ("own.png", "own.svg", "loss.pdf")] + [out / "loss.png"]
    for path in own:
        path.write_bytes(b"mine")
    page = out / "report.md"
    page.write_text("![My own](figures/own.png)\n\n" + page.read_text())
    after = report([synthetic.write_mnist(tmp_path / "b", "sgd", **SMALL)], out)
    assert "trust-ratios" in before - figures(after)
    assert not list(out.glob("figures/trust*"))
    assert all(path.read_bytes() == b"mine" for path in own)
    own[0].unlink()
    check(after)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    """And another run, by one number, does not."""
    folder = synthetic.write_mnist(tmp_path / "run", "lamb", ratios_every=5, **SMALL)
    first, second = (report([folder], tmp_path / name).parent for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines.replace('"lr": ', '"lr": 2', 1))
    third = report([folder], tmp_path / "c").parent
    assert (third / "figures" / "learning-rate.png").read_bytes() != (
        first / "figures" / "learning-rate.png"
    ).read_bytes()


def test_nothing_leaks_into_matplotlib(tmp_path: Path) -> None:
    """In a process of its own: reading imports no matplotlib, drawing no pyplot, and the settings stay the user's."""
    folder = synthetic.write_mnist(tmp_path / "run", "sgd", **SMALL)
    code = (
        "import sys, pathlib\n"
        "from largebatch.report import report, summarize\n"
        f"run = [pathlib.Path({str(folder)!r})]\n"
        "summarize(run)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "matplotlib.rcParams['font.size'] = 31\n"
        "before = matplotlib.rcParams.copy()  # dict() would import pyplot\n"
        "report(run)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_out_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder = synthetic.write_mnist(tmp_path / "run", "sgd", **SMALL)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"the report cannot be written to .*taken: .*; name another folder"):
        report([folder], tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == ""


def test_the_terminal_s_tables_fit_80_columns(tmp_path: Path) -> None:
    one = summarize([synthetic.write_run(tmp_path / "bert", diverge_at=100)])
    mixed = summarize(
        [
            *(
                synthetic.write_mnist(tmp_path / f"mnist-{name}-with-quite-a-long-name", name)
                for name in ("lamb", "sgd")
            ),
            synthetic.write_squad(tmp_path / "squad", random_encoder=False),
        ]
    )
    assert [table.title for table in mixed] == ["classification", "squad"]
    assert mixed[0].columns == ["Run", "Optimizer", "Steps", "Time", "Accuracy (%)", "Loss (nat)"]
    for table in one + mixed:
        shown = StringIO()
        rich_table = RichTable(title=table.title)
        for column in table.columns:
            rich_table.add_column(column, overflow="fold")
        for row in table.rows:
            assert len(row) == len(table.columns)
            rich_table.add_row(*row)
        Console(file=shown, width=80).print(rich_table)
        lines = shown.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in shown.getvalue()
    values = dict(row for row in one[0].rows)
    assert values["Steps"] == "500"
    assert values["Held-out MLM loss"].startswith("not finite")
