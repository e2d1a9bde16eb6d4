"""Drawing: boxes where they say, labels whole and readable, any size of picture."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from sphinx_fast.image.decode import PictureError
from sphinx_fast.tasks.boxes import Box, Point, Region
from sphinx_fast.tasks.draw import (
    JOINTS,
    _Canvas,
    colour,
    contrasting,
    draw_answer,
    draw_boxes,
    draw_regions,
)

GREY = (128, 128, 128)
PEOPLE = "nose[0.5,0.1], left shoulder[0.6,0.3], right shoulder[0.4,0.3], left elbow[0.7,0.5], right elbow[0.3,0.5]"


def plain(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def changed(drawn: Image.Image) -> np.ndarray:
    """Where a plain picture was drawn on: bool [h, w]."""
    return (np.asarray(drawn) != GREY).any(axis=2)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (1200, 900)])
def test_the_outline_lies_inside_the_box(size):
    """The pixels along the inner edge are drawn, the ones beyond it and the middle are as they were."""
    width, height = size
    left, top, right, bottom = width // 4, height // 3, width // 2, height * 3 // 4
    drawn = draw_boxes(plain(*size), [Box(left, top, right, bottom, "picture").to_square(*size)])
    mask = changed(drawn)
    assert drawn.size == size and drawn.mode == "RGB"
    for edge in (
        mask[top, left:right],
        mask[bottom - 1, left:right],
        mask[top:bottom, left],
        mask[top:bottom, right - 1],
    ):
        assert edge.all()
    inside = mask.copy()
    inside[top:bottom, left:right] = False
    assert not inside.any()
    assert not mask[(top + bottom) // 2, (left + right) // 2]


def test_the_picture_given_is_not_changed():
    for picture in (
        plain(50, 40),
        np.full((40, 50, 3), 128, np.uint8),
        torch.full((40, 50, 3), 128, dtype=torch.uint8),
    ):
        drawn = draw_answer(picture, "cat[0.1,0.2,0.9,0.8]")
        assert (np.asarray(picture) == 128).all() and changed(drawn).any()


def test_the_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    plain(60, 40).save(buffer, "JPEG", exif=exif.tobytes())
    assert draw_boxes(buffer.getvalue(), [Box(0, 0, 1, 1)]).size == (40, 60)


@pytest.mark.parametrize("size", [(60, 40), (100, 60), (224, 224), (640, 480), (200, 900), (900, 40), (3000, 2000)])
def test_labels_are_whole_wherever_the_box_lies(size):
    """A label at any corner has the pixels of one in the middle, and its letters do not touch its border."""

    def label(x: float, y: float) -> np.ndarray:
        box = Box(x * (size[0] - 2), y * (size[1] - 2), x * (size[0] - 2) + 2, y * (size[1] - 2) + 2, "picture")
        canvas = _Canvas(plain(*size))
        canvas.label("cat", canvas.pixels(box), colour(0))
        (left, top, right, bottom), *none = canvas.labels
        assert not none and 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        return np.asarray(canvas.image.crop((left, top, right, bottom)))

    middle = label(0.5, 0.5)
    letters = (middle != colour(0)).any(axis=2)
    assert letters.sum() > 20 and letters[1:-1, 1:-1].sum() == letters.sum()
    assert all(np.array_equal(label(x, y), middle) for x in (0, 0.5, 1) for y in (0, 0.5, 1))


def test_letters_grow_with_the_picture():
    heights = {}
    for side in (100, 224, 1000, 4000):
        canvas = _Canvas(plain(side, side))
        canvas.label("cat", (0, side // 2, side, side), colour(0))
        heights[side] = canvas.labels[0][3] - canvas.labels[0][1]
    assert heights[100] >= 11 and heights[224] >= 11  # readable without enlarging
    assert heights[1000] >= 25 and heights[4000] >= 100  # readable when scaled to a screen


def test_crowded_labels_hide_none_of_each_other():
    rng = random.Random(0)
    canvas = _Canvas(plain(320, 240))
    for i in range(60):
        x, y = rng.randrange(300), rng.randrange(220)
        canvas.label(f"thing {i}", (x, y, x + 20, y + 20), colour(i))
    assert len(canvas.labels) > 15
    for i, (a, b, c, d) in enumerate(canvas.labels):
        assert all(min(c, r) <= max(a, p) or min(d, s) <= max(b, q) for p, q, r, s in canvas.labels[i + 1 :])


def test_a_long_name_is_shortened_not_cut():
    canvas = _Canvas(plain(120, 80))
    canvas.label("a very long name that goes on and on and on", (10, 40, 30, 60), colour(0))
    text, font, width, _, _ = canvas.fitted("a very long name that goes on and on and on") or pytest.fail("no label")
    assert text.endswith("…") and font.getlength(text) < width <= 120
    assert canvas.labels[0][2] <= 120


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3), (7, 5), (16, 16), (60_000, 1), (1, 5000), (400, 9)])
def test_tiny_and_thin_pictures(size):
    answer = f"cat[0,0,1,1], dog[0.2,0.2,0.3,0.3], {PEOPLE}, ball[0.5,0.5]"
    drawn = draw_answer(plain(*size), answer)
    assert drawn.size == size and changed(drawn).any()


def test_a_large_picture():
    """Larger than files may be: what is in memory already may be drawn on."""
    drawn = draw_boxes(plain(8000, 6000), [Box(0.2, 0.3, 0.6, 0.7)], ["cat"])
    assert drawn.size == (8000, 6000) and changed(drawn.crop((1600, 1390, 1620, 1410))).any()


@pytest.mark.parametrize(
    "name",
    ["", " ", "a\nb", "\0", "\ud800", "猫", "🐈", "e\u0301", "\u202ecat", "%s{}<p>", "x" * 5000, "[0.1]", "\u0600"],
)
def test_any_name(name):
    drawn = draw_regions(plain(100, 80), [Region(name, (Box(0.1, 0.2, 0.9, 0.8),))])
    assert changed(drawn).any()


def test_boxes_beyond_the_picture_are_clipped():
    everywhere = [
        Box(-5, -5, 5, 5),
        Box(-3, -3, -2, -2),
        Box(2, 2, 3, 3),
        Box(0, 0, 0, 0),
        Box(1, 1, 1, 1),
        Box(0, 0.5, 1, 0.5),
    ]
    for size in ((1, 1), (40, 20), (300, 200)):
        assert draw_boxes(plain(*size), everywhere, [str(i) for i in range(6)]).size == size
    assert draw_boxes(plain(9, 9), [Box(-1e300, -1e300, 1e300, 1e300, "picture")]).size == (9, 9)


def test_points_and_skeletons():
    assert {"nose", "left eye", "right ankle"} <= JOINTS and len(JOINTS) == 17
    drawn = changed(draw_answer(plain(400, 400), PEOPLE))
    assert drawn[160, 260] and drawn[120, 240] and drawn[120, 200]  # left upper arm, shoulder, between the shoulders
    assert not drawn[300, 200]
    alone = changed(draw_regions(plain(400, 400), [Region("left shoulder", (), (Point(0.6, 0.3),))]))
    assert alone[120, 240] and not alone[160, 260]


def test_a_joint_said_twice_begins_another_person():
    """Nothing joins two people, and each has a colour."""
    other = PEOPLE.replace("0.", "0.0")
    pixels = np.asarray(draw_answer(plain(400, 400), f"{PEOPLE}, {other}"))
    first, second = pixels[120, 240], pixels[12, 24]
    assert not (first == GREY).all() and not (second == GREY).all() and not (first == second).all()
    assert (pixels[60:100, 60:140] == GREY).all()


def test_one_name_one_colour():
    pixels = np.asarray(
        draw_answer(plain(400, 400), "cat[0.1,0.1,0.2,0.2], cat[0.6,0.6,0.9,0.9], dog[0.1,0.7,0.3,0.9]")
    )
    cat, other_cat, dog = pixels[79, 60], pixels[359, 300], pixels[359, 80]
    assert (cat == other_cat).all() and not (cat == dog).all()
    unnamed = np.asarray(draw_boxes(plain(400, 400), [Box(0.1, 0.1, 0.2, 0.2), Box(0.6, 0.6, 0.9, 0.9)]))
    assert not (unnamed[79, 60] == unnamed[359, 300]).all()


def test_colours_are_distinct_and_labels_contrast():
    inks = np.array([colour(i) for i in range(12)], float)
    apart = np.linalg.norm(inks[:, None] - inks[None], axis=-1) + 1000 * np.eye(12)
    assert apart.min() > 75  # of 441

    def luminance(ink):
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in ink]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    for i in range(200):
        pair = sorted((luminance(colour(i)), luminance(contrasting(colour(i)))))
        assert pair[1] / pair[0] >= 4.5  # WCAG's bound for readable text


def test_nothing_to_draw():
    assert not ImageChops.difference(draw_answer(plain(30, 20), "I see no box."), plain(30, 20)).getbbox()


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="one for each of 1 boxes, got 2"):
        draw_boxes(plain(5, 5), [Box(0, 0, 1, 1)], ["a", "b"])
    with pytest.raises(PictureError, match="no such file"):
        draw_boxes(tmp_path / "missing.png", [])
