"""Do the tests notice a flipped sign or a swapped term? Mutations of the source, each of which should turn them red.

Operators, comparisons, signs, numbers and truth values become others; a - b becomes b - a, f(a, b) becomes f(b, a),
(a, b) becomes (b, a); a condition is negated; a statement is left out.

    python dev/mutate.py src/largebatch/optim/lamb.py src/largebatch/optim/norms.py:300-360 ... [-- PYTEST ARGUMENTS]

    python dev/mutate.py --again LOG FILES ... [-- OTHER TESTS]

has other tests try only the mutants that LOG, what an earlier run printed, says survived.

Of C files operators become others and the arguments of a call change places; the kernel is built anew for each mutant,
and what does not compile is none.

Run it on a copy of the repository: the files are rewritten while it works. Each mutant gets the tests in a forked
process, until the first failure. Survivors are printed as they are found, the score at the end.
"""

import ast
import copy
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 5  # times as long as the tests take without any mutation: a mutant that takes longer never ends
SURVIVED = "survived: "
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
UNSWAPPABLE = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr, ast.BitXor)  # the order of their operands says nothing

C_OPERATORS = {
    " + ": " - ", " - ": " + ", " * ": " / ", " / ": " * ", " += ": " -= ", " < ": " <= ", " > ": " >= ", " & ": " | ",
    " | ": " & ", " == ": " != ", " != ": " == ", " && ": " || ", " || ": " && ", "(-": "(", ", -": ", ", "= !": "= ",
}  # fmt: skip
KERNELS = [Path(f"src/largebatch/{part}/native/kernels.so") for part in ("optim", "models")]
BUILD = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")

Edit = Callable[[], None]


def edits(tree: ast.Module) -> Iterator[tuple[ast.AST, str, Edit]]:
    """Yield every mutation of ``tree`` as the node it is at, what it does, and what does it to ``tree`` in place."""
    annotations = [getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")]
    silent = {id(part) for annotation in annotations if annotation is not None for part in ast.walk(annotation)}
    for node in ast.walk(tree):
        if id(node) not in silent:
            yield from swaps(node)
            yield from omissions(node)
            yield from changes(node)


def swaps(node: ast.AST) -> Iterator[tuple[ast.AST, str, Edit]]:
    def swap(items: list[ast.expr], i: int) -> Edit:
        return lambda: items.__setitem__(slice(i, i + 2), items[i : i + 2][::-1])

    if isinstance(node, ast.BinOp) and not isinstance(node.op, UNSWAPPABLE):
        yield node, "swap operands", lambda: node.__dict__.update(left=node.right, right=node.left)
    if isinstance(node, ast.Call | ast.Tuple):
        items = node.args if isinstance(node, ast.Call) else node.elts
        for i in range(len(items) - 1):
            if ast.dump(items[i]) != ast.dump(items[i + 1]):
                yield node, f"swap {ast.unparse(items[i])} and {ast.unparse(items[i + 1])}", swap(items, i)


def omissions(node: ast.AST) -> Iterator[tuple[ast.AST, str, Edit]]:
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield node.test, "negate", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    for name in ("body", "orelse", "finalbody"):
        body = getattr(node, name, None)
        for i, statement in enumerate(body if isinstance(body, list) else ()):
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if isinstance(statement, ast.Expr | ast.AugAssign | ast.Raise) and not docstring:
                yield statement, "leave out", lambda body=body, i=i: body.__setitem__(i, ast.Pass())


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, Edit]]:
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield node, "another operator", lambda: setattr(node, "op", OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield node, "another comparison", lambda: node.ops.__setitem__(0, OPERATORS[type(node.ops[0])]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node, "without its sign", lambda: setattr(node, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, "not", lambda: setattr(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, "another number", lambda: setattr(node, "value", node.value * 2 + 1)


def mutants(text: str, lines: range) -> Iterator[tuple[str, str]]:
    """Yield the description and the source of every mutant of these lines of a file."""
    tree = ast.parse(text)
    for number, (node, what, _) in enumerate(edits(tree)):
        if node.lineno not in lines:
            continue
        mutated = copy.deepcopy(tree)
        list(edits(mutated))[number][2]()
        yield f"{node.lineno}: {what}: {ast.unparse(node)}", ast.unparse(ast.fix_missing_locations(mutated))


def c_mutants(text: str, lines: range) -> Iterator[tuple[str, str]]:
    """The same of C, of which only the spelling is known: comments and the preprocessor's lines are left alone."""
    code = re.sub(r"/\*.*?\*/|^#.*?[^\\]$", lambda found: re.sub(r"[^\n]", "?", found[0]), text, flags=re.S | re.M)
    operators = "|".join(map(re.escape, C_OPERATORS))
    for found in re.finditer(operators + r"|(?<=\()([\w.\[\]]+), ([\w.\[\]]+)(?=[,)])", code):
        number = code.count("\n", 0, found.start()) + 1
        other = f"{found[2]}, {found[1]}" if found[1] else C_OPERATORS[found[0]]
        if number in lines and other != found[0]:
            mutated = text[: found.start()] + other + text[found.end() :]
            yield f"{number}: {found[0]!r} to {other!r}: {text.splitlines()[number - 1].strip()}", mutated


def builds() -> bool:
    """Build the kernels, which setup.py does without where it cannot."""
    for built in (*KERNELS, *Path("build").rglob(KERNELS[0].name)):  # setup.py would copy the older one from there
        built.unlink(missing_ok=True)
    subprocess.run(BUILD, capture_output=True, check=True)
    return all(kernel.exists() for kernel in KERNELS)


def survives(arguments: list[str], limit_s: float = float("inf"), quiet: bool = True) -> bool:
    """Run the tests in a fork, which has torch loaded and imports the mutant; True if they pass."""
    pid = os.fork()
    if pid == 0:
        if quiet:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])))
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return False


def main(arguments: list[str]) -> None:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    files, tests = arguments[:split], arguments[split + 1 :]
    again = None
    if files[0] == "--again":
        again = {line for line in Path(files[1]).read_text(encoding="utf-8").splitlines() if line.startswith(SURVIVED)}
        del files[:2]
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path("src").resolve()))
    import pytest  # noqa: F401, loaded once, before the forks
    import torch

    torch.set_num_threads(1)
    start = time.monotonic()
    assert survives(tests, quiet=False), "the tests fail without any mutation"
    limit_s = PATIENCE * (time.monotonic() - start)
    killed = total = 0
    for file in files:
        name, _, lines = file.partition(":")
        first, _, last = lines.partition("-")
        path, chosen = Path(name), range(int(first or 1), int(last or 1 << 30) + 1)
        text = path.read_text(encoding="utf-8")
        is_c = path.suffix in (".c", ".h")
        try:
            for what, mutated in (c_mutants if is_c else mutants)(text, chosen):
                survivor = f"{SURVIVED}{path.name}:{what}"
                if again is not None and survivor not in again:
                    continue
                path.write_text(mutated, encoding="utf-8")
                if is_c and not builds():
                    continue
                total += 1
                if survives(tests, limit_s):
                    print(survivor, flush=True)
                else:
                    killed += 1
        finally:
            path.write_text(text, encoding="utf-8")
            if is_c:
                builds()
        print(f"{path.name}: {killed} of {total} killed so far", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
