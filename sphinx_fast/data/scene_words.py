"""Words for what a scene holds: names that fit one thing only, counts, plurals, relations, phrases for a caption."""

from collections.abc import Sequence
from random import Random

from sphinx_fast.data.scenes import Scene, SceneObject, Thing

NUMERALS = ("no", "one", "two", "three", "four", "five", "six")


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


def count_of(s: Scene, noun: str) -> int:
    """How many shapes a noun such as "shape", "circle", "red shape" or "red circle" covers."""
    words = noun.split()
    colour, shape = (words[0] if len(words) == 2 else None), words[-1]
    return sum((colour in (None, o.colour)) and (shape in ("shape", o.shape)) for o in s.objects)


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


def groups(s: Scene) -> list[tuple[str, list[Thing]]]:
    """(phrase, things) from left to right, a name's things together: `two red circles`, `a person`, `the word stop`."""
    by_name: dict[str, list[Thing]] = {}
    for thing in left_to_right([t for t in s.things if t is not s.defect]):
        by_name.setdefault(thing.name, []).append(thing)
    return [(article(n) if len(ts) == 1 else f"{NUMERALS[len(ts)]} {plural(n)}", ts) for n, ts in by_name.items()]
