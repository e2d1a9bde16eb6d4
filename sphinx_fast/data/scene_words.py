"""Words for what a scene holds: names that fit one thing only, counts, plurals, relations, phrases for a caption; and
the record of a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from sphinx_fast.data.scenes import Scene, SceneObject, SquareBox, Thing
from sphinx_fast.tasks.boxes import Box, Point

NUMERALS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Question:
    """One question, its answer, and what grading needs.

    task    one of scene_questions.TASKS
    kind    what is asked within the task: for vqa colour, shape, count, yes/no; for refer shape, text, person; ...
    boxes   of the things the question is about, in the padded square, [0, 1], unrounded: the right ones where boxes are
            asked for; empty where the scene has no such thing. `names`: theirs, in the same order; of a vqa question
            about none, the name that was asked for
    points  for key_points: (joint, x, y) in the padded square
    quote   characters of the prompt that the answer repeats, or that decide it: the right option
    """

    task: str
    kind: str
    prompt: str
    answer: str
    boxes: tuple[SquareBox, ...] = ()
    names: tuple[str, ...] = ()
    points: tuple[tuple[str, float, float], ...] = ()
    quote: tuple[int, int] | None = None


@lru_cache(maxsize=1024)
def box_text(box: tuple[float, ...]) -> str:
    """`[x1,y1,x2,y2]`, or `[x,y]` of a point."""
    if len(box) == 2:
        return Point(box[0], box[1]).text()
    return Box(box[0], box[1], box[2], box[3]).text()


def plural(noun: str) -> str:
    """Of a noun phrase: `red crosses`, `people`."""
    if noun == "person":
        return "people"
    return noun + ("es" if noun.endswith("s") else "s")


def article(name: str) -> str:
    return name if name.startswith("the ") else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def left_to_right(things: Sequence[Thing]) -> list[Thing]:
    return sorted(things, key=lambda t: (t.box[0] + t.box[2], t.box[1]))


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def covers(noun: str, thing: Thing) -> bool:
    """Whether a noun such as "shape", "circle", "red shape" or "red circle" covers a thing."""
    if not isinstance(thing, SceneObject):
        return False
    words = noun.split()
    colour, shape = (words[0] if len(words) == 2 else None), words[-1]
    return colour in (None, thing.colour) and shape in ("shape", thing.shape)


def count_of(s: Scene, noun: str) -> int:
    """How many shapes a noun covers."""
    return sum(covers(noun, o) for o in s.objects)


def exists(s: Scene, noun: str) -> bool:
    """Whether a noun such as "person", "circle" or "red circle" is in the scene."""
    return bool(s.people) if noun == "person" else count_of(s, noun) > 0


def description(s: Scene, thing: Thing, rng: Random | None = None) -> str | None:
    """Words that fit this thing only, or None: the plainest ones, with `rng` now and then longer or shorter ones."""
    if not isinstance(thing, SceneObject):
        same = [t for t in s.things if t.name == thing.name]
        return thing.name if len(same) == 1 else by_side(thing, same)
    alike = [o for o in s.objects if o.name == thing.name]
    sized = [o for o in alike if o.size == thing.size]
    if len(alike) == 1:
        turn = rng.random() if rng else 1.0
        if turn < 0.1:
            return f"{thing.size} {thing.name}"
        if turn < 0.2 and count_of(s, thing.shape) == 1:
            return thing.shape
        return thing.name
    return f"{thing.size} {thing.name}" if len(sized) == 1 else by_side(thing, alike)


def by_side(thing: Thing, same: Sequence[Thing]) -> str | None:
    """`red circle on the left` where two things share a name and lie clearly beside or above each other."""
    if len(same) != 2:
        return None
    other = same[0] if same[1] is thing else same[1]
    words = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}
    side = relation(thing, other)
    return f"{thing.name} {words[side]}" if side else None


def relation(a: Thing, b: Thing) -> str | None:
    """left of, right of, above or below, where boxes are apart one way and their middles clearly less the other way."""
    dx = (a.box[0] + a.box[2] - b.box[0] - b.box[2]) / 2
    dy = (a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2
    if abs(dx) > 1.5 * abs(dy) and (a.box[2] <= b.box[0] or b.box[2] <= a.box[0]):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx) and (a.box[3] <= b.box[1] or b.box[3] <= a.box[1]):
        return "above" if dy < 0 else "below"
    return None


def groups(s: Scene, among: Sequence[Thing] | None = None) -> list[tuple[str, list[Thing]]]:
    """(phrase, things) from left to right, a name's things together: `two red circles`, `a person`, `the word stop`.

    among  only these things
    """
    by_name: dict[str, list[Thing]] = {}
    for thing in left_to_right([t for t in (s.things if among is None else among) if t is not s.defect]):
        by_name.setdefault(thing.name, []).append(thing)
    return [(article(n) if len(ts) == 1 else f"{NUMERALS[len(ts)]} {plural(n)}", ts) for n, ts in by_name.items()]
