"""WebDataset shards: tar files in which a picture and its text lie behind one another.

    000.jpg 000.txt 001.png 001.json ...      the key is the name up to its first dot

The text is LLaVA's `conversations` in a `.json`, or else a caption: a `.txt`, or `caption` or `text` of the `.json`. A
row without a picture is text only if it is a conversation that names none. The headers are walked once, nothing is
unpacked; a row is one open and two reads. An archive that breaks off keeps the rows
before that, and one more that says so.
"""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sphinx_fast.data.chat import conversations_of
from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.rows import Reader, at, conversation, opening, parse

_COLUMNS = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 2, "json": 4}  # of the index; there the size follows
_MAX_BYTES = 256 * 2**20  # of a member
_BROKEN = -2  # in the index: the archive broke off here


class Shard(Reader):
    """One tar file. `prompt` is the question that a caption answers."""

    def __init__(self, path: Path, root: Path, *, prompt: str = "") -> None:
        self.path, self.name, self._prompt = path, path.name, prompt
        with opening(path):
            try:
                self._index = self._walk()
            except tarfile.TarError as error:
                raise ValueError(f"no tar file (compressed ones are not read): {error}") from error

    def _walk(self) -> np.ndarray:
        """[rows, 6] int64: offset and size of picture, text and JSON; offset -1 where there is none."""
        rows: list[list[int]] = []
        key, last = "", -1
        with tarfile.open(self.path, "r:") as archive:
            while True:
                try:
                    member = archive.next()
                    if member is not None and member.offset <= last:
                        raise tarfile.ReadError("headers run in a circle")
                    if member is None and _more(archive):
                        raise tarfile.ReadError("no header")
                except Exception:  # tarfile lets through whatever a broken header makes of its numbers
                    rows.append([_BROKEN] * 6)
                    break
                if member is None:
                    break
                last = member.offset
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                column = _COLUMNS.get(extension.rpartition(".")[2].lower())
                if not member.isreg() or member.issparse() or column is None:
                    continue
                if not rows or f"{folder}/{stem}" != key:
                    key = f"{folder}/{stem}"
                    rows.append([-1] * 6)
                rows[-1][column : column + 2] = member.offset_data, member.size
        return np.array(rows, np.int64).reshape(-1, 6)

    def __len__(self) -> int:
        return len(self._index)

    def _member(self, row: np.ndarray, column: int) -> bytes | None:
        offset, size = row[column : column + 2].tolist()
        if offset == -1:
            return None
        if not 0 <= size <= _MAX_BYTES:
            raise BadRowError("not readable", f"a member of {size} bytes")
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise BadRowError("not readable", f"the archive ends within a member, {size - len(data)} bytes early")
        return data

    def _read(self, index: int) -> Conversation:
        row, where = self._index[index], f"{self.name}:{index}"
        with at(where):
            if row[0] == _BROKEN:
                raise BadRowError("not readable", "the archive is broken from here on")
            picture, caption, data = (self._member(row, column) for column in (0, 2, 4))
            record: Any = parse(data) if data is not None else {}
            talk = isinstance(record, dict) and "conversations" in record
            if picture is None and not (talk and not record.get("image")):
                raise BadRowError("no picture", "no jpg, jpeg, png or webp of that name")
            turns = conversations_of(record) if talk else [(self._prompt, _caption(caption, record))]
            return replace(conversation(turns, picture), name=where)


def _more(archive: tarfile.TarFile) -> bool:
    """Whether something else than zeros stands where tarfile saw the end: it takes a broken header for one."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return any(archive.fileobj.read(tarfile.BLOCKSIZE))


def _caption(text: bytes | None, record: Any) -> str:
    if text is not None:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise BadRowError("not readable", "the caption is no UTF-8") from error
    return caption_of(record)


def caption_of(record: Any) -> str:
    """`caption` or `text` of a row."""
    found = [record[key] for key in ("caption", "text") if isinstance(record, dict) and record.get(key) is not None]
    if not found:
        raise BadRowError("no answer", "no caption: expected 'caption' or 'text'")
    if not isinstance(found[0], str):
        raise BadRowError("fields", f"caption: expected text, got a {type(found[0]).__name__}")
    return found[0]
