"""Boxes and points: what the model writes <-> coordinates of the user's picture.

A coordinate carries its frame:

    square    what the model reads and writes: [0, 1] of the picture padded to a square, x to the right, y down
    picture   pixels of the user's picture, (0, 0) the upper left corner of the upper left pixel, (W, H) the lower right

With side = max(W, H) and the picture pasted at offset = floor((side - w) / 2) on each axis (w: W for x, H for y),

    pixel = v * side - offset            v = (pixel + offset) / side

which is the padding of the room `views`. Text has two decimals, so a coordinate that went through text is at most
0.005 * side pixels off; one that did not is exact to rounding.

Forms read (and printed by `format_boxes`, `format_region`):

    [x1,y1,x2,y2]      [x,y]      [box;box]      [box];[box]      [x1,y1,x2,y2,x1,y1,x2,y2]
    name[box]          name[x,y]  <p>name</p>[box];[box]          spaces anywhere between numbers

Reading never raises, whatever the text, and takes linear time. Its rules:

* A bracket counts if it holds only plain decimal numbers, commas and semicolons; others (words, nan, inf, 1e9, more
  than 4 digits before or 17 behind the point, never closed) are skipped. Of nested brackets the inner ones are read.
* Each part between semicolons: 2 numbers are a point, 4n numbers n boxes, any other count is skipped.
* A box or point with a number outside [-0.1, 1.1] is dropped: those are not coordinates of the square. Numbers just
  outside [0, 1] are kept as written; `to_picture(..., clip=True)` clips.
* Corners may come in any order; a Box always has x1 <= x2 and y1 <= y2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Frame = Literal["square", "picture"]
Style = Literal["separate", "joined", "flat"]

_SLACK = 0.1  # how far outside [0, 1] a number may lie and still be a coordinate of the square
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_COORDINATES = re.compile(r"[0-9.,;+\-\s]+")
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]{1,4}(?:\.[0-9]{0,17})?|\.[0-9]{1,17}))\s*")


def _offsets(width: int, height: int) -> tuple[int, int, int]:
    """Of a picture of width x height: side of the padded square, and where its left and upper edge lie in it."""
    if width < 1 or height < 1:
        raise ValueError(f"picture size: expected at least 1x1, got {width}x{height}")
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def _check(what: str, values: Sequence[float], frame: str) -> None:
    if frame not in ("square", "picture"):
        raise ValueError(f"{what}: frame: expected 'square' or 'picture', got {frame!r}")
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"{what}: expected finite coordinates, got {list(values)}")


def _clipped(v: float, limit: float) -> float:
    return min(max(v, 0.0), float(limit))


def _written(what: str, values: Sequence[float], frame: str) -> str:
    """`0.37,0.24`: two decimals, clipped to [0, 1]."""
    if frame != "square" or not all(-_SLACK <= v <= 1 + _SLACK for v in values):
        raise ValueError(
            f"{what}: the model reads the padded square, [0, 1]; got {list(values)} of the {frame}: to_square"
        )
    return ",".join(f"{_clipped(v, 1.0):.2f}" for v in values)


@dataclass(frozen=True)
class Point:
    """A point in the padded square ([0, 1]) or in the picture (pixels)."""

    x: float
    y: float
    frame: Frame = "square"

    def __post_init__(self) -> None:
        _check("Point", (self.x, self.y), self.frame)

    def to_picture(self, width: int, height: int, clip: bool = False) -> Point:
        """Pixels of the picture of that size; `clip` moves the point onto it."""
        x, y = self.x, self.y
        side, left, top = _offsets(width, height)
        if self.frame == "square":
            x, y = x * side - left, y * side - top
        return Point(_clipped(x, width), _clipped(y, height), "picture") if clip else Point(x, y, "picture")

    def to_square(self, width: int, height: int) -> Point:
        """[0, 1] of the picture of that size, padded."""
        side, left, top = _offsets(width, height)
        return self if self.frame == "square" else Point((self.x + left) / side, (self.y + top) / side)

    def text(self) -> str:
        """`[x,y]`. ValueError for a point that is not of the square."""
        return f"[{_written('Point', (self.x, self.y), self.frame)}]"


@dataclass(frozen=True)
class Box:
    """A box, corners in order (x1 <= x2, y1 <= y2), in the padded square ([0, 1]) or in the picture (pixels)."""

    x1: float
    y1: float
    x2: float
    y2: float
    frame: Frame = "square"

    def __post_init__(self) -> None:
        _check("Box", self.xyxy, self.frame)
        if self.x1 > self.x2 or self.y1 > self.y2:
            raise ValueError(f"Box: expected x1 <= x2 and y1 <= y2, got {list(self.xyxy)}")

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    def to_picture(self, width: int, height: int, clip: bool = False) -> Box:
        """Pixels of the picture of that size; `clip` cuts away what lies outside, if all of it, an empty box stays."""
        a = Point(self.x1, self.y1, self.frame).to_picture(width, height, clip)
        b = Point(self.x2, self.y2, self.frame).to_picture(width, height, clip)
        return Box(a.x, a.y, b.x, b.y, "picture")

    def to_square(self, width: int, height: int) -> Box:
        """[0, 1] of the picture of that size, padded."""
        a = Point(self.x1, self.y1, self.frame).to_square(width, height)
        b = Point(self.x2, self.y2, self.frame).to_square(width, height)
        return Box(a.x, a.y, b.x, b.y)

    def text(self) -> str:
        """`[x1,y1,x2,y2]`. ValueError for a box that is not of the square."""
        return f"[{_written('Box', self.xyxy, self.frame)}]"


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 where the union is empty. Both boxes in the same frame."""
    if a.frame != b.frame:
        raise ValueError(f"iou: boxes of different frames, {a.frame} and {b.frame}")
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    intersection = max(width, 0.0) * max(height, 0.0)
    union = a.area + b.area - intersection
    return min(intersection / union, 1.0) if union > 0 else 0.0


@dataclass(frozen=True)
class Region:
    """A name ("" where none is written) and the boxes and points that stand behind it, all in the padded square."""

    name: str
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()


def _numbers(part: str) -> list[float] | None:
    """`0.1, 0.2` -> [0.1, 0.2]; None where something is not a plain decimal number."""
    found = [_NUMBER.fullmatch(piece) for piece in part.split(",")]
    return [float(match[1]) for match in found if match] if all(found) else None


def _read_bracket(inside: str) -> tuple[list[Box], list[Point]]:
    """Boxes and points of the text between two brackets, by the rules above."""
    boxes: list[Box] = []
    points: list[Point] = []
    if not _COORDINATES.fullmatch(inside):
        return boxes, points
    parts = [_numbers(part) for part in inside.split(";")]
    for part in parts if None not in parts else []:
        values = part or []
        if len(values) != 2 and len(values) % 4:
            continue
        step = 2 if len(values) == 2 else 4
        for i in range(0, len(values), step):
            v = values[i : i + step]
            if not all(-_SLACK <= number <= 1 + _SLACK for number in v):
                continue
            if step == 2:
                points.append(Point(v[0], v[1]))
            else:
                boxes.append(Box(min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3])))
    return boxes, points


def parse_regions(text: str) -> list[Region]:
    """Everything with coordinates in the text, in order, with the names that stand before the brackets.

    `<p>name</p>[..]` gives the name exactly. Without tags a name is the words since the last bracket or punctuation,
    less what introduces them ("and", "there are", "is eating"), beginning at the last article or number word: right for
    lists as the model writes them, a guess in free prose. Brackets with only spaces, commas or semicolons between
    share a name.
    """
    found: list[tuple[str, list[Box], list[Point]]] = []
    start = 0
    for match in _BRACKET.finditer(text):
        boxes, points = _read_bracket(match[1])
        before, start = text[start : match.start()], match.end()
        if not boxes and not points:
            continue
        if not found or before.strip(" \t\r\n,;"):
            found.append((_name(before), [], []))
        found[-1][1].extend(boxes)
        found[-1][2].extend(points)
    return [Region(name, tuple(boxes), tuple(points)) for name, boxes, points in found]


_TAGGED = re.compile(r"<p>([^<>]*)</p>\s*$")
_PUNCTUATION = re.compile(r"[;!?\n()<>\"]|[,.:](?![0-9])")
_LINKING = {"is", "are", "was", "were", "has", "have", "including", "include", "includes", "contains", "see", "because"}
_LEADING = {"and", "or", "then", "with", "in", "on", "at", "of", "to", "by", "from", "near"}
_NUMERALS = {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "several", "some", "many"}
_ARTICLES = {"a", "an", "the"}
_LONGEST_NAME = 100  # characters


def _name(before: str) -> str:
    """The name at the end of the text before a bracket (see `parse_regions`)."""
    before = before[-4 * _LONGEST_NAME :].rstrip()
    tagged = _TAGGED.search(before)
    if tagged:
        return tagged[1].strip()[:_LONGEST_NAME]
    words = _PUNCTUATION.split(before)[-1].strip(" ,.:").split()
    links = [i + 1 for i, word in enumerate(words) if word.lower() in _LINKING and i + 1 < len(words)]
    words = words[links[-1] :] if links else words
    while len(words) > 1 and words[0].lower() in _LEADING:
        words = words[1:]
    articles = [i for i, word in enumerate(words) if word.lower() in _ARTICLES | _NUMERALS and i + 1 < len(words)]
    words = words[articles[-1] :] if articles else words
    name = " ".join(words)
    return "" if name.lower() in _LEADING | _ARTICLES else name[-_LONGEST_NAME:].strip()


def parse_boxes(text: str) -> list[Box]:
    """Every box in the text, in order, in the padded square."""
    return [box for match in _BRACKET.finditer(text) for box in _read_bracket(match[1])[0]]


def parse_points(text: str) -> list[Point]:
    """Every point in the text, in order, in the padded square."""
    return [point for match in _BRACKET.finditer(text) for point in _read_bracket(match[1])[1]]


def parse_key_points(text: str) -> dict[str, Point]:
    """`nose[0.42,0.15], left eye[0.43,0.13]` -> {"nose": ..., "left eye": ...}; of a name said twice the first."""
    named: dict[str, Point] = {}
    for region in parse_regions(text):
        if region.name and region.points:
            named.setdefault(region.name, region.points[0])
    return named


def first_box(text: str) -> Box | None:
    """The answer to a referring expression, scored as the released evaluation does: the first `[...]` of the text.

    None if there is no bracket or the first one holds no box, whatever follows.
    """
    match = _BRACKET.search(text)
    boxes = _read_bracket(match[1])[0] if match else []
    return boxes[0] if boxes else None


def format_boxes(boxes: Iterable[Box], style: Style = "separate") -> str:
    """separate `[..];[..]`, joined `[..;..]`, flat `[x1,y1,x2,y2,x1,...]`; no box: an empty text."""
    separators = {"separate": "];[", "joined": ";", "flat": ","}
    if style not in separators:
        raise ValueError(f"style: expected one of {', '.join(separators)}, got {style!r}")
    inside = separators[style].join(box.text()[1:-1] for box in boxes)
    return f"[{inside}]" if inside else ""


def format_region(region: Region, tags: bool = False) -> str:
    """`name[..];[..]`, boxes before points; with tags `<p>name</p>[..];[..]`."""
    name = f"<p>{region.name}</p>" if tags else region.name
    return name + ";".join([box.text() for box in region.boxes] + [point.text() for point in region.points])
