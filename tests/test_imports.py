"""Who may import whom, read from the source; and what ``import largebatch`` costs, seen from a fresh process.

Guards the layering that lets the optimizers run on a machine with torch and numpy alone, the engine know nothing of
BERT, and the report be rebuilt from files. An import inside a function counts too: it only comes later.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import largebatch

PACKAGE = Path(largebatch.__file__).parent
EVERYTHING = {"schedules", "scaling", "optim", "models", "data", "train", "evaluate", "experiments", "report"}

# part -> (parts of ours it may import, packages of others); errors, compiled and __version__ are free to all
RULES: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "compiled": (set(), set()),
    "schedules": (set(), set()),
    "scaling": ({"schedules"}, set()),
    "optim": (set(), {"torch", "numpy"}),
    "models": (set(), {"torch", "numpy", "safetensors"}),
    "data": (set(), {"torch", "numpy", "tokenizers", "pyarrow", "datasets"}),
    "train": ({"optim", "schedules"}, {"torch", "numpy"}),
    "evaluate": ({"train", "models", "data"}, {"torch", "numpy", "tokenizers"}),
    "experiments": (EVERYTHING - {"report"}, {"torch", "numpy", "tokenizers", "safetensors", "rich"}),
    "report": (set(), {"matplotlib"}),
    "bench": (EVERYTHING | {"experiments", "__init__"}, {"torch", "numpy", "matplotlib", "tokenizers", "transformers"}),
    "cli": (EVERYTHING | {"experiments", "bench"}, {"rich"}),
    "__main__": ({"cli"}, set()),
    "__init__": ({"schedules", "scaling", "optim"}, set()),
}
# The experiments' command functions are the body of the thin cli, and hand a run directory on to the report.
FILE_RULES = {"experiments/commands.py": {"report"}, "experiments/demo.py": {"report"}}
COLLECTIVES = ("optim/norms.py", "train/distributed/")
# `from largebatch import X`: the part that X comes from
PUBLIC = dict.fromkeys(("LAMB", "LARS", "NLAMB", "NNLAMB", "Layerwise", "param_groups"), "optim")
PUBLIC |= {"plan": "scaling", "Plan": "scaling", "Stage": "scaling", "__version__": "errors"}


# A progress bar for `prepare`, which takes minutes; the CUDA backend; and what reading a corpus back does without.
FILE_PACKAGES = {
    "data/progress.py": {"rich"},
    "optim/triton.py": {"triton"},
    "optim/triton_kernels.py": {"triton"},
}
LAZY = {"data": {"tokenizers", "pyarrow", "datasets", "rich"}, "report": {"matplotlib"}, "models": {"safetensors"}}


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk what runs when the file is imported: no function bodies, and nothing that is for the type checker."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def imported(nodes: Iterable[ast.AST], file: str) -> Iterator[str]:
    """Yield the full dotted name of everything that these nodes of a file import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["largebatch", *Path(file).parts[:-1]]
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(source: str, file: str) -> list[str]:
    """Say which imports of a file, given by its path within the package, break the rules."""
    part = Path(file).parts[0].removesuffix(".py")
    ours, others = RULES.get(part, (set(), set()))
    found = [] if part in RULES else [f"{file}: no rule for this part of the package"]
    tree = ast.parse(source)
    at_once = (name for name in imported(at_import(tree), file) if name.split(".")[0] in LAZY.get(part, ()))
    found += [f"{file} imports {name} before it is needed" for name in at_once]
    for name in imported(ast.walk(tree), file):
        root, *rest = name.split(".")
        if root == "largebatch":
            # `import largebatch` itself is for those who may import all that its public names come from
            targets = {PUBLIC.get(rest[0], rest[0])} if rest else RULES["__init__"][0]
            allowed = targets <= ours | {part, "errors", "compiled"} | FILE_RULES.get(file, set())
        else:
            allowed = root in sys.stdlib_module_names or root in others | FILE_PACKAGES.get(file, set())
            allowed &= not (name.startswith("torch.distributed") and not file.startswith(COLLECTIVES))
        if not allowed or name.endswith("*"):
            found.append(f"{file} imports {name}")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_each_file_imports_only_what_it_may(file: str) -> None:
    assert not violations((PACKAGE / file).read_text(encoding="utf-8"), file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("schedules.py", "import torch"),
        ("optim/lamb.py", "from largebatch.train import Engine"),
        ("optim/lamb.py", "from ..models import bert"),
        ("optim/lamb.py", "def f():\n    import torch.distributed as dist"),
        ("train/engine.py", "from torch import distributed"),
        ("train/engine.py", "from torch.distributed.fsdp import fully_shard"),
        ("train/engine.py", "from largebatch.models import BertConfig"),
        ("train/engine.py", "from largebatch import plan"),
        ("data/corpus.py", "import transformers"),
        ("data/corpus.py", "import pyarrow"),
        ("data/corpus.py", "def f():\n    import rich"),
        ("data/corpus.py", "if True:\n    from tokenizers import Tokenizer"),
        ("report/curves.py", "import numpy"),
        ("report/curves.py", "from largebatch import schedules"),
        ("experiments/config.py", "import matplotlib.pyplot"),
        ("experiments/runner.py", "from largebatch.report import report"),
        ("models/bert.py", "import largebatch"),
        ("models/bert.py", "from torch import *"),
        ("new_part.py", "import json"),
    ],
)
def test_a_forbidden_import_is_seen(file: str, source: str) -> None:
    assert violations(source, file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("scaling.py", "from largebatch.schedules import Triangle"),
        ("optim/lamb.py", "from . import norms\nfrom .base import x\nfrom largebatch.errors import UserError"),
        ("train/distributed/ranks.py", "import torch.distributed as dist"),
        ("data/corpus.py", "if TYPE_CHECKING:\n    from tokenizers import Tokenizer"),
        ("data/corpus.py", "class C:\n    def f(self):\n        import pyarrow.parquet"),
        ("train/engine.py", "from largebatch.optim import norms\nfrom largebatch import __version__, schedules"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert not violations(source, file)


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = ("triton", "matplotlib", "tokenizers", "rich", "safetensors", "pyarrow", "transformers", "datasets")


def test_importing_the_package_imports_torch_and_numpy_alone() -> None:
    """Compared with `import torch` itself, which may bring what it likes."""
    show = f"; import sys; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    assert fresh("from largebatch import *" + show) == fresh("import torch, numpy" + show)


def test_reading_and_preparing_text_does_without_torch() -> None:
    """Every worker of `prepare` would pay for it. The public names are there all the same, and no others."""
    show = "; import sys; print('torch' in sys.modules)"
    assert fresh("import largebatch.cli, largebatch.experiments.preparing" + show).strip() == "False"
    assert fresh("import largebatch; largebatch.LAMB" + show).strip() == "True"
    assert set(largebatch.__all__) | {"optim", "scaling"} <= set(dir(largebatch))
    assert all(hasattr(largebatch, name) for name in dir(largebatch))
    with pytest.raises(AttributeError, match="has no attribute 'LAMP'"):
        largebatch.LAMP  # noqa: B018


BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_the_core_works_with_torch_and_numpy_alone() -> None:
    """On a bare image the optimizers, schedules and scaling import and take a step."""
    code = BLOCK.format(blocked=(*HEAVY, "tensorboard")) + (
        "import torch, largebatch, largebatch.optim, largebatch.schedules, largebatch.scaling, largebatch.errors\n"
        "layer = torch.nn.Linear(3, 2)\n"
        "rate = largebatch.plan('bert', 512).stages[0].learning_rate\n"
        "optimizer = largebatch.LAMB(largebatch.param_groups(layer), lr=rate)\n"
        "before = layer.weight.clone()\n"
        "layer(torch.ones(1, 3)).sum().backward(); optimizer.step()\n"
        "print(bool((layer.weight != before).all()))"
    )
    assert fresh(code).strip() == "True"


def test_the_block_blocks() -> None:
    code = (
        BLOCK.format(blocked=HEAVY) + "try:\n    import tokenizers\nexcept ModuleNotFoundError as e:\n    print(e.name)"
    )
    assert fresh(code).strip() == "tokenizers"
