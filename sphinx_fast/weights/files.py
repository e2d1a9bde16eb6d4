"""Folders that appear complete or not at all: written beside, flushed, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill; on success it becomes `target`, on any error nothing of it stays.

    Raises:
        FileExistsError: `target` is there already.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target}: exists already")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process had our number: in containers they come again
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        partial.rename(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a crash after the rename loses nothing."""
    if path.is_file():
        path.chmod(0o644)  # safetensors writes files only their owner may read
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
