"""Masks and backgrounds that scenes are drawn from: shapes, printed words, stick people, defects, textures.

Every mask is an "L" picture cropped to its ink, so the tight box of a thing is the place and size of its mask. Shapes,
people and defects are hard-edged (0 or 255); printed words keep the grey edge of the font above a floor, and the floor
is what counts as ink.
All sizes are pixels of the picture that is drawn.
"""

import math
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = {
    "red": (222, 24, 28),
    "green": (22, 150, 48),
    "blue": (28, 64, 226),
    "yellow": (246, 218, 12),
    "orange": (250, 132, 8),
    "purple": (124, 28, 168),
    "pink": (250, 132, 196),
    "black": (14, 14, 14),
}
# (shape, colour) that training never draws, one of each shape and one of each colour: the split "unseen" asks for them.
HELD_OUT = frozenset((shape, list(COLOURS)[(3 * k + 2) % 8]) for k, shape in enumerate(SHAPES))
HELD_OUT_NAMES = frozenset(f"{colour} {shape}" for shape, colour in HELD_OUT)
INKS = ((58, 46, 40), (36, 46, 84))  # of words and people: dark, but none of the colours above
BACKGROUNDS = ("plain", "gradient", "noise", "stripes")
TEXTURES = ("metal", "wood", "fabric", "stone")
DEFECTS = ("scratch", "spot", "crack", "hole")
JOINTS = (
    "nose",
    "left elbow",
    "right elbow",
    "left wrist",
    "right wrist",
    "left knee",
    "right knee",
    "left ankle",
    "right ankle",
)
Point = tuple[float, float]
INK_FLOOR = 64  # font pixels below this are dropped, so that the box of a word is exact


def _regular(n: int, inner: float = 1.0) -> list[Point]:
    """Corners on the unit circle starting at the top; `inner` < 1 alternates with a smaller radius (a star)."""
    steps = 2 * n if inner < 1.0 else n
    radii = [1.0 if inner == 1.0 or k % 2 == 0 else inner for k in range(steps)]
    return [
        (r * math.sin(2 * math.pi * k / steps), -r * math.cos(2 * math.pi * k / steps)) for k, r in enumerate(radii)
    ]


def _heart() -> list[Point]:
    """The classical parametric heart, 28 corners."""
    ts = [2 * math.pi * k / 28 for k in range(28)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in ts
    ]


def _centred(points: list[Point], width: float = 1.0, height: float = 1.0) -> tuple[Point, ...]:
    """Points moved and stretched so that their box is [-width/2, width/2] x [-height/2, height/2]."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, y0, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return tuple((((x - x0) / w - 0.5) * width, ((y - y0) / h - 0.5) * height) for x, y in points)


_A = 1 / 6  # half the thickness of the cross
POLYGONS = {
    "square": _centred([(0, 0), (1, 0), (1, 1), (0, 1)], 0.92, 0.92),
    "triangle": _centred(_regular(3), 1.0, 0.9),
    "star": _centred(_regular(5, 0.42)),
    "cross": _centred(
        [
            *((-_A, -0.5), (_A, -0.5), (_A, -_A), (0.5, -_A), (0.5, _A), (_A, _A)),
            *((_A, 0.5), (-_A, 0.5), (-_A, _A), (-0.5, _A), (-0.5, -_A), (-_A, -_A)),
        ]
    ),
    "diamond": _centred(_regular(4), 0.9, 1.0),
    "heart": _centred(_heart(), 1.0, 0.92),
}


def _crop(mask: Image.Image) -> tuple[Image.Image, int, int]:
    """The mask cut to its ink, and where the cut began."""
    box = mask.getbbox()
    if box is None:
        raise ValueError("nothing was drawn: the thing is smaller than a pixel")
    return mask.crop(box), box[0], box[1]


def shape_mask(shape: str, side: float, turn: float) -> tuple[Image.Image, int, int]:
    """Mask of a shape in a square cell, turned by `turn` radians. Returns mask, left, top in the cell."""
    cell = math.ceil(side)
    mask = Image.new("L", (cell, cell))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, cell - 1, cell - 1), fill=255)
        if shape == "ring":
            hole = round(0.24 * cell)
            draw.ellipse((hole, hole, cell - 1 - hole, cell - 1 - hole), fill=0)
    else:
        points = POLYGONS[shape]
        cos, sin = math.cos(turn), math.sin(turn)
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
        reach = max(0.5, max(max(abs(x), abs(y)) for x, y in turned))
        k, middle = (cell - 1) / (2 * reach), (cell - 1) / 2
        draw.polygon([(middle + x * k, middle + y * k) for x, y in turned], fill=255)
    return _crop(mask)


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; scenes with printed words need it")
    return font


_INK_ONLY = [0 if v < INK_FLOOR else v for v in range(256)]
_ANY_INK = [0] + [255] * 255


@lru_cache(maxsize=2048)
def text_mask(text: str, height: int) -> tuple[Image.Image, Image.Image]:
    """Mask of a printed word whose ink is about `height` pixels tall, cropped to the ink: as drawn, and 0 or 255."""
    probe = _font(64).getbbox(text)
    font = _font(max(6, round(64 * height / (probe[3] - probe[1]))))
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=font)
    grey = _crop(mask.point(_INK_ONLY))[0]
    return grey, grey.point(_ANY_INK)


@lru_cache(maxsize=512)
def letter_edges(text: str) -> tuple[float, ...]:
    """Where the letters of a printed word begin, and where the last one ends, over the word's width."""
    font = _font(64)
    return tuple(font.getlength(text[:k]) / font.getlength(text) for k in range(len(text) + 1))


def pose(rng: Random) -> dict[str, Point]:
    """Joints of a stick person who faces the viewer (the person's left is on the right of the picture), height about 1.

    Besides the nine named JOINTS there are "neck" and "hip", which join the limbs.
    """
    neck, hip = (0.0, 0.28), (rng.uniform(-0.03, 0.03), 0.58)
    joints: dict[str, Point] = {"nose": (rng.uniform(-0.02, 0.02), 0.12), "neck": neck, "hip": hip}
    for name, side in (("left", 1.0), ("right", -1.0)):
        upper = rng.uniform(0.35, 2.2)  # from hanging down to raised
        lower = upper + rng.uniform(-0.5, 0.9)
        elbow = (neck[0] + side * 0.19 * math.sin(upper), neck[1] + 0.05 + 0.19 * math.cos(upper))
        joints[f"{name} elbow"] = elbow
        joints[f"{name} wrist"] = (elbow[0] + side * 0.18 * math.sin(lower), elbow[1] + 0.18 * math.cos(lower))
        thigh, shin = rng.uniform(0.15, 0.8), rng.uniform(-0.1, 0.45)
        knee = (hip[0] + side * 0.22 * math.sin(thigh), hip[1] + 0.22 * math.cos(thigh))
        joints[f"{name} knee"] = knee
        joints[f"{name} ankle"] = (knee[0] + side * 0.2 * math.sin(shin), knee[1] + 0.2 * math.cos(shin))
    return joints


HEAD, LIMB = 0.11, 0.052  # radius of the head and width of a limb, in heights


def pose_extent(joints: dict[str, Point]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the drawn person in heights, half a limb of air included."""
    xs, ys = [x for x, _ in joints.values()], [y for _, y in joints.values()]
    nose = joints["nose"]
    return (
        min(min(xs) - LIMB, nose[0] - HEAD),
        min(min(ys) - LIMB, nose[1] - HEAD),
        max(max(xs) + LIMB, nose[0] + HEAD),
        max(max(ys) + LIMB, nose[1] + HEAD),
    )


def person_mask(joints: dict[str, Point], height: float) -> tuple[Image.Image, int, int]:
    """Mask of a stick person in the cell of `pose_extent`. Returns mask, left, top in the cell."""
    x0, y0, x1, y1 = pose_extent(joints)
    at = {name: ((x - x0) * height, (y - y0) * height) for name, (x, y) in joints.items()}
    mask = Image.new("L", (math.ceil((x1 - x0) * height), math.ceil((y1 - y0) * height)))
    draw = ImageDraw.Draw(mask)
    width = max(2, round(LIMB * height))
    for side in ("left", "right"):
        shoulder = (at["neck"][0], at["neck"][1] + 0.05 * height)
        draw.line([shoulder, at[f"{side} elbow"], at[f"{side} wrist"]], fill=255, width=width, joint="curve")
        draw.line([at["hip"], at[f"{side} knee"], at[f"{side} ankle"]], fill=255, width=width, joint="curve")
    draw.line([at["nose"], at["neck"], at["hip"]], fill=255, width=width)
    (x, y), r = at["nose"], HEAD * height
    draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return _crop(mask)


def defect_mask(kind: str, width: float, height: float, rng: Random) -> tuple[Image.Image, int, int]:
    """Mask of a defect in a width x height cell: straight scratch, jagged crack, spot or hole.

    Returns mask, left, top in the cell.
    """
    w, h = math.ceil(width), math.ceil(height)
    mask = Image.new("L", (w, h))
    draw = ImageDraw.Draw(mask)
    thick = max(2, round(0.06 * min(w, h)))
    if kind in ("scratch", "crack"):
        n = 2 if kind == "scratch" else 7
        jitter = 0.0 if kind == "scratch" else 0.16
        points = []
        for k in range(n):
            t, wobble = k / (n - 1), rng.uniform(-jitter, jitter) if 0 < k < n - 1 else 0.0
            points.append(((0.06 + 0.88 * t + wobble) * w, (0.06 + 0.88 * t - wobble) * h))
        if rng.random() < 0.5:
            points = [(w - 1 - x, y) for x, y in points]
        draw.line(points, fill=255, width=thick, joint="curve")
    elif kind == "hole":
        draw.ellipse((0, 0, w - 1, h - 1), fill=255)
    else:
        corners = 14
        radii = [rng.uniform(0.36, 0.5) for _ in range(corners)]
        points = []
        for k, r in enumerate(radii):
            turn = 2 * math.pi * k / corners
            points.append((w / 2 + r * (w - 1) * math.cos(turn), h / 2 + r * (h - 1) * math.sin(turn)))
        draw.polygon(points, fill=255)
    return _crop(mask)


def _light(rng: Random) -> np.ndarray:
    """A pale colour, [3] float32 within 168..244, away from every colour of a shape."""
    base, tint = rng.uniform(178, 234), 10.0
    return np.array([base + rng.uniform(-tint, tint) for _ in range(3)], np.float32)


def background(kind: str, width: int, height: int, scale: int, rng: Random, *, pale: bool = False) -> Image.Image:
    """A background picture, one of BACKGROUNDS or TEXTURES; the same one, only larger, at every scale.

    pale  a texture as light as BACKGROUNDS are, so that every colour and ink stands out from it
    """
    w, h = width // scale, height // scale
    noise = np.random.default_rng(rng.getrandbits(64))
    if kind == "plain":
        return Image.new("RGB", (width, height), tuple(int(v) for v in _light(rng)))
    if kind == "gradient":
        a, b = _light(rng), _light(rng)
        ramp = np.stack([np.stack([a, (a + b) / 2]), np.stack([(a + b) / 2, b])])
        small = Image.fromarray(ramp.astype(np.uint8))
        return small.resize((width, height), Image.Resampling.BILINEAR)
    if kind == "noise":
        pixels = (_light(rng) + 11).astype(np.uint8) - noise.integers(0, 33, (h, w, 1), np.uint8)
    elif kind == "stripes":
        period, turned = rng.randint(8, 24), rng.random() < 0.5
        line = (10 * ((np.arange(w if turned else h) // period) % 2)).astype(np.uint8)
        pixels = _light(rng).astype(np.uint8) - (line[None, :, None] if turned else line[:, None, None])
        pixels = np.broadcast_to(pixels, (h, w, 3))
    else:
        pixels = _texture(kind, w, h, noise, rng)
        if pale:
            pixels = 128 + pixels // 2
    picture = Image.fromarray(pixels)
    return picture if scale == 1 else picture.resize((width, height), Image.Resampling.NEAREST)


def _texture(kind: str, w: int, h: int, noise: np.random.Generator, rng: Random) -> np.ndarray:
    """uint8 [h, w, 3]: brushed metal, wood grain, woven fabric or stone, in mid tones."""
    base = rng.uniform(130, 170)
    tint: tuple[float, ...]
    if kind == "metal":
        grain = noise.integers(-14, 15, (h, 1, 1), np.int16) + noise.integers(-4, 5, (h, w, 1), np.int16)
        tint = (base, base + 3, base + 8)
    elif kind == "wood":
        wave = np.sin(np.arange(h) * rng.uniform(0.3, 0.6) + 0.0)[:, None] * 10
        wave = wave + np.sin(np.arange(w) * rng.uniform(0.02, 0.05))[None, :] * 8
        grain = wave[:, :, None].astype(np.int16) + noise.integers(-3, 4, (h, w, 1), np.int16)
        tint = (base + 25, base - 10, base - 45)
    elif kind == "fabric":
        step = rng.randint(3, 6)
        weave = ((np.arange(h) // step)[:, None] + (np.arange(w) // step)[None, :]) % 2
        grain = (weave * 14 - 7)[:, :, None].astype(np.int16)
        tint = tuple(base + rng.uniform(-30, 30) for _ in range(3))
    else:
        coarse = noise.integers(-18, 19, (h // 6 + 2, w // 6 + 2), np.int16)
        grain = np.repeat(np.repeat(coarse, 6, 0), 6, 1)[:h, :w, None]
        tint = (base, base - 2, base - 6)
    return (np.array(tint, np.int16) + grain).astype(np.uint8)  # 20..230: no overflow


def weathered(picture: np.ndarray, ids: np.ndarray, scale: int, rng: Random) -> np.ndarray:
    """The picture as if photographed: grain in the ink of each thing, light from one side, noise in every pixel.

    picture uint8 [h, w, 3], ids uint8 [h, w] (0: background). The same at every scale, only larger.
    """
    h, w = (n // scale for n in picture.shape[:2])
    noise = np.random.default_rng(rng.getrandbits(64))
    turn, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.16)
    across = np.linspace(-math.cos(turn), math.cos(turn), w)[None, :]
    light = 1 + strength * (across + np.linspace(-math.sin(turn), math.sin(turn), h)[:, None]) / 1.5
    grain = np.repeat(np.repeat(noise.integers(-26, 27, (h // 3 + 1, w // 3 + 1)), 3, 0), 3, 1)[:h, :w]
    pixels = noise.integers(-14, 15, (h, w, 3)).astype(np.float32)
    light, grain, pixels = (_enlarged(plane, scale) for plane in (light, grain, pixels))
    inked = picture + (grain * (ids > 0))[..., None]
    return (inked * light[..., None] + pixels).clip(0, 255).astype(np.uint8)


def _enlarged(plane: np.ndarray, scale: int) -> np.ndarray:
    return plane.repeat(scale, 0).repeat(scale, 1)
