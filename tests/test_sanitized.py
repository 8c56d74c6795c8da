"""The C kernels touch only their tensors' memory, have no undefined behaviour, and no two threads meet unsynchronised.

Guards against reads and writes past the end that happen to hit something harmless, and against races that this machine
does not lose. The programs make what goes through: every size near a block's, a part's or a vector's end, every dtype,
rule and norm.
"""

import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

import largebatch

PACKAGE, HERE = Path(largebatch.__file__).parent, Path(__file__).parent
VARIANTS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]


@dataclass(frozen=True)
class Kernel:
    """A library's sources, as setup.py has them, and the program that calls it.

    Attributes:
        folders: where the sources are.
        variants: files compiled once for each instruction set, and the prefix of their tables.
        rest: files compiled once.
        fuzz: the program.
    """

    folders: tuple[str, ...]
    variants: dict[str, str]
    rest: tuple[str, ...]
    fuzz: Path


SHARED = ("isa.c", "threads.c")
OPTIM = Kernel(("optim",), {"kernel.c": "largebatch"}, ("step.c", *SHARED), HERE / "optim" / "native_fuzz.c")
MODELS = Kernel(
    ("optim", "models"),
    {"attention.c": "attention", "norm.c": "norm", "gelu.c": "gelu", "loss.c": "loss"},
    ("calls.c", *SHARED),
    HERE / "models" / "bert_fuzz.c",
)
KERNELS = pytest.mark.parametrize("kernel", [OPTIM, MODELS], ids=["optim", "models"])

pytestmark = pytest.mark.slow


def compiled(kernel: Kernel, folder: Path, flags: list[str], change: tuple[str, str] = ("", "")) -> Path:
    """Compile a kernel, with ``change`` made in the first of its variants' sources, and the program that calls it."""
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("the sanitizers of x86 Linux")
    changed = next(iter(kernel.variants))
    sources = [source for part in kernel.folders for source in (PACKAGE / part / "native").glob("*.[ch]")]
    for source in [*sources, kernel.fuzz]:
        text = source.read_text(encoding="utf-8")
        assert source.name != changed or change[0] in text
        (folder / source.name).write_text(text.replace(*change) if source.name == changed else text)
    common = ["-g", "-O1", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-fno-math-errno", "-pthread", *flags]

    def cc(*arguments: str) -> None:
        try:
            result = subprocess.run(
                ["cc", *common, *arguments], cwd=folder, capture_output=True, text=True, timeout=240
            )
        except FileNotFoundError:
            pytest.skip("no C compiler")
        if "cannot find" in result.stderr:
            pytest.skip(f"no sanitizers: {result.stderr.splitlines()[0]}")
        assert result.returncode == 0, result.stderr

    objects = []
    for name, instructions in VARIANTS.items():
        for source, prefix in kernel.variants.items():
            objects.append(f"{prefix}_{name}.o")
            cc(*instructions, f"-DVARIANT={prefix}_{name}", "-c", source, "-o", objects[-1])
    cc(kernel.fuzz.name, *kernel.rest, *objects, "-lm", "-o", "fuzz")
    return folder / "fuzz"


def run(program: Path, seed: int, rounds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, str(seed), str(rounds)], capture_output=True, text=True, timeout=240)


@KERNELS
def test_memory_and_undefined_behaviour(tmp_path: Path, kernel: Kernel) -> None:
    program = compiled(kernel, tmp_path, MEMORY)
    for seed in (1, 2, 3):
        result = run(program, seed, 200)
        assert result.returncode == 0, result.stderr


@KERNELS
def test_races(tmp_path: Path, kernel: Kernel) -> None:
    result = run(compiled(kernel, tmp_path, THREADS), 4, 100)
    assert result.returncode == 0, result.stderr


@KERNELS
@pytest.mark.parametrize("processor", ["Nehalem", "SandyBridge", "Haswell"])
def test_processors_without_avx2(tmp_path: Path, kernel: Kernel, processor: str) -> None:
    # Nehalem has no AVX at all, SandyBridge no AVX2; an instruction that they lack ends the program.
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64 is not installed")
    command = [emulator, "-cpu", processor, compiled(kernel, tmp_path, []), "5", "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        (OPTIM, ("part.n -= part.n % LANES;", "part.n += part.n % LANES;")),  # past the end
        (OPTIM, ("place += run * origin.skip", "place += (1 << (run + 40)) * origin.skip")),  # a shift too far
        (OPTIM, ("{ BLOCK = 2048 }", "{ BLOCK = 1024 }")),  # another size of block is no error: the control
        (MODELS, ("whole, length - whole, narrow", "whole, LANES, narrow")),  # past the end of the last row
    ],
    ids=["overrun", "shift", "control", "overrun of a row"],
)
def test_the_sanitizers_see_what_is_wrong(tmp_path: Path, kernel: Kernel, change: tuple[str, str]) -> None:
    result = run(compiled(kernel, tmp_path, MEMORY, change), 1, 100)
    assert (result.returncode == 0) is change[0].startswith("{")
    assert ("ERROR: AddressSanitizer" in result.stderr) is change[0].startswith(("part", "whole"))
    assert ("runtime error: shift" in result.stderr) is change[0].startswith("place")
