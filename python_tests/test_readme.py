"""The README tells the truth: its commands and snippets run, and its tree names what is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import GOLDEN

from sphinx_fast import EMBEDDED_MODEL
from sphinx_fast.data.scenes import scene

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder as a reader has it: a photo and a released checkpoint under the README's names."""
    from PIL import Image

    Image.fromarray(scene(0).picture).save(tmp_path / "photo.jpg")
    shutil.copytree(GOLDEN / "llama_ens", tmp_path / "RELEASED_FOLDER")
    for name in ("MODEL", "REAL", "SYN"):
        shutil.copytree(EMBEDDED_MODEL, tmp_path / name)
    row = {"image": "photo.jpg", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "it"}]}
    (tmp_path / "talk.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (tmp_path / "finetune.yaml").write_text(next(code for language, code in BLOCKS if language == "yaml"))
    return tmp_path


def run(arguments: list[str], folder: Path, text: str | None = None) -> str:
    """Run a program there; its output. Fails with what it printed."""
    done = subprocess.run(arguments, cwd=folder, input=text, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index: int, desk: Path) -> None:
    assert run([sys.executable, "-c", SNIPPETS[index]], desk).strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, desk: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":  # the targets exist; this very test runs inside one of them
        assert run(["make", "--dry-run", *words[1:]], ROOT).strip()
        return
    assert words[0] == "sphinx-fast"
    text = "What is in the image?\n\n" if words[1] == "chat" else None
    assert run([sys.executable, "-m", "sphinx_fast.cli", *words[1:]], desk, text).strip()


def test_there_is_something_to_run() -> None:
    assert len(SNIPPETS) >= 3 and len(COMMANDS) >= 6


def tree_names() -> set[str]:
    """Every file and folder name in the README's tree."""
    tree = README.split("## The tree is the data flow")[1].split("\n## ")[0]
    entries = [line[4:] for line in tree.splitlines() if line.startswith("    ")]
    return set(re.findall(r"[\w.]+\.(?:py|cpp|h|cu|cuh)\b|\w+/", "\n".join(entries)))


def test_the_tree_names_only_what_is_there() -> None:
    there = {p.name for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts}
    there |= {p.name + "/" for p in ROOT.rglob("*") if p.is_dir() and ".venv" not in p.parts}
    assert tree_names() - there == set()


def test_every_module_of_the_main_rooms_is_in_the_tree() -> None:
    rooms = ("image", "vision", "model", "infer", "data", "train", "weights")
    modules = {p.name for room in rooms for p in (ROOT / "sphinx_fast" / room).glob("*.py")}
    modules |= {p.name for p in (ROOT / "sphinx_fast").glob("*.py")}
    assert modules - tree_names() == set()
