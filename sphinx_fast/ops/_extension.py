"""Finding the compiled extension `sphinx_fast._C`, and saying what to do where there is none."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what kernels compute in
CUDA_HINT = "install a CUDA toolkit, then CMAKE_ARGS=-DSPHINX_CUDA=ON pip install -e . --no-build-isolation"
BUILD_HINT = "build it in the checkout with: pip install -e . --no-build-isolation"


def _find() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("sphinx_fast._C"), ""
    except ImportError as error:
        return None, str(error)


_module, _why_not = _find()  # constants, so that torch.compile need not trace how they were found


def extension() -> ModuleType:
    """The compiled extension. RuntimeError, with the command that builds it, where it is missing or does not load."""
    if _module is None:
        raise RuntimeError(f"sphinx-fast's compiled extension is not usable ({_why_not}); {BUILD_HINT}")
    return _module


def covers(device: torch.device) -> bool:
    """Whether this build has kernels for tensors there.

    A CUDA device in a build without its half: False, after one warning; a model then computes with torch alone. Without
    any compiled extension there is no silent second best: RuntimeError.
    """
    extension()
    if device.type == "cuda" and not _HAS_CUDA:
        if not torch.compiler.is_compiling():
            _warn_of_no_cuda()
        return False
    return device.type in ("cpu", "cuda")


@cache
def _warn_of_no_cuda() -> None:
    warnings.warn(f"sphinx-fast was built without CUDA and runs on torch alone; {CUDA_HINT}", stacklevel=4)


def build_info() -> dict[str, Any]:
    """What the build is, for `doctor`.

    Keys: compiled (bool), path, compiler, cuda (version of nvcc, or None: CPU only), cuda_archs, and, where something
    is missing, why_not and hint; the values are None where they do not apply.
    """
    info: dict[str, Any] = dict.fromkeys(("path", "compiler", "cuda", "cuda_archs", "why_not", "hint"))
    info["compiled"] = _module is not None
    if _module is None:
        info.update(why_not=_why_not, hint=BUILD_HINT)
        return info
    info.update(_module.build_info(), path=_module.__file__)
    if info["cuda"] is None:
        info.update(
            why_not="no CUDA kernels: nvcc was not found, or SPHINX_CUDA=OFF, when it was built",
            hint=CUDA_HINT,
        )
    return info


_HAS_CUDA = build_info()["cuda"] is not None
