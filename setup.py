"""Build the optimizers' native kernel along with the package: one plain shared library, in C, loaded with ctypes.

It links neither to Python nor to torch, so that one wheel for a platform serves every version of both. Where it cannot
be compiled the package installs without it, and the optimizers run on torch's own operations.
"""

import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/largebatch/optim/native")

# Contraction to fused multiply-adds is off, so that they are where the code says and nowhere else; the other two let
# square roots and selections be vectorised, and change no result.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-fPIC", "-pthread", "-g0"]

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VARIANTS = {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": AVX512}


class BuildLibrary(build_ext):
    """Compile kernel.c once for each instruction set, and link it with the rest under a name without a Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects = self._compile(["step.c", "threads.c"], [], ".")
        for variant in VARIANTS if x86 else ["baseline"]:
            define = f"-DVARIANT=largebatch_{variant}"
            objects += self._compile(["kernel.c"], [define, *VARIANTS[variant]], variant)
        target = Path(self.get_ext_fullpath(ext.name))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        self.compiler.link_shared_object(objects, str(target), libraries=["m"], extra_postargs=["-pthread", *undefined])

    def _compile(self, names: list[str], flags: list[str], variant: str) -> list[str]:
        sources = [str(FOLDER / name) for name in names]
        folder = str(Path(self.build_temp) / variant)
        objects: list[str] = self.compiler.compile(sources, folder, extra_postargs=[*FLAGS, *flags])
        return objects


class PlatformWheel(bdist_wheel):
    """Tag the wheel for this platform, and for any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


SOURCES = ("kernel.c", "step.c", "threads.c")
library = Extension(
    "largebatch.optim.native.kernels",
    sources=[str(FOLDER / name) for name in SOURCES],
    depends=[str(FOLDER / name) for name in ("native.h", "convert.h", "vector.h")],
    optional=True,
)
commands: dict[str, Any] = {"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel}
setup(ext_modules=[library] if sys.platform in ("linux", "darwin") else [], cmdclass=commands)
