"""Write docs/api/*.md from the signatures and docstrings of the public names: make docs

Reads the source without importing it. tests/test_api_pages.py fails when a page is not what this makes.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "src" / "largebatch"

# page -> its title, where its names are imported from, and the names by source file, in reading order.
PAGES: dict[str, tuple[str, str, dict[str, list[str]]]] = {
    "optimizers": (
        "Optimizers",
        "largebatch.optim",
        {
            "optim/lamb.py": ["LAMB", "NLAMB", "NNLAMB"],
            "optim/lars.py": ["LARS"],
            "optim/layerwise.py": ["Layerwise"],
            "optim/base.py": ["LayerwiseOptimizer"],
            "optim/wrapper.py": ["Wrapper"],
            "optim/groups.py": ["param_groups"],
            "optim/dialects.py": ["dialect", "convert_state_dict"],
            "optim/norms.py": ["flat_partition"],
            "optim/in_backward.py": ["optimizer_in_backward", "InBackward"],
            "optim/offload.py": ["CPUOffload"],
        },
    ),
    "schedules": (
        "Schedules",
        "largebatch.schedules",
        {
            "schedules.py": [
                *("Schedule", "Constant", "PolynomialDecay", "Triangle", "Warmup", "Piecewise", "Stages", "goyal"),
            ]
        },
    ),
    "scaling": (
        "Scaling rules",
        "largebatch.scaling",
        {
            "scaling.py": [
                *("plan", "Plan", "Stage", "Workload", "Phase", "WORKLOADS"),
                *("sqrt_lr", "linear_lr", "linear_epoch_warmup"),
            ]
        },
    ),
}
REMARKS = {  # what neither the page's import line nor the docstring says
    "LayerwiseOptimizer": "The base of `LAMB` and `LARS`, which have its methods. Not made by itself.",
    "Wrapper": "The base of `Layerwise` and `CPUOffload`, which have its methods. Not made by itself.",
    "dialect": "Called as `LAMB.dialect(name)`.",
}

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Source):(?: (.*))?$")
ITEM = re.compile(r"^(\w+): (.*)$")
WIDTH = 100  # of a signature that stays on one line


def pages() -> dict[str, str]:
    """Return the text of every page by its file name, the index included."""
    index = [
        "# API",
        "",
        "Generated from the docstrings by `make docs`; edit those. What is used most is in `largebatch`",
        "itself: `from largebatch import LAMB, param_groups, plan`.",
    ]
    made = {}
    for page, (title, module, files) in PAGES.items():
        lines = [f"# {title}", "", f"Imported from `{module}`. Generated from the docstrings."]
        index += ["", f"## {title}", "", f"`{module}`", "", "| Name | |", "|---|---|"]
        if len(files) == 1:  # the page is a module's
            lines += markdown(ast.get_docstring(parse(next(iter(files)))) or "")
        anchors: list[str] = []
        for file, names in files.items():
            source = parse(file)
            for name in names:
                docstring, own = entry(source, name)
                anchor = name.lower()  # as GitHub makes them of headings: numbered where they meet again
                number = anchors.count(anchor)
                anchors.append(anchor)
                summary = docstring.split("\n\n")[0].replace("\n", " ").replace("``", "`").replace("|", "\\|")
                index.append(f"| [`{name}`]({page}.md#{anchor}{f'-{number}' if number else ''}) | {summary} |")
                lines += ["", f"## {name}", *own]
        made[f"{page}.md"] = "\n".join(lines) + "\n"
    return {"README.md": "\n".join(index) + "\n", **made}


def entry(source: ast.Module, name: str) -> tuple[str, list[str]]:
    """Return the docstring of a name that the source defines, and the lines under its heading."""
    index = [name_of(node) for node in source.body].index(name)
    node = source.body[index]
    remark = ["", REMARKS[name]] if name in REMARKS else []
    if isinstance(node, ast.ClassDef):
        return ast.get_docstring(node) or "", [*remark, *class_lines(node)]
    if isinstance(node, ast.FunctionDef):
        return ast.get_docstring(node) or "", [*remark, *function_lines(node)]
    behind = source.body[index + 1]  # a constant, with a string behind it
    assert isinstance(behind, ast.Expr)
    docstring = str(ast.literal_eval(behind.value))
    return docstring, list(markdown(docstring))


def parse(file: str) -> ast.Module:
    """Parse a source file, whose text every node gets, since a parsed 1e-6 is 1e-06."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    module = ast.parse(text)
    for node in ast.walk(module):
        node.text = text  # type: ignore[attr-defined]
    return module


def source_of(node: ast.AST) -> str:
    return re.sub(r"\s*\n\s*", " ", ast.get_source_segment(node.text, node) or "")  # type: ignore[attr-defined]


def name_of(node: ast.stmt) -> str | None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


# ---- signatures ----


def class_lines(node: ast.ClassDef) -> Iterator[str]:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    init = next((item for item in methods if item.name == "__init__"), None)
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    if init is not None:
        yield from fenced(signature(f"class {node.name}", parameters(init)[1:], bases and f"  # base: {bases[1:-1]}"))
    elif any("dataclass" in ast.unparse(item) for item in node.decorator_list):
        fields = [source_of(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        yield from fenced(signature(f"class {node.name}", fields, bases and f"  # base: {bases[1:-1]}"))
    else:
        yield from fenced([f"class {node.name}{bases}"])
    yield from markdown(ast.get_docstring(node) or "")
    for item in methods:
        if (not item.name.startswith("_") or item.name == "__call__") and ast.get_docstring(item):
            yield from ("", f"### {node.name}.{item.name}")
            yield from function_lines(item, bound=True)


def function_lines(node: ast.FunctionDef, bound: bool = False) -> Iterator[str]:
    decorators = {ast.unparse(item) for item in node.decorator_list}
    returns = f" -> {source_of(node.returns)}" if node.returns else ""
    if "property" in decorators:
        yield from fenced([f"{node.name}{returns.replace(' ->', ':')}"])
    else:
        is_static = "staticmethod" in decorators
        yield from fenced(signature(node.name, parameters(node)[bound and not is_static :], returns))
    yield from markdown(ast.get_docstring(node) or "")


def parameters(node: ast.FunctionDef) -> list[str]:
    """Return the parameters as they stand in the source, each with its annotation and default."""
    of = node.args
    plain = [*of.posonlyargs, *of.args]
    defaults = [None] * (len(plain) - len(of.defaults)) + list(of.defaults)
    found = [parameter(argument, default) for argument, default in zip(plain, defaults, strict=True)]
    if of.vararg or of.kwonlyargs:
        found.append(f"*{source_of(of.vararg) if of.vararg else ''}")
    found += [parameter(argument, default) for argument, default in zip(of.kwonlyargs, of.kw_defaults, strict=True)]
    return found + ([f"**{source_of(of.kwarg)}"] if of.kwarg else [])


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return source_of(argument)
    return f"{source_of(argument)}{' = ' if argument.annotation else '='}{source_of(default)}"


def signature(name: str, arguments: list[str], behind: str = "") -> list[str]:
    line = f"{name}({', '.join(arguments)}){behind}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{name}(", *(f"    {argument}," for argument in arguments), f"){behind}"]


# ---- docstrings ----


def fenced(lines: list[str], language: str = "python") -> list[str]:
    return ["", f"```{language}", *lines, "```"]


def markdown(docstring: str) -> Iterator[str]:
    """Turn a docstring into lines of Markdown: sections, their items, examples and indented formulas."""
    for paragraph in re.split(r"\n{2,}", docstring):
        lines = paragraph.split("\n")
        section = SECTION.match(lines[0])
        title = section[1] if section else ""
        if title == "Source" and section:
            yield from ("", *prose([f"*Source:* {section[2]}", *lines[1:]]))
            continue
        if title:
            yield from ("", f"**{title}**")
            lines = inspect.cleandoc("\n".join(["", *lines[1:]])).split("\n")
        if title in ("Args", "Attributes", "Raises"):
            yield from ("", *items(lines))
        elif lines[0].startswith(">>>"):
            yield from fenced(lines)
        elif all(line.startswith("    ") for line in lines):
            yield from fenced([line[4:] for line in lines], "text")
        else:
            yield from ("", *prose(lines))


def items(lines: list[str]) -> Iterator[str]:
    """One list item for each ``name: text``, its continuation lines indented beneath."""
    for line in lines:
        item = ITEM.match(line)
        yield from prose([f"- `{item[1]}`: {item[2]}" if item else f"  {line.strip()}"])


def prose(lines: list[str]) -> Iterator[str]:
    """Inline code in one backtick; asterisks that are multiplication signs, not emphasis."""
    for line in lines:
        parts = re.split(r"(`[^`]*`)", line.replace("``", "`"))
        yield "".join(
            part if part.startswith("`") else re.sub(r"(?<=\s)(\*\*?)(?=\s)", r"\\\1", part) for part in parts
        )


if __name__ == "__main__":
    (DOCS / "api").mkdir(exist_ok=True)
    for file, text in pages().items():
        (DOCS / "api" / file).write_text(text, encoding="utf-8")
