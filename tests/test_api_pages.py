"""docs/api is what docs/build_api.py makes of the docstrings today, and has every public name.

Guards against pages that drift from the signatures, and against a new public name that nobody documents.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import largebatch
from largebatch import optim, scaling, schedules

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(name="build_api", scope="module")
def _build_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api", DOCS / "build_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(build_api: ModuleType) -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")}
    made = build_api.pages()
    assert written.keys() == made.keys()
    stale = [name for name, text in made.items() if written[name] != text]
    assert not stale, f"{', '.join(stale)}: run `make docs` (python docs/build_api.py)"


def test_every_public_name_has_a_section(build_api: ModuleType) -> None:
    public = {*largebatch.__all__, *optim.__all__, *schedules.__all__, *scaling.__all__} - {"schedules"}
    headings = {name for text in build_api.pages().values() for name in re.findall(r"^## (\w+)$", text, re.MULTILINE)}
    assert public - headings == set()


def test_every_section_says_something(build_api: ModuleType) -> None:
    for page, text in build_api.pages().items():
        for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
            body = re.sub(r"```.*?```", "", section.split("\n", 1)[1], flags=re.DOTALL)
            assert len(body.strip()) > 10, f"{page}: {section.splitlines()[0]} has no text"


def test_a_changed_docstring_changes_the_page(
    build_api: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_api.pages()
    for file in {file for _, _, files in build_api.PAGES.values() for file in files}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        text = (build_api.PACKAGE / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(text.replace("eps: float = 1e-6", "eps: float = 1e-5"), encoding="utf-8")
    monkeypatch.setattr(build_api, "PACKAGE", tmp_path)
    after = build_api.pages()
    assert [name for name in before if before[name] != after[name]] == ["optimizers.md"]
    assert "eps: float = 1e-5" in after["optimizers.md"]


def test_every_link_of_the_index_has_its_heading(build_api: ModuleType) -> None:
    pages = build_api.pages()
    links = re.findall(r"\]\((\w+\.md)#([\w-]+)\)", pages["README.md"])
    assert len(links) > 20
    for page, anchor in links:
        headings = [heading.lower() for heading in re.findall(r"^#+ (.+)$", pages[page], re.MULTILINE)]
        name, _, number = anchor.partition("-")
        assert headings.count(name) > int(number or 0), f"{page}#{anchor}"
