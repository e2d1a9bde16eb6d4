"""Finding the compiled extension `sphinx_fast._C`, and saying what to do where there is none."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

BUILD_HINT = "build it in the checkout with: pip install -e . --no-build-isolation"


@cache
def _find() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("sphinx_fast._C"), ""
    except ImportError as error:
        return None, str(error)


def extension() -> ModuleType:
    """The compiled extension. RuntimeError, with the command that builds it, where it is missing or does not load."""
    module, why_not = _find()
    if module is None:
        raise RuntimeError(f"sphinx-fast's compiled extension is not usable ({why_not}); {BUILD_HINT}")
    return module


def build_info() -> dict[str, Any]:
    """What the build is, for `doctor`.

    Keys: compiled (bool), path, compiler, cuda (version of nvcc, or None: CPU only), cuda_archs, and, where something
    is missing, why_not and hint; the values are None where they do not apply.
    """
    module, why_not = _find()
    info: dict[str, Any] = dict.fromkeys(("path", "compiler", "cuda", "cuda_archs", "why_not", "hint"))
    info["compiled"] = module is not None
    if module is None:
        info.update(why_not=why_not, hint=BUILD_HINT)
        return info
    info.update(module.build_info(), path=module.__file__)
    if info["cuda"] is None:
        info.update(
            why_not="no CUDA kernels: nvcc was not found, or SPHINX_CUDA=OFF, when it was built",
            hint="install a CUDA toolkit, then CMAKE_ARGS=-DSPHINX_CUDA=ON pip install -e . --no-build-isolation",
        )
    return info
