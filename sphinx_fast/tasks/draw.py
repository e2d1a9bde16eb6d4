"""Boxes, points, skeletons and their names, drawn onto a copy of the picture.

Lines and letters grow with the picture, so that it reads the same when scaled to a screen: a line is 1/240 and a letter
1/40 of the geometric mean of its sides, never thinner than a pixel or smaller than LEAST_FONT. A label has the colour
of its box and black or white letters, whichever contrasts more. It stands above its box or near it, inside the picture
and over no other label; it is shortened where it is too wide, and left out where there is no room for it.
One name has one colour; boxes without names have one each.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sphinx_fast.image.decode import load_picture
from sphinx_fast.tasks.boxes import Box, Point, Region, parse_regions

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom excluded

LEAST_FONT = 11  # pixels
SMALLEST_FONT = 7  # where a picture is lower than a label of LEAST_FONT
BLACK, WHITE = (0, 0, 0), (255, 255, 255)

# COCO's key points, as edges between joints; an edge is drawn where both its joints are known.
_ONE_SIDE = (
    ("shoulder", "elbow"),
    ("elbow", "wrist"),
    ("shoulder", "hip"),
    ("hip", "knee"),
    ("knee", "ankle"),
    ("eye", "ear"),
    ("ear", "shoulder"),
)
SKELETON = (
    *((f"{side} {a}", f"{side} {b}") for side in ("left", "right") for a, b in _ONE_SIDE),
    ("left shoulder", "right shoulder"),
    ("left hip", "right hip"),
    ("left eye", "right eye"),
    ("nose", "left eye"),
    ("nose", "right eye"),
)
JOINTS = frozenset(joint for edge in SKELETON for joint in edge)


def colour(index: int) -> Colour:
    """The index-th of endlessly many colours: hues a golden angle apart, light and dark in turn."""
    hue = (0.02 + index * 0.618034) % 1.0
    saturation, value = ((0.85, 1.0), (1.0, 0.72), (0.5, 1.0))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def contrasting(background: Colour) -> Colour:
    """Black or white, whichever has the higher contrast ratio to the background (WCAG 2, relative luminance)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if (luminance + 0.05) ** 2 > 1.05 * 0.05 else WHITE


@lru_cache(maxsize=64)
def _font(size: int) -> Any:
    """PIL's own font: nothing to install. Latin letters; others come out as empty boxes."""
    return ImageFont.load_default(size)


@dataclass
class _Canvas:
    """The picture being drawn on, its scale, and the labels that stand already."""

    image: Image.Image
    labels: list[Rectangle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image)
        self.width, self.height = self.image.size
        scale = math.sqrt(self.width * self.height)
        self.line = max(1, round(scale / 240))
        self.font_size = max(LEAST_FONT, round(scale / 40))

    def pixels(self, box: Box) -> Rectangle:
        """The pixels a box covers, at least one."""
        b = box.to_picture(self.width, self.height, clip=True)
        left, top = min(int(b.x1), self.width - 1), min(int(b.y1), self.height - 1)
        return left, top, max(math.ceil(b.x2), left + 1), max(math.ceil(b.y2), top + 1)

    def box(self, box: Box, ink: Colour) -> Rectangle:
        """The outline lies inside the box; a contrasting hair line beside it shows it on any ground."""
        left, top, right, bottom = place = self.pixels(box)
        room = min(right - left, bottom - top)
        line = max(1, min(self.line, room // 4))
        if self.line > 1 and room > 4 * line:
            inner = line + max(1, line // 3)
            self.draw.rectangle((left, top, right - 1, bottom - 1), outline=contrasting(ink), width=inner)
        self.draw.rectangle((left, top, right - 1, bottom - 1), outline=ink, width=line)
        return place

    def point(self, point: Point, ink: Colour) -> Rectangle:
        """A disc with a contrasting rim."""
        p = point.to_picture(self.width, self.height, clip=True)
        x, y = min(int(p.x), self.width - 1), min(int(p.y), self.height - 1)
        radius = self.line * 2 if min(self.width, self.height) > 8 * self.line else 0
        place = (x - radius, y - radius, x + radius + 1, y + radius + 1)
        rim = max(1, self.line // 2) if radius > 2 else 0
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), ink, contrasting(ink), rim)
        return place

    def edge(self, a: Point, b: Point, ink: Colour) -> None:
        """A line between two joints."""
        ends = [p.to_picture(self.width, self.height, clip=True) for p in (a, b)]
        self.draw.line([(p.x, p.y) for p in ends], ink, self.line)

    def label(self, name: str, place: Rectangle, ink: Colour) -> None:
        """The name beside the thing at `place`."""
        text = " ".join("".join(c if c.isprintable() else " " for c in name).split())
        fitted = self.fitted(text) if text else None
        if not fitted:
            return
        text, font, width, height, pad = fitted
        free = self.free_place(place, width, height)
        if not free:
            return
        left, top = free
        self.labels.append((left, top, left + width, top + height))
        self.draw.rectangle((left, top, left + width - 1, top + height - 1), fill=ink)
        above, below = font.getbbox("Ág")[1::2]
        baseline = top + (height - (below - above)) // 2 - above
        self.draw.text((left + pad, baseline), text, fill=contrasting(ink), font=font)

    def fitted(self, text: str) -> tuple[str, Any, int, int, int] | None:
        """Text, font, width, height and margin of a label that fits into the picture; None if none does.

        First letters get smaller (only where the picture is low or narrow), then the text shorter.
        """
        for size in sorted(
            {self.font_size, LEAST_FONT, (LEAST_FONT + SMALLEST_FONT) // 2, SMALLEST_FONT}, reverse=True
        ):
            font, pad = _font(size), max(1, size // 6)
            above, below = font.getbbox("Ág")[1::2]
            height = int(below - above) + 2 * pad
            room = self.width - 2 * pad
            if height > self.height or font.getlength("m…") > room:
                continue
            shorter = text[:200]
            while font.getlength(shorter) > room:
                shorter = shorter.rstrip("…")[:-1].rstrip() + "…"
            return shorter, font, min(math.ceil(font.getlength(shorter)) + 2 * pad, self.width), height, pad
        return None

    def free_place(self, place: Rectangle, width: int, height: int) -> tuple[int, int] | None:
        """Left and top of a label: above, below, inside, beside its thing, further down; None if all are taken."""
        left, top, right, bottom = place
        tried = [
            (left, top - height),
            (left, bottom),
            (left, top),
            (right - width, top - height),
            (right, top),
            (left - width, top),
            *((left, top + row * height) for row in (1, 2, 3, -2)),
        ]
        for x, y in tried:
            x, y = self.within(x, self.width - width), self.within(y, self.height - height)
            if not any(_overlap((x, y, x + width, y + height), other) for other in self.labels):
                return x, y
        return None

    @staticmethod
    def within(at: int, most: int) -> int:
        return max(0, min(at, most))


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    """Whether two rectangles share a pixel."""
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def _canvas(picture: Any) -> _Canvas:
    """A copy of the picture to draw on. Files are held to the usual limit; what is in memory already may be larger."""
    if isinstance(picture, Image.Image):
        limit = max(1, picture.width * picture.height)
    elif isinstance(picture, np.ndarray | torch.Tensor):
        limit = max(1, math.prod(picture.shape[:2]))
    else:
        return _Canvas(Image.fromarray(load_picture(picture)))
    return _Canvas(Image.fromarray(load_picture(picture, max_pixels=limit)))


def _is_joint(region: Region) -> bool:
    return region.name.lower() in JOINTS and not region.boxes


def _people(regions: Iterable[Region]) -> list[dict[str, Point]]:
    """Key points by person: a new one begins where a joint comes a second time."""
    people: list[dict[str, Point]] = []
    for region in regions:
        for point in region.points:
            if not people or region.name.lower() in people[-1]:
                people.append({})
            people[-1][region.name.lower()] = point
    return people


def draw_regions(picture: Any, regions: Sequence[Region]) -> Image.Image:
    """Everything in `regions` (as `parse_regions` reads an answer), drawn on a copy of the picture.

    Args:
        picture: whatever `load_picture` takes; it is turned upright as there.
        regions: boxes and points of either frame; what lies outside the picture is clipped to it. Points named as
            COCO's joints ("left knee") become skeletons, without labels.

    Returns:
        An RGB picture of the same size (upright).
    """
    canvas = _canvas(picture)
    inks: dict[str, Colour] = {}
    places: list[tuple[str, Rectangle, Colour]] = []

    def ink_of(name: str) -> Colour:
        return inks.setdefault(name or f"\0{len(inks)}", colour(len(inks)))

    joints = [region for region in regions if _is_joint(region)]
    others = [region for region in regions if not _is_joint(region)]
    for region in sorted(others, key=lambda r: -max((box.area for box in r.boxes), default=0)):
        for box in region.boxes:
            ink = ink_of(region.name)
            places.append((region.name, canvas.box(box, ink), ink))
        for point in region.points:
            ink = ink_of(region.name)
            places.append((region.name, canvas.point(point, ink), ink))
    for number, person in enumerate(_people(joints)):
        ink = ink_of(f"\0person {number}")
        for a, b in SKELETON:
            if a in person and b in person:
                canvas.edge(person[a], person[b], ink)
        for joint in person.values():
            canvas.point(joint, ink)
    for name, place, ink in places:  # last, so that no outline crosses a label
        canvas.label(name, place, ink)
    return canvas.image


def draw_boxes(picture: Any, boxes: Sequence[Box], labels: Sequence[str] | None = None) -> Image.Image:
    """Boxes, each with its label if there are any, on a copy of the picture. See `draw_regions`."""
    names = [""] * len(boxes) if labels is None else list(labels)
    if len(names) != len(boxes):
        raise ValueError(f"labels: expected one for each of {len(boxes)} boxes, got {len(names)}")
    return draw_regions(picture, [Region(name, (box,)) for name, box in zip(names, boxes, strict=True)])


def draw_answer(picture: Any, answer: str) -> Image.Image:
    """Every box and point of the model's answer, on a copy of the picture it was asked about. See `draw_regions`."""
    return draw_regions(picture, parse_regions(answer))
