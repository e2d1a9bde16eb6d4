"""A folder appears complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sphinx_fast.weights.files import new_folder


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not target.exists()
    assert (target / "sub" / "b").read_text() == "2"
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_it_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="exists already"), new_folder(tmp_path / "model"):
        pass


def test_what_a_killed_process_of_our_number_left(tmp_path: Path) -> None:
    """In a container a process comes again with the number that the killed one had."""
    left = tmp_path / f".model.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("1")
    with new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["model", "model/a"]
