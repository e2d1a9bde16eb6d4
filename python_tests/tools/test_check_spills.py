"""The reader of ptxas' report: it counts kernels, and a spill, a stack frame or an empty report fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "check_spills.py"
KERNEL = "ptxas info    : Compiling entry function '{name}' for 'sm_80'\n    {memory}\n"
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def run(report: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "ptxas.log").write_text(report)
    command = [sys.executable, str(SCRIPT), str(folder / "ptxas.log")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_clean_kernels_pass(tmp_path: Path) -> None:
    result = run("".join(KERNEL.format(name=name, memory=CLEAN) for name in "ab"), tmp_path)
    assert result.returncode == 0
    assert "2 kernels compiled, 0 with spills" in result.stdout


@pytest.mark.parametrize("memory", [CLEAN.replace("0", "8", 1), CLEAN.replace("0 bytes spill s", "16 bytes spill s")])
def test_local_memory_fails_and_names_the_kernel(memory: str, tmp_path: Path) -> None:
    result = run(KERNEL.format(name="good", memory=CLEAN) + KERNEL.format(name="bad", memory=memory), tmp_path)
    assert result.returncode == 1
    assert "bad (sm_80)" in result.stdout
    assert "good" not in result.stdout


def test_a_report_without_kernels_fails(tmp_path: Path) -> None:
    assert run("nothing was compiled", tmp_path).returncode == 1
