"""Rows that are conversations already: LLaVA's and ShareGPT's, and messages as OpenAI writes them.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A"}]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}},
                                               {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A"}]}

Files are JSON lines, or one JSON array in a `.json` file (held in memory). Of what is said:

* A system text is put before the first question, an empty line between: the model's own system text is fixed.
* Answers before the first question (ShareGPT cuts long conversations) and a last question without answer are dropped.
* Otherwise question and answer must alternate; anybody else who speaks makes the row a bad one.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.rows import Lines, Memory, Reader, conversation, field, load_json, one_line, opening, parse

MAX_PICTURE_BYTES = 64 * 2**20  # of a picture inside a row
_ROLES = {
    **dict.fromkeys(("human", "user"), "question"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "answer"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_DATA = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def turns(said: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(speaker, text) as pairs of question and answer."""
    pairs: list[tuple[str, str]] = []
    system, question = "", None
    for number, (speaker, text) in enumerate(said):
        role = _ROLES.get(speaker.lower())
        if role == "system" and number == 0:
            system = text.strip()
        elif role == "question" and question is None:
            question = text
        elif role == "answer" and question is not None:
            pairs.append((question, text))
            question = None
        elif role != "answer" or pairs:
            raise BadRowError(
                "turns",
                f"turn {number}: {speaker!r} speaks, an {'answer' if question else 'question'} was expected"[:200],
            )
    if system and pairs:
        pairs[0] = (f"{system}\n\n{pairs[0][0]}", pairs[0][1])
    return pairs


def picture(value: str, root: Path) -> Path | bytes:
    """What a row calls its picture: a path, or the picture itself as a data: URL. Nothing is fetched."""
    if _URL.match(value):
        raise BadRowError("no picture", f"{value[:80]!r} is a URL, and nothing is fetched")
    if not value.startswith("data:"):
        return root / value
    head = _DATA.match(value)
    if not head:
        raise BadRowError("picture", f"{value[:40]!r}: expected data:image/...;base64,")
    if len(value) > MAX_PICTURE_BYTES * 4 / 3:
        raise BadRowError("picture", f"a picture of more than {MAX_PICTURE_BYTES >> 20} MiB")
    try:
        return base64.b64decode(value[head.end() :], validate=True)
    except ValueError as error:
        raise BadRowError("picture", f"no base64: {one_line(error)}") from error


def one_picture(found: list[Any], root: Path) -> Path | bytes | None:
    if len(found) > 1:
        raise BadRowError("picture marks", f"{len(found)} pictures; at most one is read")
    if found and not isinstance(found[0], str):
        raise BadRowError("fields", f"picture: expected text, got a {type(found[0]).__name__}")
    return picture(found[0], root) if found and found[0] else None


def conversations_of(row: Any) -> list[tuple[str, str]]:
    """The turns of LLaVA's row."""
    return turns((field(said, "from", str), field(said, "value", str)) for said in field(row, "conversations", list))


def llava_row(row: Any, root: Path) -> Conversation:
    said = conversations_of(row)
    image = row.get("image")
    return conversation(said, one_picture(image if isinstance(image, list) else [image or ""], root))


def openai_row(row: Any, root: Path) -> Conversation:
    pictures: list[Any] = []
    said = [(field(message, "role", str), _content(message, pictures)) for message in field(row, "messages", list)]
    return conversation(turns(said), one_picture(pictures, root))


def _content(message: Any, pictures: list[Any]) -> str:
    """The text of a message; its pictures are added to `pictures`."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in field(message, "content", list):
        kind = field(part, "type", str)
        if kind == "text":
            texts.append(field(part, "text", str))
        elif kind in ("image_url", "image"):
            at = part.get(kind)
            pictures.append(field(at, "url", str) if isinstance(at, dict) else field(part, kind, str))
        else:
            raise BadRowError("fields", f"a part of type {kind!r}"[:80])
    return "\n".join(texts)


def _line(line: bytes, row: Callable[[Any], Conversation]) -> Conversation:
    return row(parse(line))


def _json(path: Path, row: Callable[[Any], Conversation]) -> Reader:
    """A `.json` file whose first sign is `[` is an array; everything else is lines."""
    if path.suffix == ".json":
        with opening(path), path.open("rb") as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"["):
            return Memory(path, partial(load_json, path, list), row)
    return Lines(path, partial(_line, row=row))


def llava(path: Path, root: Path) -> Reader:
    """LLaVA's and ShareGPT's rows, with or without pictures."""
    return _json(path, partial(llava_row, root=root))


def openai(path: Path, root: Path) -> Reader:
    """Messages as OpenAI writes them."""
    return _json(path, partial(openai_row, root=root))
