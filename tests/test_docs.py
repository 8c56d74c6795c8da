"""Every example in the documentation and in the docstrings runs and prints what it says.

Guards against documents that drift from the code. In Markdown an example is a fenced ``python`` block with ``>>>``
prompts; the blocks of one file share their names, from top to bottom, as a reader would type them.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import largebatch

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = Path(largebatch.__file__).parent
DOCUMENTS = ["README.md", *sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("docs/*.md"))]
WITH_TRAINERS = "docs/trainers.md"  # of other packages, which warn of what is not ours
FENCE = re.compile(r"^```(?:python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(text: str) -> str:
    """The text with everything but the examples blanked out, so that line numbers stay those of the document."""
    kept = [""] * len(text.split("\n"))
    for block in FENCE.finditer(text):
        if ">>>" in block[1]:
            first = text[: block.start(1)].count("\n")
            lines = block[1].split("\n")
            kept[first : first + len(lines)] = lines
    return "\n".join(kept)


def run(text: str, name: str) -> tuple[doctest.TestResults, str]:
    test = doctest.DocTestParser().get_doctest(examples(text), {"__name__": "__main__"}, name, name, 0)
    log: list[str] = []
    return doctest.DocTestRunner(optionflags=FLAGS).run(test, out=log.append), "".join(log)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(document, marks=pytest.mark.filterwarnings("ignore") if document == WITH_TRAINERS else ())
        for document in DOCUMENTS
    ],
)
def test_the_documents_examples_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = REPOSITORY / document
    if not path.exists():
        pytest.skip(f"{document} is not written yet")
    monkeypatch.chdir(tmp_path)
    result, log = run(path.read_text(encoding="utf-8"), document)
    assert result.failed == 0, log


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_documents_links_lead_somewhere(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", text):
        path = (REPOSITORY / document).parent / target if target else REPOSITORY / document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], anchor


@pytest.mark.parametrize("document", ["choosing", "dialects", "large-batch-guide", "mathematics"])
def test_the_documents_have_examples(document: str) -> None:
    """If the fences or prompts changed, the tests above would pass on nothing."""
    text = (REPOSITORY / f"docs/{document}.md").read_text(encoding="utf-8")
    assert examples(text).count(">>>") >= 8


def test_a_wrong_example_is_seen() -> None:
    text = "Text.\n\n```python\n>>> x = 1\n```\n\n```text\n>>> not run\n```\n\n```python\n>>> x + {}\n2\n```\n"
    assert run(text.format(1), "right")[0] == (0, 2)
    result, log = run(text.format(2), "wrong")
    assert result.failed == 1
    assert "line 12" in log


MODULES = sorted(
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
)


@pytest.mark.parametrize("module", MODULES)
def test_the_docstrings_examples_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(module)
    assert any(test.examples for test in doctest.DocTestFinder().find(found))
    assert doctest.testmod(found, optionflags=FLAGS).failed == 0
