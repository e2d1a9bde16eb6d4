"""Objects and people: prompts, answers, boxes of pictures that are not square, the rules for bad boxes and rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sphinx_fast.data.coco import JOINTS
from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.sources import open_source
from sphinx_fast.tasks.boxes import parse_boxes, parse_key_points

CATEGORIES = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 18, "name": "dog"}]


def write(folder: Path, images: list[Any], annotations: list[Any], categories: list[Any] = CATEGORIES) -> Path:
    path = folder / "instances_train2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    for image in images:
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            (folder / image["file_name"]).touch()
    return path


def image(number: int = 9, width: int = 640, height: int = 480) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height, "license": 3}


def thing(*bbox: float, category: int = 1, number: int = 9, **more: Any) -> dict[str, Any]:
    return {"id": 5, "image_id": number, "category_id": category, "bbox": list(bbox), "iscrowd": 0, "area": 1.5} | more


def test_detection(tmp_path: Path) -> None:
    """Side 640, the picture 80 pixels below the square's edge: y = (pixel + 80) / 640."""
    objects = [
        thing(64, 48, 64, 64),
        thing(0, 0, 640, 480, category=18),
        thing(320, 240, 1000, 100),  # cut at the right edge
        thing(0, 0, 50, 50, iscrowd=1),
        thing(10, 10, 0, 5),  # empty: left out
    ]
    source = open_source("detection", write(tmp_path, [image(), image(10)], objects))
    picture = tmp_path / "000000000009.jpg"
    people = "[0.10,0.20,0.20,0.30];[0.50,0.50,1.00,0.66]"
    everything = f"person{people}, dog[0.00,0.12,1.00,0.88]"
    assert [source[i] for i in range(len(source))] == [
        Conversation((("Detect all objects shown in the image.", everything),), picture, "instances_train2017.json:0"),
        Conversation(
            (
                ("detect all person shown in the image.", people),
                ("detect all dog shown in the image.", "[0.00,0.12,1.00,0.88]"),
            ),
            picture,
            "instances_train2017.json:0",
        ),
    ]
    only = open_source("detection", tmp_path / "instances_train2017.json", ask="all")
    assert len(only) == 1


def test_boxes_over_random_sizes(tmp_path: Path) -> None:
    """Through the text and back: within half a hundredth of the side."""
    rng = random.Random(0)
    images, objects = [], []
    for number in range(200):
        width, height = rng.randint(20, 3000), rng.randint(20, 3000)
        x, y = rng.uniform(0, width - 10), rng.uniform(0, height - 10)
        images.append(image(number, width, height))
        objects.append(thing(x, y, rng.uniform(1, width - x), rng.uniform(1, height - y), number=number))
    source = open_source("detection", write(tmp_path, images, objects), ask=["all"])
    for number, (size, object_) in enumerate(zip(images, objects, strict=True)):
        x, y, w, h = object_["bbox"]
        box = parse_boxes(source[number].turns[0][1])[0].to_picture(size["width"], size["height"])
        error = max(abs(a - b) for a, b in zip(box.xyxy, (x, y, x + w, y + h), strict=True))
        assert error <= 0.005 * max(size["width"], size["height"]) * (1 + 1e-9)


def test_lvis_has_urls_for_names(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "000000391895.jpg").touch()
    url = "http://images.cocodataset.org/train2017/000000391895.jpg"
    lvis = {"id": 391895, "coco_url": url, "width": 100, "height": 200, "neg_category_ids": [2]}
    categories = [{"id": 7, "name": "aerosol_can", "synset": "aerosol.n.02", "synonyms": ["aerosol_can"]}]
    row = thing(50, 100, 50, 100, category=7, number=391895)
    del row["iscrowd"]
    source = open_source("detection", write(tmp_path, [lvis], [row], categories), ask="category", root=tmp_path)
    assert source[0].picture == tmp_path / "train2017/000000391895.jpg"
    assert source[0].turns == (("detect all aerosol can shown in the image.", "[0.50,0.50,0.75,1.00]"),)


def test_people(tmp_path: Path) -> None:
    key_points = [0] * 51
    key_points[:3] = 100, 50, 2  # nose
    key_points[3:6] = 120, 40, 1  # left eye, hidden
    key_points[48:51] = 99, 100, 2  # right ankle
    key_points[45:48] = 900, 100, 2  # left ankle, outside
    person = thing(50, 0, 100, 100, keypoints=key_points, num_keypoints=3)
    path = write(tmp_path, [image(width=200, height=100)], [person, thing(0, 0, 20, 40, keypoints=[0] * 51)])
    source = open_source("people", path)
    assert len(source) == 1 and source[0].turns == (
        ("Detect all people shown in the image.", "[0.25,0.25,0.75,0.75];[0.00,0.25,0.10,0.45]"),
        (
            "Detect the key points of the person in the region [0.25,0.25,0.75,0.75].",
            "nose[0.50,0.50], right ankle[0.49,0.75]",
        ),
    )
    hidden = open_source("people", path, occluded=True, ask="joints")[0].turns[0][1]
    assert list(parse_key_points(hidden)) == ["nose", "left eye", "right ankle"]
    assert len(JOINTS) == 17 and JOINTS[:5] == ("nose", "left eye", "right eye", "left ear", "right ear")
    assert JOINTS[-2:] == ("left ankle", "right ankle")


def test_long_conversations_are_cut(tmp_path: Path) -> None:
    categories = [{"id": i, "name": f"c{i}"} for i in range(5)]
    objects = [thing(0, 0, 9, 9, category=i) for i in range(5)]
    path = write(tmp_path, [image()], objects, categories)
    source = open_source("detection", path, ask="category", max_turns=2)
    asked = [[question.split()[2] for question, _ in source[i].turns] for i in range(len(source))]
    assert asked == [["c0", "c1"], ["c2", "c3"], ["c4"]]
    for nothing in (0, "2", None):
        with pytest.raises(ValueError, match="max_turns"):
            open_source("detection", path, max_turns=nothing)


NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any, list[Any]]] = [
    *[("box", image(), [thing(*bbox)]) for bbox in ((NAN, 0, 1, 1), (0, 0, INF, 1), (5, 5, 0, 5), (5, 5, -4, 5))],
    *[("box", image(), [thing(*bbox)]) for bbox in ((640, 0, 10, 10), (-20, 0, 20, 20), (0, -9, 3, 4), (1, 2, 3))],
    ("box", image(), [thing(0, 0, 1, 1, bbox=None), thing(1, 1, 0, 0)]),
    ("box", image(), [thing(0, 0, 1, 1, bbox=["0", "0", "1", "1"])]),
    ("fields", image(), [thing(0, 0, 9, 9, category=99)]),
    ("fields", image(width=0), [thing(0, 0, 9, 9)]),
    ("fields", {"id": 9, "file_name": "a.jpg"}, [thing(0, 0, 9, 9)]),
    ("fields", {"id": 9, "width": 5, "height": 5}, [thing(0, 0, 9, 9)]),
    ("fields", "no image", []),
]


@pytest.mark.parametrize(("kind", "picture", "objects"), BAD)
def test_bad_rows(tmp_path: Path, kind: str, picture: Any, objects: list[Any]) -> None:
    source = open_source("detection", write(tmp_path, [picture], objects), ask="all")
    with pytest.raises(BadRowError, match=r"^instances_train2017\.json:0: [^\n]+$") as caught:
        source[0]
    assert caught.value.kind == kind


def test_a_thousand_pictures_with_a_hundred_bad_ones(tmp_path: Path) -> None:
    images, objects, expected = [], [], Counter[str]()
    for number in range(1000):
        picture, things = image(number), [thing(0, 0, 9, 9)]
        if number % 10 == 7:
            kind, picture, things = BAD[number // 10 % (len(BAD) - 1)]
            picture = picture | {"id": number}
            expected[kind] += 1
        images.append(picture)
        objects += [one | {"image_id": number} for one in things]
    objects.append(thing(0, 0, 9, 9, number=5000))  # of a picture that is not there
    source = open_source("detection", write(tmp_path, images, objects), ask="all")
    found = Counter[str]()
    for index in range(len(source)):
        try:
            assert source[index].turns[0][1] == "person[0.00,0.12,0.01,0.14]"
        except BadRowError as error:
            found[error.kind] += 1
    assert len(source) == 1001 and found == expected + Counter({"fields": 1}) and sum(expected.values()) == 100


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    source = open_source("detection", write(tmp_path, [image()], [thing(0, 0, 9, 9)]), root="elsewhere")
    with pytest.raises(BadRowError, match=r"elsewhere/000000000009\.jpg") as caught:
        source[0]
    assert caught.value.kind == "no picture"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": {}}', "[" * 100_000])
def test_a_file_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    for type in ("detection", "people", "refcoco", "captions"):
        if (type, content) != ("refcoco", "[]"):
            with pytest.raises(ValueError, match=r"^\S+\.json: [^\n]+$"):
                open_source(type, tmp_path / "a.json")
