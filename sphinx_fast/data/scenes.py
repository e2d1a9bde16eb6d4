"""Drawn pictures with exact annotations: endless, seeded, nothing to download.

`scene(seed, split="train")` is a pure function of its arguments; the splits are disjoint streams because the split is
part of the entropy. The domain "clean" is flat ink on quiet ground, "textured" the same things grained, unevenly lit
and noisy on rough ground. HELD_OUT combinations of shape and colour are drawn in the split "unseen" alone.

A scene holds shapes, printed words, stick people, or a defect on a surface. All boxes are pixels of the picture, (x1,
y1, x2, y2) with x2 and y2 exclusive, and are the tight box of what was drawn; boxes of different things never touch.
`square_box` gives the same box in the padded square, [0, 1], the frame in which SPHINX speaks.

Questions about a scene: `scene_questions.questions`. Labels per patch: `scene_targets.dense_targets`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np
from PIL import Image

from sphinx_fast.data import scene_drawing as drawing
from sphinx_fast.data.scene_drawing import COLOURS, DEFECTS, HELD_OUT, SHAPES

PixelBox = tuple[int, int, int, int]
SquareBox = tuple[float, float, float, float]
SPLITS = {"train": 0, "validation": 1, "test": 2, "unseen": 3}
DOMAINS = {"clean": (), "textured": (1,)}  # what each adds to the entropy
KINDS = {"shapes": 0.70, "text": 0.10, "people": 0.10, "defect": 0.10}  # how often each kind of scene is drawn
SIZES = {"small": (0.16, 0.21), "large": (0.29, 0.40)}  # side of a shape over the longer side of the picture
# fmt: off
WORDS = (
    "stop", "exit", "open", "sale", "taxi", "cafe", "bank", "park", "hotel", "bus",
    "shop", "food", "milk", "bread", "tea", "north", "south", "east", "west", "push",
    "pull", "slow", "fire", "help", "free", "hot", "cold", "pizza", "music", "radio",
)
# fmt: on
NUMBERS = tuple(str(n) for n in range(100))
TEXTS = (*WORDS, *NUMBERS)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class SceneObject:
    """A shape. `size` is "small" or "large" (never in between)."""

    shape: str
    colour: str
    size: str
    box: PixelBox

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class SceneText:
    """A printed word or number; `text` is lower case, the picture may show capitals.

    `edges` are the pixel columns where its letters begin, and where the last one ends.
    """

    text: str
    box: PixelBox
    edges: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"the {'number' if self.text.isdigit() else 'word'} {self.text}"


@dataclass(frozen=True)
class ScenePerson:
    """A stick person facing the viewer; `joints` maps each of JOINTS to its (x, y) pixel."""

    joints: dict[str, tuple[float, float]]
    box: PixelBox
    name: str = "person"


@dataclass(frozen=True)
class SceneDefect:
    """A scratch, spot, crack or hole on a textured surface."""

    kind: str
    box: PixelBox

    @property
    def name(self) -> str:
        return self.kind


Thing = SceneObject | SceneText | ScenePerson | SceneDefect


@dataclass(frozen=True)
class Scene:
    """A picture and all that is in it. `ids` is 0 on the background, 1 + the index into `things` on the ink of one."""

    seed: int
    split: str
    domain: str
    kind: str
    background: str
    picture: np.ndarray  # uint8 [h, w, 3]
    ids: np.ndarray  # uint8 [h, w]
    objects: tuple[SceneObject, ...]
    texts: tuple[SceneText, ...]
    people: tuple[ScenePerson, ...]
    defect: SceneDefect | None

    @cached_property
    def things(self) -> tuple[Thing, ...]:
        """Objects, texts, people and the defect, in this order."""
        return (*self.objects, *self.texts, *self.people, *((self.defect,) if self.defect else ()))

    @cached_property
    def side(self) -> int:
        """Pixels of a side of the padded square."""
        return max(self.picture.shape[:2])

    @cached_property
    def offset(self) -> tuple[int, int]:
        """Where the picture's (0, 0) lies in the padded square, (x, y) pixels."""
        h, w = self.picture.shape[:2]
        return (self.side - w) // 2, (self.side - h) // 2

    def square_point(self, x: float, y: float) -> tuple[float, float]:
        """A point of the picture in the padded square, [0, 1]."""
        dx, dy = self.offset
        return (x + dx) / self.side, (y + dy) / self.side

    def square_box(self, box: PixelBox) -> SquareBox:
        """A box of the picture in the padded square, [0, 1]."""
        return (*self.square_point(box[0], box[1]), *self.square_point(box[2], box[3]))


class _Canvas:
    """Places things without touching one another (in pixels at scale 1) and draws them with their ids."""

    def __init__(
        self, kind: str, width: int, height: int, scale: int, rng: Random, *, pale: bool, unseen: bool
    ) -> None:
        self.width, self.height, self.scale, self.rng, self.unseen = width, height, scale, rng, unseen
        self.picture = drawing.background(kind, width * scale, height * scale, scale, rng, pale=pale)
        self.ids = Image.new("L", self.picture.size)
        self.cells: list[tuple[float, float, float, float]] = []
        self.drawn = 0

    def place(self, width: float, height: float, tries: int = 24) -> tuple[float, float] | None:
        """A free left, top for a cell of this size, or None when `tries` random places were all taken."""
        air = 3.0
        free_x, free_y = self.width - width - 2 * air, self.height - height - 2 * air
        if free_x < 0 or free_y < 0:
            return None
        for _ in range(tries):
            x, y = air + self.rng.random() * free_x, air + self.rng.random() * free_y
            if all(
                x >= x2 + air or x + width + air <= x1 or y >= y2 + air or y + height + air <= y1
                for x1, y1, x2, y2 in self.cells
            ):
                self.cells.append((x, y, x + width, y + height))
                return x, y
        return None

    def paste(
        self, mask: Image.Image, x: float, y: float, ink: tuple[int, int, int], hard: Image.Image | None = None
    ) -> PixelBox:
        """Draw a mask at x, y (pixels of the enlarged picture); returns its box. Ids follow the order of drawing.

        `hard` is the mask with 0 and 255 only, where `mask` has grey edges.
        """
        left, top = int(x), int(y)
        box = (left, top, left + mask.width, top + mask.height)
        self.drawn += 1
        self.picture.paste(ink, box, mask)
        self.ids.paste(self.drawn, box, hard or mask)
        return box


def _colour(name: str, rng: Random) -> tuple[int, int, int]:
    """The colour with a little jitter."""
    r, g, b = (min(255, max(0, v + rng.randint(-10, 10))) for v in COLOURS[name])
    return r, g, b


def _attributes(n: int, rng: Random, unseen: bool) -> list[tuple[str, str]]:
    """(shape, colour) of n shapes; half of the scenes repeat a shape or a colour, to give something to count.

    unseen  one of them is a held-out combination; otherwise none is: its colour becomes the next one
    """
    shapes, colours = list(SHAPES), list(COLOURS)
    pairs = [(rng.choice(shapes), rng.choice(colours)) for _ in range(n)]
    mode = rng.random()
    if mode >= 0.5:
        shape, colour = rng.choice(shapes), rng.choice(colours)
        repeats = rng.randint(1, n)
        for k in range(repeats):
            pairs[k] = (shape, pairs[k][1]) if mode < 0.75 else (pairs[k][0], colour)
        rng.shuffle(pairs)
    if unseen:
        return [rng.choice(sorted(HELD_OUT)), *pairs[1:]]
    return [(s, colours[(colours.index(c) + 1) % 8] if (s, c) in HELD_OUT else c) for s, c in pairs]


def _draw_shapes(canvas: _Canvas, n: int, rng: Random, shrink: float) -> list[SceneObject]:
    """Up to n shapes; one that finds no room as large is tried as small, then left out."""
    longer, scale = max(canvas.width, canvas.height), canvas.scale
    objects = []
    for shape, colour in _attributes(n, rng, canvas.unseen) if n else ():
        first = "large" if rng.random() < (0.6 if n <= 3 else 0.35) else "small"
        turn, ink = rng.uniform(-0.16, 0.16), _colour(colour, rng)
        for size in dict.fromkeys((first, "small")):
            side = rng.uniform(*SIZES[size]) * longer * shrink
            cell = float(int(side) + 1)
            place = canvas.place(cell, cell)
            if place:
                mask, dx, dy = drawing.shape_mask(shape, side * scale, turn)
                box = canvas.paste(mask, place[0] * scale + dx, place[1] * scale + dy, ink)
                objects.append(SceneObject(shape, colour, size, box))
                break
    return objects


def _draw_texts(canvas: _Canvas, n: int, rng: Random) -> list[SceneText]:
    """Up to n different words or numbers, in small letters or capitals."""
    longer, scale = max(canvas.width, canvas.height), canvas.scale
    texts = []
    for text in rng.sample(WORDS if rng.random() < 0.6 else NUMBERS, n):
        height, capitals, ink = rng.uniform(0.11, 0.19) * longer, rng.random() < 0.5, rng.choice(drawing.INKS)
        shown = text.upper() if capitals else text
        for tall in (height, 0.11 * longer):
            cell, _ = drawing.text_mask(shown, round(tall))  # at scale 1: the layout does not depend on the scale
            place = canvas.place(cell.width, cell.height)
            if place:
                mask, hard = drawing.text_mask(shown, round(tall * scale))
                box = canvas.paste(mask, place[0] * scale, place[1] * scale, ink, hard)
                edges = tuple(box[0] + share * (box[2] - box[0]) for share in drawing.letter_edges(shown))
                texts.append(SceneText(text, box, edges))
                break
    return texts


def _draw_people(canvas: _Canvas, n: int, rng: Random) -> list[ScenePerson]:
    """Up to n stick people."""
    longer, scale = max(canvas.width, canvas.height), canvas.scale
    people = []
    for _ in range(n):
        pose, ink = drawing.pose(rng), rng.choice(drawing.INKS)
        x0, y0, x1, y1 = drawing.pose_extent(pose)
        for height in (rng.uniform(0.45, 0.65) * longer, 0.4 * longer):
            place = canvas.place((x1 - x0) * height + 1, (y1 - y0) * height + 1)
            if place:
                big = height * scale
                mask, dx, dy = drawing.person_mask(pose, big)
                left, top = int(place[0] * scale), int(place[1] * scale)
                box = canvas.paste(mask, left + dx, top + dy, ink)
                at = {j: (left + (pose[j][0] - x0) * big, top + (pose[j][1] - y0) * big) for j in drawing.JOINTS}
                people.append(ScenePerson(at, box))
                break
    return people


def _draw_defect(canvas: _Canvas, rng: Random) -> SceneDefect | None:
    """One defect in half of the surfaces."""
    if rng.random() < 0.5:
        return None
    longer, scale, kind = max(canvas.width, canvas.height), canvas.scale, rng.choice(DEFECTS)
    low, high = (0.25, 0.5) if kind in ("scratch", "crack") else (0.16, 0.3)
    width = rng.uniform(low, high) * longer
    height = width * rng.uniform(0.6, 1.0) if kind != "hole" else width
    place = canvas.place(width + 1, height + 1)
    if place is None:
        return None
    mask, dx, dy = drawing.defect_mask(kind, width * scale, height * scale, rng)
    inks = {"scratch": (238, 238, 232), "spot": (120, 66, 30), "crack": (22, 20, 20), "hole": (4, 4, 4)}
    return SceneDefect(kind, canvas.paste(mask, place[0] * scale + dx, place[1] * scale + dy, inks[kind]))


def _picture_size(rng: Random) -> tuple[int, int]:
    """Width and height: the longer side 144..224 px, a third of the pictures square, the others down to 2:3."""
    longer = rng.randint(144, 224)
    shorter = longer if rng.random() < 1 / 3 else round(longer * rng.uniform(0.67, 1.0))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def scene(
    seed: int,
    *,
    split: str = "train",
    kind: str | None = None,
    scale: int = 1,
    domain: str = "clean",
    shrink: float = 1.0,
) -> Scene:
    """Draw the scene of a seed.

    split   "train", "validation" or "test": streams that share no seed; "unseen": another, whose scenes with shapes
            have a HELD_OUT one
    kind    "shapes", "text", "people" or "defect"; None draws one by the frequencies of KINDS
    scale   1 gives about 144..224 pixels a side; 2 and more draw the same layout larger
    domain  "clean" or "textured"
    shrink  sides of shapes are this much of what SIZES says, at least a quarter of it
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if seed < 0 or not 1 <= scale <= 16:
        raise ValueError(f"seed must be >= 0 and scale within 1..16, got seed={seed}, scale={scale}")
    if not 0.25 <= shrink <= 1.0:
        raise ValueError(f"shrink must be within 0.25..1, got {shrink}")
    state = np.random.SeedSequence((SPLITS[split], seed, *DOMAINS[domain])).generate_state(4)
    rng = Random(int.from_bytes(state.tobytes(), "little"))
    drawn_kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    kind = kind or drawn_kind
    rough = domain == "textured"
    ground = rng.choice(drawing.TEXTURES if kind == "defect" or rough else drawing.BACKGROUNDS)
    canvas = _Canvas(ground, *_picture_size(rng), scale, rng, pale=kind != "defect", unseen=split == "unseen")
    people = texts = shapes = 0
    if kind == "shapes":
        shapes, texts = rng.randint(1, 6), int(rng.random() < 0.12)
    elif kind == "text":
        shapes, texts = rng.randint(0, 2), rng.randint(1, 3)
    elif kind == "people":
        shapes, people = rng.randint(0, 2), rng.choice((1, 1, 2))
    # the hardest to place first; ids are put into the order of `things` afterwards
    drawn_people = _draw_people(canvas, people, rng)
    drawn_texts = _draw_texts(canvas, texts, rng)
    drawn_shapes = _draw_shapes(canvas, shapes, rng, shrink)
    defect = _draw_defect(canvas, rng) if kind == "defect" else None
    counts = (len(drawn_people), len(drawn_texts), len(drawn_shapes), int(defect is not None))
    picture, ids = np.array(canvas.picture), np.asarray(canvas.ids)  # torch wants a picture it could write to
    return Scene(
        seed=seed,
        split=split,
        domain=domain,
        kind=kind,
        background=ground,
        picture=drawing.weathered(picture, ids, scale, rng) if rough else picture,
        ids=_ordered_ids(ids, *counts),
        objects=tuple(drawn_shapes),
        texts=tuple(drawn_texts),
        people=tuple(drawn_people),
        defect=defect,
    )


def _ordered_ids(ids: np.ndarray, people: int, texts: int, shapes: int, defects: int) -> np.ndarray:
    """Ids from the order of drawing (people, texts, shapes, defect) to the order of `Scene.things`."""
    if not people and not texts:
        return ids
    order: list[int] = [0]
    order += range(shapes + texts + 1, shapes + texts + people + 1)
    order += range(shapes + 1, shapes + texts + 1)
    order += range(1, shapes + 1)
    order += range(shapes + texts + people + 1, shapes + texts + people + defects + 1)
    return np.array(order, np.uint8)[ids]


def stream(
    split: str = "train", start: int = 0, accept: Callable[[Scene], bool] | None = None, *, domain: str = "clean"
) -> Iterator[Scene]:
    """Scenes of seeds start, start + 1, ... without end; `accept` keeps some of them."""
    seed = start
    while True:
        drawn = scene(seed, split=split, domain=domain)
        if accept is None or accept(drawn):
            yield drawn
        seed += 1
