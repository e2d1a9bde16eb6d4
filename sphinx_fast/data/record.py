"""The one record that training reads: a conversation about at most one picture, whatever data set it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# Why a row is not used. Training counts them by these names and goes on without the row.
BAD_ROWS = (
    "not readable",  # no JSON, no UTF-8, a truncated archive member
    "fields",  # a field is missing or of another type
    "turns",  # speakers do not alternate, or somebody else speaks
    "no answer",  # an empty answer, or none
    "picture marks",  # more than one <image>, or one without a picture
    "no picture",  # the file is not there
    "picture",  # it is there and cannot be decoded, or is too large
    "box",  # not finite, empty, or outside the picture
    "too long",  # no answer fits behind the picture and the question
)


class BadRowError(ValueError):
    """A row that cannot be used: its kind, one of `BAD_ROWS`, and one line that names the row and what is wrong."""

    def __init__(self, kind: str, message: str) -> None:
        assert kind in BAD_ROWS, kind
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Workers send it to the process that counts."""
        return BadRowError, (self.kind, str(self))


class Look(NamedTuple):
    """What one must look at to say a part of an answer.

    start, stop  the answer's characters
    boxes        in the padded square, (x1, y1, x2, y2) in [0, 1]
    quote        characters of the question that the part repeats, or that decide it (the option whose letter it is);
                 the k-th token of the one belongs to the k-th of the other
    """

    start: int
    stop: int
    boxes: tuple[tuple[float, ...], ...] = ()
    quote: tuple[int, int] | None = None


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about a picture.

    turns    (question, answer) pairs in order. A caption is one answer to the empty question.
    picture  path of the file, the file's bytes, or None: text only
    name     where it came from, for messages: "train.jsonl:17"
    weights  of the answers in the loss, 0 for one that is not trained; empty: all 1
    looks    per turn what its answer is about; empty: not known. Training with a pointer uses them.
    """

    turns: tuple[tuple[str, str], ...]
    picture: Path | bytes | None = None
    name: str = ""
    weights: tuple[float, ...] = ()
    looks: tuple[tuple[Look, ...], ...] = ()

    def as_json(self, root: Path | None = None) -> dict[str, Any]:
        """LLaVA's row, which the released training code reads too; the picture's path relative to `root`.

        Raises ValueError for a picture that is not a file.
        """
        if isinstance(self.picture, bytes):
            raise ValueError(f"{self.name}: its picture is no file, so it cannot be written as JSON")
        row: dict[str, Any] = {}
        if self.picture is not None:
            inside = root is not None and self.picture.is_relative_to(root)
            row["image"] = str(self.picture.relative_to(root) if root and inside else self.picture)
        row["conversations"] = [
            {"from": speaker, "value": text}
            for turn in self.turns
            for speaker, text in zip(("human", "gpt"), turn, strict=True)
        ]
        return row


class Source(Protocol):
    """Conversations by number. Reading one raises `BadRowError` when it cannot be used, and harms no other.

    Sources are pickled to worker processes: they open files when they are read, not before.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


Row = Mapping[str, Any]  # of a foreign file, before it is checked
