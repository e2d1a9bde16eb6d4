"""Boxes and points: every form read and printed, frames, any string, linear time."""

import doctest
import math
import random
import re
import time
from pathlib import Path

import pytest

from sphinx_fast.tasks.boxes import (
    Box,
    Point,
    Region,
    first_box,
    format_boxes,
    format_region,
    iou,
    parse_boxes,
    parse_key_points,
    parse_points,
    parse_regions,
)


def two_decimals(rng: random.Random) -> Box:
    x, y = (sorted(rng.randrange(101) / 100 for _ in range(2)) for _ in range(2))
    return Box(x[0], y[0], x[1], y[1])


# ---- frames


def test_picture_to_square_to_picture_over_random_sizes():
    """Unrounded: to rounding, far within half a pixel. Through text: within 0.005 of the longer side."""
    rng = random.Random(0)
    for _ in range(10_000):
        width, height = (math.ceil(10 ** rng.uniform(0, 4.3)) for _ in range(2))
        side = max(width, height)
        x, y = (sorted(rng.uniform(0, limit) for _ in range(2)) for limit in (width, height))
        box = Box(x[0], y[0], x[1], y[1], "picture")
        square = box.to_square(width, height)
        assert all(0 <= v <= 1 for v in square.xyxy) and square.frame == "square"
        error = max(abs(a - b) for a, b in zip(square.to_picture(width, height).xyxy, box.xyxy, strict=True))
        assert error < 1e-6 * side and error < 0.5
        read = parse_boxes(square.text())[0].to_picture(width, height)
        assert max(abs(a - b) for a, b in zip(read.xyxy, box.xyxy, strict=True)) <= 0.005 * side * (1 + 1e-9)


def test_the_padding_is_that_of_the_views():
    """offset = floor((side - w) / 2): a mark in the picture lies in the padded square where its box says."""
    from PIL import Image

    for width, height in [(1, 1), (7, 4), (4, 7), (640, 427), (333, 1000), (10, 3)]:
        side = max(width, height)
        picture = Image.new("RGB", (width, height))
        picture.putpixel((width - 1, height // 2), (255, 0, 0))
        padded = Image.new("RGB", (side, side))
        padded.paste(picture, ((side - width) // 2, (side - height) // 2))
        square = Box(width - 1, height // 2, width, height // 2 + 1, "picture").to_square(width, height)
        found = padded.getchannel("R").getbbox()
        assert found is not None
        assert [v * side for v in square.xyxy] == pytest.approx(list(found))


def test_a_known_box():
    """A 640x480 picture: side 640, offset 80 below and above."""
    box = Box(0.25, 0.25, 0.5, 0.875)
    assert box.to_picture(640, 480).xyxy == (160, 80, 320, 480)
    assert Box(0, 0, 1, 1).to_picture(640, 480).xyxy == (0, -80, 640, 560)
    assert Box(0, 0, 1, 1).to_picture(640, 480, clip=True).xyxy == (0, 0, 640, 480)
    assert Point(0.5, 0.5).to_picture(640, 480) == Point(320, 240, "picture")
    assert Point(0.5, 0.05).to_picture(640, 480, clip=True) == Point(320, 0, "picture")
    assert Box(0, 0, 0.1, 0.1).to_picture(640, 480, clip=True).area == 0  # in the padding: nothing of it is picture


def test_converting_twice_changes_nothing():
    box = Box(0.1, 0.2, 0.3, 0.4)
    once = box.to_picture(100, 50)
    assert once.to_picture(100, 50) == once and box.to_square(100, 50) == box


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: Box(0.5, 0, 0.4, 1), "x1 <= x2"),
        (lambda: Box(0, 0, float("nan"), 1), "finite"),
        (lambda: Point(float("inf"), 0), "finite"),
        (lambda: Box(0, 0, 1, 1, "pixels"), "frame"),  # type: ignore[arg-type]
        (lambda: Box(0, 0, 1, 1).to_picture(0, 5), "0x5"),
        (lambda: Box(10, 20, 30, 40).text(), "to_square"),
        (lambda: Box(0, 0, 1, 1, "picture").text(), "padded square"),
        (lambda: iou(Box(0, 0, 1, 1), Box(0, 0, 1, 1, "picture")), "frames"),
        (lambda: format_boxes([], "pretty"), "style"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(bad, words):
    with pytest.raises(ValueError, match=words):
        bad()


# ---- forms


@pytest.mark.parametrize("style", ["separate", "joined", "flat"])
def test_boxes_round_trip(style):
    rng = random.Random(1)
    for n in range(300):
        boxes = [two_decimals(rng) for _ in range(n % 7)]
        assert parse_boxes(format_boxes(boxes, style)) == boxes


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize(
    "name", ["left eye", "alarm_clock", "two cows", "a glass of water", "Café 24", "", "price 3.5"]
)
def test_regions_round_trip(name, tags):
    rng = random.Random(2)
    for n in range(1, 5):
        boxes = tuple(two_decimals(rng) for _ in range(n))
        points = tuple(Point(rng.randrange(101) / 100, rng.randrange(101) / 100) for _ in range(n % 3))
        region = Region(name, boxes, points)
        other = Region("dog", (two_decimals(rng),))
        assert parse_regions(format_region(region, tags)) == [region]
        assert parse_regions(f"{format_region(region, tags)}, and {format_region(other, tags)}.") == [region, other]


def test_printing():
    assert Box(0.123, 0.005, 1, 1).text() in ("[0.12,0.01,1.00,1.00]", "[0.12,0.00,1.00,1.00]")
    assert Point(-0.001, 1.04).text() == "[0.00,1.00]"
    assert format_boxes([Box(0, 0, 1, 1)] * 2) == "[0.00,0.00,1.00,1.00];[0.00,0.00,1.00,1.00]"
    assert format_boxes([Box(0, 0, 1, 1)] * 2, "joined") == "[0.00,0.00,1.00,1.00;0.00,0.00,1.00,1.00]"
    assert format_boxes([]) == ""
    assert format_region(Region("cat", (Box(0, 0, 1, 1),)), tags=True) == "<p>cat</p>[0.00,0.00,1.00,1.00]"


# answers of the paper's figures, shortened, with what they say: (name, boxes, points)
ANSWERS = [
    ("[0.37,0.32,0.90,0.58]", [("", 1, 0)]),
    ("A deer[0.39,0.19,1.00,0.71] is eating a pumpkin[0.38,0.41,0.66,0.70].", [("A deer", 1, 0), ("a pumpkin", 1, 0)]),
    (
        "There are seven objects shown in the image, including a umbrella[0.77,0.46,0.80,0.63], "
        "two cows[0.38,0.38,0.61,0.54;0.27,0.41,0.38,0.64], and a person[0.53,0.49,0.71,0.67].",
        [("a umbrella", 1, 0), ("two cows", 2, 0), ("a person", 1, 0)],
    ),
    (
        "The detected key points are nose[0.42,0.15], left eye[0.43,0.13], and right ankle[0.61,0.63].",
        [("nose", 0, 1), ("left eye", 0, 1), ("right ankle", 0, 1)],
    ),
    (
        "layer[0.37, 0.24, 0.43, 0.27].Image [0.25, 0.32, 0.33, 0.35].alarm_clock[0.04, 0.8, 0.16, 0.83]."
        "Text encoder[0.21, 0.88, 0.37, 0.91].",
        [("layer", 1, 0), ("Image", 1, 0), ("alarm_clock", 1, 0), ("Text encoder", 1, 0)],
    ),
    (
        "including a person[0.21,0.39,0.37,0.76], two sneakers [0.26,0.73,0.29,0.76,0.29,0.74,0.31,0.76]",
        [("a person", 1, 0), ("two sneakers", 2, 0)],
    ),
    (
        "A man[0.43,0.25,0.65,0.65] in a yellow shirt[0.43,0.29,0.63,0.46] on the back of a car[0.46,0.37,1.00,0.75].",
        [("A man", 1, 0), ("a yellow shirt", 1, 0), ("a car", 1, 0)],
    ),
    ("Detect the key points in the region [0.38,0.39,0.57,0.64];[0.63,0.37,0.81,0.65].", [("the region", 2, 0)]),
    ("<p>the girl on the left</p> [0.1,0.2,0.3,0.4] ; [.5,.6,.7,.8]", [("the girl on the left", 2, 0)]),
    ("There are four dogs[0.76,0.51,0.85,0.57;0.76,0.44,0.84,0.47] in it.", [("four dogs", 2, 0)]),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_answers_of_the_paper(answer, expected):
    assert [(r.name, len(r.boxes), len(r.points)) for r in parse_regions(answer)] == expected


def test_values_are_read_exactly():
    assert parse_boxes("a [0.04, .8, 1, +0.83] b") == [Box(0.04, 0.8, 1, 0.83)]
    assert parse_points("nose[0.42,0.15;0.5,0.25]") == [Point(0.42, 0.15), Point(0.5, 0.25)]
    points = parse_key_points("nose[0.42,0.15], left eye[0.43,0.13], nose[0.9,0.9]")
    assert points == {"nose": Point(0.42, 0.15), "left eye": Point(0.43, 0.13)}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[0.1,0.2,0.3]", 0),  # 3 numbers are nothing
        ("[0.1,0.2,0.3,0.4,0.5]", 0),
        ("[0.1,0.2,0.3;0.1,0.2,0.3,0.4]", 1),  # the part that can be read
        ("[0.1,0.2,0.3,0.4", 0),  # cut off
        ("[0.1,0.2,0.3,0.4;0.5,0.6", 0),
        ("[0.1,0.2,0.3,x]", 0),
        ("[0.1,,0.3,0.4]", 0),
        ("[]", 0),
        ("[nan,0,0.5,0.5][inf,0,1,1][1e-1,0,1,1][0x1,0,1,1]", 0),
        ("[" + "9" * 5000 + ",0,1,1]", 0),
        ("[0." + "1" * 5000 + ",0,1,1]", 0),
        ("[12,20,300,400]", 0),  # pixels, or a list of references
        ("[-0.05,0,1.05,1]", 1),  # just outside: kept
        ("[-0.2,0,1,1]", 0),
        ("[0.5,0.6,0.1,0.2]", 1),  # corners in the other order
        ("[[0.1,0.2,0.3,0.4],[0.5,0.6,0.7,0.8]]", 2),
        ("(0.1,0.2,0.3,0.4)", 0),
        ("[٠.١,0.2,0.3,0.4]", 0),  # digits of another script
        ("[0.1\n,0.2, 0.3\t,0.4]", 1),
    ],
)
def test_rules(text, count):
    assert len(parse_boxes(text)) == count
    assert sum(len(region.boxes) for region in parse_regions(text)) == count


def test_corners_are_put_in_order():
    assert parse_boxes("[0.5,0.6,0.1,0.2]") == [Box(0.1, 0.2, 0.5, 0.6)]


def test_first_box_is_the_first_bracket():
    assert first_box("It is [0.1,0.2,0.3,0.4] or [0,0,1,1]") == Box(0.1, 0.2, 0.3, 0.4)
    assert first_box("two: [0.1,0.2,0.3,0.4;0,0,1,1]") == Box(0.1, 0.2, 0.3, 0.4)
    assert first_box("[see] [0.1,0.2,0.3,0.4]") is None
    assert first_box("[0.1,0.2,0.3,") is None and first_box("") is None


# ---- any string


def random_text(rng: random.Random) -> str:
    alphabet = rng.choice(["[]0123456789.,; -", "[],;.01ab <>p/", "".join(map(chr, range(32, 400))), "[0.5,"])
    text = "".join(rng.choices(alphabet, k=rng.randrange(100)))
    if rng.random() < 0.5:  # a good answer, damaged
        good = list(rng.choice(ANSWERS)[0])
        for _ in range(rng.randrange(1, 8)):
            i = rng.randrange(len(good))
            good[i : i + rng.randrange(3)] = rng.choices("[]0123456789.,;xé<>\0\n", k=rng.randrange(3))
        text = "".join(good) + text
    return text


def test_any_string_is_read_without_an_exception():
    rng = random.Random(3)
    tried, found = 20_000, 0
    start = time.perf_counter()
    for _ in range(tried):
        text = random_text(rng)
        boxes, points, regions = parse_boxes(text), parse_points(text), parse_regions(text)
        assert first_box(text) in (None, *boxes) and len(parse_key_points(text)) <= len(points)
        assert [b for r in regions for b in r.boxes] == boxes and [p for r in regions for p in r.points] == points
        assert all(-0.1 <= v <= 1.1 for b in boxes for v in b.xyxy)
        assert parse_boxes(format_boxes(boxes)) == [Box(*(round(min(max(v, 0), 1), 2) for v in b.xyxy)) for b in boxes]
        found += bool(regions)
    seconds = time.perf_counter() - start
    print(f"strings: tried {tried}, with coordinates {found}, without {tried - found}, other 0; {seconds:.1f} s")
    assert 0.2 * tried < found < 0.8 * tried


@pytest.mark.parametrize(
    "unit", ["[", "]", "[0.1,", "0.1,0.2;", "[0.1,0.2]", "a ", "<p>", "<p>a</p>[0.1,0.2] ", "9", " ,;", "[0.1,0.2],"]
)
def test_time_is_linear(unit):
    """200,000 characters, one awkward piece repeated: what is quadratic takes minutes. CPU time of this process."""
    for text in (unit * (200_000 // len(unit)), "[" + unit * (200_000 // len(unit)) + "]"):
        start = time.process_time()
        parse_regions(text)
        assert time.process_time() - start < 5


# ---- iou


def test_iou():
    a = Box(0, 0, 0.5, 0.5)
    assert iou(a, a) == 1
    assert iou(a, Box(0.25, 0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert iou(a, Box(0.5, 0, 1, 0.5)) == 0 and iou(a, Box(0.6, 0.6, 1, 1)) == 0
    assert iou(Box(0.1, 0.1, 0.1, 0.1), Box(0.1, 0.1, 0.1, 0.1)) == 0  # empty
    assert iou(Box(0, 0, 100, 50, "picture"), Box(0, 0, 50, 50, "picture")) == pytest.approx(0.5)


def test_iou_against_counting():
    rng = random.Random(4)
    for _ in range(200):
        a, b = two_decimals(rng), two_decimals(rng)
        cells = [
            {
                (x, y)
                for x in range(round(100 * q.x1), round(100 * q.x2))
                for y in range(round(100 * q.y1), round(100 * q.y2))
            }
            for q in (a, b)
        ]
        union = len(cells[0] | cells[1])
        assert iou(a, b) == pytest.approx(len(cells[0] & cells[1]) / union if union else 0)
        assert iou(a, b) == iou(b, a)


# ---- documentation


def test_the_examples_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "boxes.md").read_text()
    source = "\n\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(source, {}, "docs/boxes.md", None, 0)
    failed, tried = doctest.DocTestRunner().run(test)
    assert tried > 10 and not failed
