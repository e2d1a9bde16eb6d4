"""What every reader of training data shares: files, checked fields, numbered rows, and sources made of them.

A reader is a function from one parsed row to a `Conversation`. It says what is wrong with a row by `BadRowError` and
need not know which row it was: `at` puts the file and the line in front. The sources here call it:

    Lines    a file of lines, found by byte offsets: nothing but 16 bytes a line stays in memory
    Memory   a list that a function loads; it is loaded again in a worker, not pickled
    Joined   several sources behind one another; `groups` are their lengths, so that training can shuffle by files
"""

from __future__ import annotations

import glob
import importlib
import json
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from sphinx_fast.data.record import BadRowError, Conversation

T = TypeVar("T")
Paths = str | Path | Sequence[str | Path]

# What broken input makes of code that is right for sound input; a fault of the row, not of the program that reads it.
_FAULTS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


# --- files ------------------------------------------------------------------------------------------------------------
def files(paths: Paths) -> list[Path]:
    """The files (or folders) of one path or several; globs are expanded, in order of their names.

    Raises ValueError for one that is not there.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        here = [str(path)] if os.path.exists(path) else sorted(glob.glob(str(path), recursive=True))
        if not here:
            raise ValueError(f"{path}: no such file")
        found += map(Path, here)
    if not found:
        raise ValueError("no file was given")
    return found


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file as a whole becomes one line that names it."""
    try:
        yield
    except Exception as error:  # the errors of tarfile and pyarrow have no other base
        raise ValueError(f"{path}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"no field {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def extra(module: str) -> ModuleType:
    """A module that only training needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{module.split(".")[0]} is missing: pip install "sphinx-fast[train]"') from error


# --- rows and fields --------------------------------------------------------------------------------------------------
@contextmanager
def at(where: str) -> Iterator[None]:
    """Whatever is wrong with a row becomes a `BadRowError` that names it."""
    try:
        yield
    except BadRowError as error:
        raise BadRowError(error.kind, f"{where}: {error}") from error
    except (OSError, EOFError, MemoryError) as error:
        raise BadRowError("not readable", f"{where}: {one_line(error)}") from error
    except _FAULTS as error:
        raise BadRowError("fields", f"{where}: {one_line(error)}") from error


def parse(data: bytes) -> Any:
    """JSON of a row."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRowError("not readable", f"no JSON: {one_line(error)}") from error


def load_json(path: Path, kind: type[T]) -> T:
    """The JSON of a whole file, whose outermost value must be a `kind`."""
    with opening(path):
        value = json.loads(path.read_bytes())
        if not isinstance(value, kind):
            raise ValueError(f"expected {_KINDS[kind]}, got {_named(value)}")
    return value


def load_lists(path: Path, *keys: str, table: Any = None) -> list[list[Any]]:
    """The lists under these names of the object that a file holds (`table`, where it is read already)."""
    table = load_json(path, dict) if table is None else table
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected an object, got {_named(table)}")
    for key in keys:
        if not isinstance(table.get(key), list):
            raise ValueError(f"{path}: {key!r}: expected a list, got {_named(table.get(key))}")
    return [table[key] for key in keys]


_KINDS: dict[type, str] = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def _named(value: Any) -> str:
    return "nothing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def field(row: Any, key: str, kind: type[T]) -> T:
    """`row[key]`, which must be there and of that kind."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadRowError("fields", f"{key!r}: expected {_KINDS[kind]}, got {_named(value)}")
    return value


def is_id(value: Any) -> bool:
    """Data sets number with numbers or with text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def by_id(rows: list[Any], key: str = "id") -> dict[Any, Any]:
    """Rows by their number. Those without one cannot be meant by any other row and are left out."""
    return {row[key]: row for row in rows if isinstance(row, dict) and is_id(row.get(key))}


# --- conversations ----------------------------------------------------------------------------------------------------
MARK = "<image>"
_MARK = re.compile(f"{MARK}\n|\n{MARK}|{MARK}")


def conversation(turns: Sequence[tuple[str, str]], picture: Path | bytes | None = None) -> Conversation:
    """A conversation that training can use: every source's rows pass here.

    The mark of the picture is taken out of the questions with one newline beside it (the picture always stands first);
    spaces around questions and answers go.
    """
    marks = sum(question.count(MARK) for question, _ in turns)
    if marks > 1:
        raise BadRowError("picture marks", f"{marks} times {MARK}; at most one picture is read")
    if marks and picture is None:
        raise BadRowError("picture marks", f"{MARK}, but no picture")
    clean = tuple((_MARK.sub("", question).strip(), answer.strip()) for question, answer in turns)
    if not clean or not all(answer for _, answer in clean):
        raise BadRowError("no answer", "an answer is empty" if clean else "nothing is answered")
    try:
        "".join(
            [*(text for turn in clean for text in turn), "" if isinstance(picture, bytes) else str(picture)]
        ).encode()
    except UnicodeEncodeError as error:  # JSON may write half of a surrogate pair, which no file can hold
        raise BadRowError("not readable", "no Unicode: half a surrogate pair") from error
    return Conversation(clean, picture)


# --- sources ----------------------------------------------------------------------------------------------------------
class Reader:
    """A `Source`: bounds and the picture's file are checked here, the row is read by the class below it."""

    name: str

    def __len__(self) -> int:
        raise NotImplementedError

    def _read(self, index: int) -> Conversation:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Conversation:
        number, rows = operator.index(index), len(self)
        if not -rows <= number < rows:
            raise IndexError(f"{self.name}: row {number} of {rows}")
        row = self._read(number % rows)
        if isinstance(row.picture, Path) and not os.path.isfile(row.picture):
            raise BadRowError("no picture", f"{row.name}: {str(row.picture)!r}: no such file")
        return row

    @property
    def groups(self) -> tuple[int, ...]:
        """Rows that lie together on the disk, in order: reading a group before the next is fast."""
        return (len(self),)


class Lines(Reader):
    """A file of rows, one a line; blank lines are none. `read` makes a conversation of a line."""

    def __init__(self, path: Path, read: Callable[[bytes], Conversation]) -> None:
        self.path, self.name, self._line = path, path.name, read
        found: list[np.ndarray] = []
        block: list[tuple[int, int]] = []
        offset = 0
        with opening(path), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    block.append((offset, number))
                offset += len(line)
                if len(block) == 65536:  # tuples are many times as large as the array they become
                    found.append(np.array(block, np.int64))
                    block = []
        self._index = np.concatenate([*found, np.array(block, np.int64).reshape(-1, 2)])

    def __len__(self) -> int:
        return len(self._index)

    def _read(self, index: int) -> Conversation:
        offset, number = self._index[index].tolist()
        where = f"{self.name}:{number}"
        with at(where):
            with self.path.open("rb") as file:  # opened for each row: a handle would be shared by forked workers
                file.seek(offset)
                line = file.readline()
            return replace(self._line(line), name=where)


class Memory(Reader):
    """Rows that `load` returns, made conversations by `read` when they are asked for; without it they are already, or
    are the error that reading them raises."""

    def __init__(
        self, path: Path, load: Callable[[], Sequence[Any]], read: Callable[[Any], Conversation] | None = None
    ) -> None:
        self.path, self.name, self._load, self._row = path, path.name, load, read
        self._rows: Sequence[Any] | None = load()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    @property
    def _all(self) -> Sequence[Any]:
        if self._rows is None:
            self._rows = self._load()
        return self._rows

    def __len__(self) -> int:
        return len(self._all)

    def _read(self, index: int) -> Conversation:
        row = self._all[index]
        if self._row is None:  # converted already
            if isinstance(row, BadRowError):
                raise BadRowError(row.kind, str(row))
            return row
        where = f"{self.name}:{index}"
        with at(where):
            return replace(self._row(row), name=where)


class Joined(Reader):
    """Sources behind one another."""

    def __init__(self, name: str, sources: Sequence[Reader]) -> None:
        self.name, self.sources = name, tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(rows for source in self.sources for rows in source.groups)

    def _read(self, index: int) -> Conversation:
        which = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[which]
        return source._read(index - int(self._ends[which]) + len(source))
