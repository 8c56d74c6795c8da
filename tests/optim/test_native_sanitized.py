"""The C kernel touches no memory but its tensors', has no undefined behaviour, and no two threads meet unsynchronised.

Guards against reads and writes past the end that happen to hit something harmless, and against races that this machine
does not lose. native_fuzz.c makes the layers: every size near a block's or a part's, every dtype, rule and norm.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import largebatch

NATIVE = Path(largebatch.__file__).parent / "optim" / "native"
FUZZ = Path(__file__).with_name("native_fuzz.c")
VARIANTS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]

pytestmark = pytest.mark.slow


def compiled(folder: Path, flags: list[str], change: tuple[str, str] = ("", "")) -> Path:
    """Compile the kernel, with ``change`` made in its source, and the program that calls it."""
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("the sanitizers of x86 Linux")
    for source in [*NATIVE.glob("*.[ch]"), FUZZ]:
        text = source.read_text(encoding="utf-8")
        assert source.name != "kernel.c" or change[0] in text
        (folder / source.name).write_text(text.replace(*change) if source.name == "kernel.c" else text)
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

    for name, instructions in VARIANTS.items():
        cc(*instructions, f"-DVARIANT=largebatch_{name}", "-c", "kernel.c", "-o", f"{name}.o")
    cc("native_fuzz.c", "step.c", "threads.c", *(f"{name}.o" for name in VARIANTS), "-lm", "-o", "fuzz")
    return folder / "fuzz"


def run(program: Path, seed: int, rounds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, str(seed), str(rounds)], capture_output=True, text=True, timeout=240)


def test_memory_and_undefined_behaviour(tmp_path: Path) -> None:
    program = compiled(tmp_path, MEMORY)
    for seed in (1, 2, 3):
        result = run(program, seed, 200)
        assert result.returncode == 0, result.stderr


def test_races(tmp_path: Path) -> None:
    result = run(compiled(tmp_path, THREADS), 4, 100)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("processor", ["Nehalem", "SandyBridge", "Haswell"])
def test_processors_without_avx2(tmp_path: Path, processor: str) -> None:
    # Nehalem has no AVX at all, SandyBridge no AVX2; an instruction that they lack ends the program.
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64 is not installed")
    command = [emulator, "-cpu", processor, compiled(tmp_path, []), "5", "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    "change",
    [
        ("part.n -= part.n % LANES;", "part.n += part.n % LANES;"),  # past the end
        ("place += run * origin.skip", "place += (1 << (run + 40)) * origin.skip"),  # a shift too far
        ("{ BLOCK = 2048 }", "{ BLOCK = 1024 }"),  # another size of block is no error: the control
    ],
    ids=["overrun", "shift", "control"],
)
def test_the_sanitizers_see_what_is_wrong(tmp_path: Path, change: tuple[str, str]) -> None:
    result = run(compiled(tmp_path, MEMORY, change), 1, 100)
    assert (result.returncode == 0) is change[0].startswith("{")
    assert ("ERROR: AddressSanitizer" in result.stderr) is change[0].startswith("part")
    assert ("runtime error: shift" in result.stderr) is change[0].startswith("place")
