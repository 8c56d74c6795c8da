"""The package installs with a C compiler and without one, and says what it lacks.

Guards against wheels that need a compiler on the user's side, or that one version of Python alone can use; against
sources left out of the archive; and against a failed compilation that fails the installation.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

STEP = """
import torch
from largebatch import LAMB
from largebatch.models.native import kernel
x = torch.ones(3, requires_grad=True)
x.grad = torch.ones(3)
optimizer = LAMB([x], lr=0.1)
optimizer.step()
print(optimizer.backend, kernel() is not None)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository as a newcomer has it: nothing built."""
    if sys.platform not in ("linux", "darwin") or shutil.which("cc") is None:
        pytest.skip("there is no C compiler here to build with")
    pytest.importorskip("setuptools", reason="the build, without isolation from this environment")
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(what: str, tree: Path, out: Path, **environment: str) -> Path:
    """Have the build backend make a "sdist", "wheel" or "editable", and return its file."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as b; print('made', b.build_{what}({str(out)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=250, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out / result.stdout.split("made ")[-1].strip()


def take_a_step(folder: Path) -> subprocess.CompletedProcess[str]:
    """Take a step with the package in this folder, where no compiler can be found."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": str(folder)}
    result = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def test_the_archive_builds_a_wheel_for_this_platform_and_any_python(tree: Path, tmp_path: Path) -> None:
    archive = build("sdist", tree, tmp_path / "out")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    wheel = build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "out")
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    assert take_a_step(tmp_path / "installed").stdout.split() == ["native", "True"]


def test_an_editable_install_builds_the_kernel_in_place(tree: Path, tmp_path: Path) -> None:
    build("editable", tree, tmp_path / "out")
    assert take_a_step(tree / "src").stdout.split() == ["native", "True"]


def test_without_a_compiler_the_package_installs_and_says_so_in_one_line(tree: Path, tmp_path: Path) -> None:
    wheel = build("wheel", tree, tmp_path / "out", CC="no-such-compiler")
    with zipfile.ZipFile(wheel) as opened:
        assert not [name for name in opened.namelist() if name.endswith(".so")]
        opened.extractall(tmp_path / "installed")
    result = take_a_step(tmp_path / "installed")
    assert result.stdout.split() == ["foreach", "False"]
    lines = result.stderr.splitlines()
    assert ["several times slower" in line for line in lines] == [True, False]
    assert all("reinstall with a C compiler" in line for line in lines)
