"""The CUDA kernels on the CPU: compiled by the host's compiler through csrc/host_cuda, called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "python_tests" / "csrc"


def compiled(source: str, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    includes = [f"-I{SOURCES / 'host_cuda'}", f"-I{ROOT / 'csrc'}"]
    shared = ["-std=c++17", "-ffp-contract=off", "-pthread", "-w", *options]
    command = [compiler, *shared, *includes, str(SOURCES / source), "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def library(source: str, folder: Path, *options: str) -> Any:
    """The functions of a source file, for ctypes."""
    made = folder / f"{Path(source).stem}.so"
    compiled(source, made, "-O2", "-shared", "-fPIC", *options).check_returncode()
    return ctypes.CDLL(str(made))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def under_thread_sanitizer(source: str, folder: Path, *calls: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """A program's runs, one for each list of arguments. Skips where there is no ThreadSanitizer."""
    program = folder / Path(source).stem
    build = compiled(source, program, "-O1", "-g", "-fsanitize=thread")
    if "tsan" in build.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    build.check_returncode()
    runs = []
    for arguments in calls:
        run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=240, check=False)
        if "unexpected memory mapping" in run.stderr:
            pytest.skip("ThreadSanitizer does not run on this kernel")
        runs.append(run)
    return runs
