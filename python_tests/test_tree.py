"""What a walk over the tree can check of the laws: rooms are whole, kernels know no framework, files are not code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "sphinx_fast"
ROOMS = sorted(path.name for path in CSRC.iterdir() if path.is_dir() and path.name != "common")
MODULES = sorted(PACKAGE.rglob("*.py"))
FOREIGN = PACKAGE / "weights" / "foreign.py"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- rooms ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_whole(room: str) -> None:
    parts = [f"csrc/{room}/{part}" for part in ("args.h", "math.h", "cpu.cpp", "kernel.cuh", "launch.cu", "bind.cpp")]
    parts += [f"sphinx_fast/ops/{room}.py", f"python_tests/ops/test_{room}.py", f"python_tests/csrc/test_{room}.py"]
    parts += [f"bench/bench_{room}.py", f"docs/{room}.md"]
    assert not [part for part in parts if not (ROOT / part).is_file()]


def test_rooms_are_built_and_bound() -> None:
    built = re.search(r"set\(SPHINX_ROOMS ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert built is not None
    assert sorted(built[1].split()) == ROOMS
    bound = re.findall(r"sphinx::(\w+)::bind\(module\);", (CSRC / "module.cpp").read_text())
    assert sorted(bound) == ROOMS


@pytest.mark.parametrize("path", sorted(CSRC.rglob("*.*")), ids=relative)
def test_kernels_know_nothing_of_python_or_torch(path: Path) -> None:
    includes = re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())
    assert not [name for name in includes if re.match(r"(torch|ATen|c10)/", name)]
    if path.name not in ("bind.cpp", "module.cpp"):
        assert not [name for name in includes if name.startswith("pybind11/") or name == "common/borrow.h"]
        assert "Python.h" not in includes or path.name == "borrow.h"


@pytest.mark.parametrize("path", [*MODULES, *sorted(CSRC.rglob("*.*"))], ids=relative)
def test_a_page_per_idea(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= (500 if path.is_relative_to(CSRC) else 400), f"{relative(path)} has {lines} lines"


# --- files, not code --------------------------------------------------------------------------------------------------
FORBIDDEN_IMPORTS = {
    "a pickle": {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"},
    "a shell": {"subprocess", "pty", "commands", "pexpect"},
    "a network client": {"socket", "ssl", "requests", "httpx", "aiohttp", "urllib3", "ftplib", "smtplib", "telnetlib"}
    | {"urllib.request", "http.client", "xmlrpc.client", "websockets", "paramiko", "huggingface_hub"},
    "a template language": {"jinja2", "mako", "string.Template"},
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    *{"os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.spawnl", "os.posix_spawn"},
    *{"torch.hub", "torch.utils.model_zoo", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"},
    *{"pandas.read_pickle", "numpy.fromfile", "importlib.util.spec_from_file_location", "runpy.run_path"},
}
FOREIGN_ONLY = {"torch.load", "torch.jit.load", "torch.package", "torch.serialization"}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` for names and attributes, else ''."""
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(source: str, foreign: bool = False) -> list[str]:
    """What `source` does that only weights/foreign.py may do, or nobody."""
    found: list[str] = []
    tree = ast.parse(source)
    aliases = {"np": "numpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        for name in imported(node):
            prefixes = {".".join(name.split(".")[: end + 1]) for end in range(name.count(".") + 1)}
            found += [f"imports {what}: {name}" for what, names in FORBIDDEN_IMPORTS.items() if prefixes & names]
            if name in FORBIDDEN_ATTRIBUTES or (name in FOREIGN_ONLY and not foreign):
                found.append(f"imports {name}")
        if isinstance(node, ast.Attribute):
            head, _, tail = dotted(node).partition(".")
            name = f"{aliases.get(head, head)}.{tail}"
            if name in FORBIDDEN_ATTRIBUTES or (name in FOREIGN_ONLY and not foreign):
                found.append(f"uses {name}")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_NAMES:
                found.append(f"calls {node.func.id}")
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            for keyword in FORBIDDEN_KEYWORDS & keywords.keys():
                value = keywords[keyword]
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"passes {keyword}")
            if dotted(node.func) == "torch.load":
                safe = keywords.get("weights_only")
                if not (isinstance(safe, ast.Constant) and safe.value is True):
                    found.append("torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_not_code(path: Path) -> None:
    assert violations(path.read_text(), foreign=path == FOREIGN) == []


PLANTED = [
    *["import pickle", "from pickle import loads", "import subprocess as sp", "import urllib.request", "import jinja2"],
    *[
        "from urllib import request",
        "from http.client import HTTPConnection",
        "import huggingface_hub",
        "import socket",
    ],
    *["eval('1')", "exec('1')", "compile('1', 'f', 'eval')", "__import__('os')", "import os\nos.system('ls')"],
    *[
        "from os import popen",
        "import torch\ntorch.load('f')",
        "import torch as t\nt.load('f')",
        "from torch import load",
    ],
    *["import torch\ntorch.jit.load('f')", "import numpy as np\nnp.load('f', allow_pickle=True)"],
    *[
        "AutoModel.from_pretrained('f', trust_remote_code=True)",
        "AutoModel.from_pretrained('f', trust_remote_code=flag)",
    ],
    *["import yaml\nyaml.load('f')", "run('ls', shell=True)", "import numpy\nnumpy.fromfile('f')"],
]


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_violation_is_found(source: str) -> None:
    assert violations(source)


def test_foreign_files_are_read_without_code() -> None:
    assert violations("import torch\ntorch.load(f, weights_only=True)", foreign=True) == []
    assert violations("import torch\ntorch.load(f, weights_only=False)", foreign=True)
    assert violations("import torch\ntorch.load(f)", foreign=True)


def test_ordinary_code_passes() -> None:
    assert violations("import re, torch\nmodel.eval()\nre.compile('x')\ntorch.compile(model)\njson.load(f)") == []
