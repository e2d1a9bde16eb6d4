"""A drawn corpus: short documents in the words of scenes, about things nobody sees, which sphinx-mini reads beside
captions.

Every document can be continued only by who understood it: positions that follow from others, sums, comparisons. It
stands for the text-only corpus of the paper's first stage (section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from sphinx_fast.data.scene_drawing import COLOURS, SHAPES
from sphinx_fast.data.scene_words import NUMERALS, plural

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _names(rng: Random, count: int) -> list[str]:
    """Different things, no two of one shape."""
    return [f"{rng.choice(list(COLOURS))} {shape}" for shape in rng.sample(SHAPES, count)]


def _order(rng: Random) -> str:
    """Three things in a row, then what follows."""
    a, b, c = _names(rng, 3)
    where = rng.choice(list(OPPOSITE))
    return (
        f"The {a} is {where} the {b}. The {b} is {where} the {c}. So the {a} is {where} the {c},"
        f" and the {c} is {OPPOSITE[where]} the {a}."
    )


def _sum(rng: Random) -> str:
    """Two counts and their sum."""
    (a, b), few, more = rng.sample(SHAPES, 2), rng.randint(2, 3), rng.randint(2, 3)
    colour = rng.choice(list(COLOURS))
    return (
        f"There are {NUMERALS[few]} {colour} {plural(a)} and {NUMERALS[more]} {colour} {plural(b)}."
        f" So there are {NUMERALS[few + more]} {colour} shapes and no other shapes."
    )


def _size(rng: Random) -> str:
    """Two things of different size, and which is which."""
    a, b = _names(rng, 2)
    return f"The {a} is small and the {b} is large. The small one is the {a}, the large one is the {b}."


def _colour(rng: Random) -> str:
    """Colours of three things, asked again in another order."""
    names = _names(rng, 3)
    told = ". ".join(f"The {name.split()[1]} is {name.split()[0]}" for name in names)
    rng.shuffle(names)
    return f"{told}. What color is the {names[0].split()[1]}? It is {names[0].split()[0]}."


def document(seed: int) -> str:
    """Two to four paragraphs; the same for a seed."""
    rng = Random(seed)
    return " ".join(rng.choice((_order, _sum, _size, _colour))(rng) for _ in range(rng.randint(2, 4)))


def documents(count: int, first: int = 0) -> Iterator[str]:
    return (document(seed) for seed in range(first, first + count))


def write_texts(path: Path, count: int, first: int = 0) -> None:
    """`count` documents in one file, a form feed behind each, unless it is there already."""
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text("\f".join(documents(count, first)), encoding="utf-8")
        part.rename(path)
