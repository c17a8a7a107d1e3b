"""Every set of kernels against the scalar one, in a program without Python: here, and for ARM in an emulator."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / "native" / "build.sh"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the script is written for Linux")]


def compare(tmp_path: Path, compiler: list[str], run: list[str], seconds: int) -> str:
    if shutil.which(compiler[0]) is None or (run and shutil.which(run[0]) is None):
        pytest.skip(f"needs {compiler[0]} {' '.join(run)}: apt install g++-aarch64-linux-gnu qemu-user")
    program = str(tmp_path / "compare")
    subprocess.run(["bash", str(BUILD), program, *compiler], check=True)
    done = subprocess.run([*run, program, str(seconds), "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_of_this_machine_under_sanitizers(tmp_path: Path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
    assert " 0 failed" in compare(tmp_path, ["c++", *flags], [], 10)


@pytest.mark.parametrize("cpu", ["max", "cortex-a57"])  # with and without the dot product
def test_neon_in_an_emulator(tmp_path: Path, cpu: str):
    out = compare(tmp_path, ["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64", "-cpu", cpu], 10)
    assert ("neon_dot" in out) == (cpu == "max") and "neon" in out
