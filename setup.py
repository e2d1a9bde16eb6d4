"""How pip reaches CMake. What the package is stands in pyproject.toml, how C++ and CUDA compile in CMakeLists.txt.

Options pass through the environment variable CMAKE_ARGS, for example CMAKE_ARGS="-DSPHINX_CUDA=OFF" pip install .
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure, build, install beside where setuptools expects the extension; it copies from there when editable."""

    def build_extension(self, ext: Extension) -> None:
        # An editable install keeps its build folder, so that one changed room rebuilds in seconds.
        build = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve() / "cmake"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target)], check=True)


# What an isolated build installs beside pyproject.toml's list: headers for one CUDA kernel, where they can be of use.
# Without isolation nothing is installed, and CMake does without what is not there.
CUTLASS = ["nvidia-cutlass==4.2.0.0"] if shutil.which("nvcc") and not os.environ.get("CUTLASS_DIR") else []

setup(
    ext_modules=[Extension("sphinx_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=CUTLASS,
)
