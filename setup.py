"""Build the CPU kernels of optimizers and of BERT along with the package: plain shared libraries in C, for ctypes.

They link neither to Python nor to torch, so that one wheel for a platform serves every version of both. Where they
cannot be compiled the package installs without them, and everything runs on torch's own operations.
"""

import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OPTIM, MODELS = Path("src/largebatch/optim/native"), Path("src/largebatch/models/native")

# Contraction to fused multiply-adds is off, so that they are where the code says and nowhere else; the other two let
# square roots and selections be vectorised, and change no result.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-fPIC", "-pthread", "-g0"]

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VARIANTS = {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": AVX512}


class Library(Extension):
    """The shared library of a folder.

    Both libraries have the threads and the choice of instruction set, which lie with the optimizers.

    Args:
        folder: where its sources are.
        kernels: files that are compiled once for each instruction set, and the prefix of the tables in them.
        rest: files that are compiled once.
    """

    def __init__(self, folder: Path, kernels: dict[str, str], rest: list[str]) -> None:
        self.kernels = {str(folder / name): prefix for name, prefix in kernels.items()}
        self.rest = [str(folder / name) for name in rest] + [str(OPTIM / name) for name in ("isa.c", "threads.c")]
        headers = sorted(str(path) for path in {*OPTIM.glob("*.h"), *folder.glob("*.h")})
        name = ".".join((folder / "kernels").relative_to("src").parts)
        super().__init__(name, [*self.kernels, *self.rest], depends=headers, include_dirs=[str(OPTIM)], optional=True)


class BuildLibrary(build_ext):
    """Compile the variants of a library's kernels, and link them with the rest under a name without a Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Library) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects = self._compile(ext, ext.rest, [], ".")
        for source, prefix in ext.kernels.items():
            for variant in VARIANTS if x86 else ["baseline"]:
                objects += self._compile(ext, [source], [f"-DVARIANT={prefix}_{variant}", *VARIANTS[variant]], variant)
        target = Path(self.get_ext_fullpath(ext.name))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        self.compiler.link_shared_object(objects, str(target), libraries=["m"], extra_postargs=["-pthread", *undefined])

    def _compile(self, ext: Library, sources: list[str], flags: list[str], variant: str) -> list[str]:
        folder = str(Path(self.build_temp) / ext.name / variant)
        objects: list[str] = self.compiler.compile(
            sources, folder, include_dirs=ext.include_dirs, extra_postargs=[*FLAGS, *flags]
        )
        return objects


class PlatformWheel(bdist_wheel):
    """Tag the wheel for this platform, and for any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


libraries = [
    Library(OPTIM, {"kernel.c": "largebatch"}, ["step.c", "locate.c"]),
    Library(MODELS, {f"{name}.c": name for name in ("attention", "norm", "gelu", "loss")}, ["calls.c"]),
]
commands: dict[str, Any] = {"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel}
setup(ext_modules=libraries if sys.platform in ("linux", "darwin") else [], cmdclass=commands)
