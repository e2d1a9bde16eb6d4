"""From annotations of pictures to conversations: the shape that every converter has, and places in the padded square.

A converter is a `Recipe`: the entries of a file, and what is asked about one entry. Everything asked about one picture
becomes one conversation of at most `max_turns` turns, in the order of the file; what does not fit, or is asked there
already, goes to the next one. Questions that would give away each other's answers are asked in different `thread`s,
which are different conversations.

*Boxes.* Pixels of the annotation become the padded square, two decimals. A box is cut at the edge of the picture; one
that is not finite, empty, or wholly outside is bad. An answer that lists boxes goes on without the bad ones; an entry
that has no good box left, or whose question or whole answer is the bad one, is a bad row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.rows import Memory, T, at, conversation, is_id
from sphinx_fast.tasks.boxes import Box


class Asked(NamedTuple):
    picture: Path
    question: str
    answer: str
    thread: str = ""


Recipe = tuple[Iterable[Any], Callable[[Any], Iterable[Asked]]]


@dataclass
class _Draft:
    picture: Path
    name: str
    turns: dict[str, str] = field(default_factory=dict)

    def finished(self) -> Conversation:
        return Conversation(tuple(self.turns.items()), self.picture, self.name)


def converted(recipe: Recipe, name: str, max_turns: int) -> list[Conversation | BadRowError]:
    """The conversations of all entries; an entry that cannot be used is in the list as its error."""
    if not isinstance(max_turns, int) or max_turns < 1:
        raise ValueError(f"max_turns: expected a number from 1, got {max_turns!r}")
    entries, ask = recipe
    rows: list[_Draft | BadRowError] = []
    drafts: dict[tuple[Path, str], list[_Draft]] = {}
    for index, entry in enumerate(tqdm(entries, desc=name, delay=10, mininterval=5)):  # silent where it is fast
        where = f"{name}:{index}"
        try:
            with at(where):
                asked = [(turn, conversation([(turn.question, turn.answer)], turn.picture)) for turn in ask(entry)]
        except BadRowError as error:
            rows.append(BadRowError(error.kind, str(error)))  # without the frames that hold on to the entry
            continue
        for turn, checked in asked:
            question, answer = checked.turns[0]
            mine = drafts.setdefault((turn.picture, turn.thread), [])
            fits = (draft for draft in mine if len(draft.turns) < max_turns and question not in draft.turns)
            draft = next(fits, None)
            if draft is None:
                draft = _Draft(turn.picture, where)
                mine.append(draft)
                rows.append(draft)
            draft.turns[question] = answer
    return [row if isinstance(row, BadRowError) else row.finished() for row in rows]


def _load(recipe: Callable[..., Recipe], path: Path, root: Path, max_turns: int, options: dict[str, Any]) -> list[Any]:
    return converted(recipe(path, root, **options), path.name, max_turns)


def annotated(recipe: Callable[..., Recipe], path: Path, root: Path, *, max_turns: int = 16, **options: Any) -> Memory:
    """A source of what the recipe makes of a file."""
    return Memory(path, partial(_load, recipe, path, root, max_turns, options))


# --- helpers of recipes -----------------------------------------------------------------------------------------------
def chosen(ask: str | Sequence[str], *known: str) -> tuple[str, ...]:
    """The option `ask`: which of several questions are asked."""
    names = (ask,) if isinstance(ask, str) else tuple(ask) if isinstance(ask, list | tuple) else ()
    if not names or not all(name in known for name in names):
        raise ValueError(f"ask: expected some of {', '.join(known)}, got {ask!r}")
    return names


def named(template: str, row: Any, root: Path) -> Path:
    """A picture's file: `{image_id:012d}.jpg` with the fields of the row."""
    if not isinstance(row, dict):
        raise BadRowError("fields", f"expected an object, got a {type(row).__name__}")
    return root / template.format_map(row)


def tail(url: str) -> str:
    """The last folder and the name of a URL, which are the path below the folder of the pictures."""
    return "/".join(url.split("/")[-2:])


def grouped(rows: Iterable[Any], key: str) -> dict[Any, list[Any]]:
    """Rows by the value of a field; under None those where it is missing."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        value = row.get(key) if isinstance(row, dict) else None
        groups.setdefault(value if is_id(value) else None, []).append(row)
    return groups


def size_of(row: Any) -> tuple[int, int]:
    """`width` and `height`."""
    size = tuple(row.get(key) if isinstance(row, dict) else None for key in ("width", "height"))
    if not all(isinstance(side, int) and 0 < side < 2**20 for side in size):
        raise BadRowError("fields", f"size of the picture: expected width and height, got {list(size)}")
    return size  # type: ignore[return-value]


def square(corners: Iterable[Any], size: tuple[int, int]) -> Box:
    """A box [x1, y1, x2, y2] of pixels, cut at the edge of the picture, in the padded square."""
    values = list(corners)
    if len(values) != 4 or not all(isinstance(v, int | float) for v in values):
        raise BadRowError("box", f"expected four numbers, got {values}"[:200])
    try:
        x1, y1, x2, y2 = map(float, values)
        box = Box(x1, y1, x2, y2, "picture")  # refuses what is not finite, or ends before it begins
        inside = Box(max(x1, 0.0), max(y1, 0.0), min(x2, size[0]), min(y2, size[1]), "picture")
        if box.area > 0 and inside.area > 0:
            return inside.to_square(*size)
    except (ValueError, OverflowError):
        pass
    raise BadRowError("box", f"{values} of a picture of {size[0]}x{size[1]}: not finite, empty, or outside"[:200])


def from_sides(box: Any) -> list[Any]:
    """[x, y, width, height] -> corners."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise BadRowError("box", f"expected four numbers, got {box}"[:200])
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def good(rows: Sequence[T], place: Callable[[T], Box]) -> list[tuple[T, Box]]:
    """The rows whose box is good, with it. BadRowError where there are rows and none has one."""
    found: list[tuple[T, Box]] = []
    errors: list[BadRowError] = []
    for row in rows:
        try:
            found.append((row, place(row)))
        except BadRowError as error:
            if error.kind != "box":
                raise
            errors.append(error)
    if errors and not found:
        raise errors[0]
    return found
