"""Parquet: pictures with captions or conversations, as Hugging Face's data sets write them; and streams of documents.

    image       bytes of the file, {"bytes": ..., "path": ...}, or a path
    text        `conversations` (LLaVA's rows), or `caption` or `text`

A row group is read at once and kept until a row of another one is asked for: shuffle by `groups`. Documents, for
training on text alone, are a stream and never all in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sphinx_fast.data.chat import conversations_of, picture
from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.rows import Paths, Reader, at, conversation, extra, field, files, one_line, opening, parse
from sphinx_fast.data.shards import caption_of

_COLUMNS = ("image", "conversations", "caption", "text")


class Table(Reader):
    """One Parquet file. `prompt` is the question that a caption answers."""

    def __init__(self, path: Path, root: Path, *, prompt: str = "") -> None:
        self.path, self.name, self.root, self._prompt = path, path.name, root, prompt
        parquet = extra("pyarrow.parquet")
        with opening(path), parquet.ParquetFile(path) as file:
            self._columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            if self._columns in ([], ["image"]):
                raise ValueError(
                    f"expected a column 'conversations', 'caption' or 'text', got {file.schema_arrow.names}"
                )
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._ends = np.cumsum(counts, dtype=np.int64)
            if any(count < 0 for count in counts):
                raise ValueError("a row group of negative length")
        self._kept: tuple[int, Any] = (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": (-1, None)}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(np.diff(self._ends, prepend=0).tolist())

    def _group(self, group: int) -> Any:
        if self._kept[0] != group:
            self._kept = (-1, None)  # not two groups in memory
            with extra("pyarrow.parquet").ParquetFile(self.path) as file:
                table = file.read_row_group(group, columns=self._columns, use_threads=False)
            table.validate()
            self._kept = (group, table)
        return self._kept[1]

    def _read(self, index: int) -> Conversation:
        group = int(np.searchsorted(self._ends, index, side="right"))
        number = index - (int(self._ends[group - 1]) if group else 0)
        where = f"{self.name}:{index}"
        with at(where):
            try:
                table = self._group(group)
                row = {name: table.column(name)[number].as_py() for name in self._columns}
            except Exception as error:  # pyarrow's errors have no other base
                raise BadRowError("not readable", f"row group {group}: {one_line(error)}") from error
            talk = row.get("conversations") is not None
            turns = conversations_of(row) if talk else [(self._prompt, caption_of(row))]
            return replace(conversation(turns, self._picture(row.get("image"))), name=where)

    def _picture(self, image: Any) -> Path | bytes | None:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            return picture(image, self.root)
        if not image and "image" in self._columns:
            if "conversations" in self._columns:
                return None  # a data set of conversations has rows without pictures
            raise BadRowError("no picture", "'image' is empty")
        if image is None or isinstance(image, bytes):
            return image
        raise BadRowError("fields", f"'image': expected bytes or a path, got a {type(image).__name__}")


# --- documents --------------------------------------------------------------------------------------------------------
def documents(paths: Paths, column: str | None = None, bad: Counter[str] | None = None) -> Iterator[str]:
    """The documents of Parquet, JSON lines and plain text files, one by one, in constant memory.

    Args:
        paths: files, by their suffix `.parquet`, `.jsonl`/`.json` (lines) or else plain text, whose documents end with
            a form feed; without one the file is one document.
        column: the column or field; by default the first there is of `text` and `content`.
        bad: counts the documents that cannot be read, by kind; they are left out. Empty ones are no documents.

    Raises:
        ValueError: a file cannot be used at all.
    """
    kinds = {".parquet": _of_parquet, ".jsonl": _of_lines, ".json": _of_lines}
    for path in files(paths):
        for document in kinds.get(path.suffix, _of_text)(path, column):
            if isinstance(document, BadRowError):
                if bad is not None:
                    bad[document.kind] += 1
            elif document.strip():
                yield document


def _of_parquet(path: Path, column: str | None) -> Iterator[str | BadRowError]:
    parquet = extra("pyarrow.parquet")
    with opening(path), parquet.ParquetFile(path) as file:
        there = file.schema_arrow.names
        name = next((name for name in ([column] if column else ["text", "content"]) if name in there), None)
        if name is None:
            raise ValueError(f"no column {column or 'text'!r}, only {', '.join(there)[:200]}")
        for batch in file.iter_batches(256, columns=[name], use_threads=False):
            batch.validate()
            for value in batch.column(0):
                yield _document(value.as_py)


def _of_lines(path: Path, column: str | None) -> Iterator[str | BadRowError]:
    def text(line: bytes) -> str:
        row = parse(line)
        known = isinstance(row, dict) and "text" not in row and "content" in row
        return field(row, column or ("content" if known else "text"), str)

    with opening(path), path.open("rb") as file:
        for line in file:
            if not line.isspace():
                yield _document(partial(text, line))


def _of_text(path: Path, column: str | None) -> Iterator[str | BadRowError]:
    rest: list[bytes] = []
    with opening(path), path.open("rb") as file:
        while block := file.read(2**20):
            *whole, last = block.split(b"\f")  # never a part of another sign in UTF-8
            for piece in whole:
                yield _document(b"".join([*rest, piece]).decode)
                rest = []
            rest.append(last)
        yield _document(b"".join(rest).decode)


def _document(read: Callable[[], Any]) -> str | BadRowError:
    """What `read()` returns, if it is text that a file can hold."""
    try:
        text = read()
        if not isinstance(text, str):
            return BadRowError("fields", f"expected text, got {type(text).__name__}")
        text.encode()
        return text
    except BadRowError as error:
        return error
    except ValueError as error:
        return BadRowError("not readable", str(error))
