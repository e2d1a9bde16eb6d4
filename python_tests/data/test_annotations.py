"""What every converter owes: whatever stands in a file, it is refused in one line, or single rows are."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sphinx_fast.data.annotations import chosen, square
from sphinx_fast.data.record import BadRowError
from sphinx_fast.data.rows import Reader
from sphinx_fast.data.sources import DRAWN, SOURCES, open_source

_IMAGES = [{"id": i, "file_name": "a.jpg", "width": 64, "height": 48, "caption": "a man"} for i in (1, 2)]
_BOXES = [
    {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 30.5, 20], "iscrowd": 0, "keypoints": [5, 5, 2] * 17}
    for i in (1, 2)
]
_COCO = {"images": _IMAGES, "annotations": _BOXES, "categories": [{"id": 1, "name": "person"}]}
_INSTANCES = {"instances.json": _COCO}
_GENOME = {"image_data.json": [{"image_id": 1, "url": "http://x/y/a.jpg", "width": 64, "height": 48}]}
_THING = {"x": 1, "y": 2, "w": 10, "h": 20}
_TWO = [{"image_id": 1, "question_id": i, "question": f"q{i}", "caption": "c"} for i in (1, 2)]
_ANSWERS = [{"question_id": i, "answers": [{"answer": "a"}, {"answer": "b"}]} for i in (1, 2)]
_CHOICE = {"choices": ["a", "b"], "correct_choice_idx": 1, "direct_answers": ["a", "b"]}
_TALK = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]

# For each type: the file, what lies beside it, and its options.
SAMPLES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "llava": ([{"image": "a.jpg", "conversations": _TALK}] * 2, {}, {}),
    "openai": ([{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}], {}, {}),
    "detection": (_COCO, {}, {}),
    "people": (_COCO, {}, {}),
    "captions": ({"images": _IMAGES, "annotations": _TWO}, {}, {}),
    "refcoco": ([{"image_id": 1, "ann_id": 1, "sentences": [{"sent": "s"}], "split": "train"}] * 2, _INSTANCES, {}),
    "genome_regions": (
        [{"id": 1, "regions": [{"image_id": 1, "phrase": "p", "x": 1, "y": 2, "width": 3, "height": 4}] * 2}],
        _GENOME,
        {},
    ),
    "genome_relations": (
        [{"image_id": 1, "relationships": [{"predicate": "on", "subject": _THING, "object": _THING}]}],
        _GENOME,
        {},
    ),
    "vqa": ({"questions": _TWO}, {"answers.json": {"annotations": _ANSWERS}}, {"annotations": "answers.json"}),
    "gqa": ({"1": {"imageId": "1", "question": "q", "answer": "a"}}, {}, {}),
    "aokvqa": ([row | _CHOICE for row in _TWO], {}, {}),
    "ocr_vqa": ({"k": {"imageURL": "http://x/a.jpg", "questions": ["q"], "answers": ["a"], "split": 1}}, {}, {}),
    "textvqa": (
        {"data": [{"image_id": "a", "question": "q", "answers": ["a"]}]},
        {"ocr.json": {"data": [{"image_id": "a", "ocr_tokens": ["t"]}]}},
        {"ocr": "ocr.json"},
    ),
    "textcaps": ({"data": [{"image_id": "a", "caption_str": "c"}]}, {}, {}),
}
_JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    2,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    "<image>",
    "\ud800",
    "a\0",
]
_JUNK += [[], {}, [1], ["x"], {"x": 1}, [[]], [None], "{", "http://x/y", "../.."]


def written(folder: Path, type: str, content: Any, beside: dict[str, Any]) -> Reader:
    for name, table in {"data.json": content, **beside}.items():
        (folder / name).write_text(json.dumps(table))
    (folder / "a.jpg").touch()
    options = {key: folder / name for key, name in SAMPLES[type][2].items()}
    return open_source(type, folder / "data.json", **options)


def nodes(table: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a table: what holds it, and its key."""
    keys = table if isinstance(table, dict) else range(len(table)) if isinstance(table, list) else ()
    for key in keys:
        yield table, key
        yield from nodes(table[key])


def test_a_sample_for_every_converter() -> None:
    elsewhere = {"sharegpt", "image_text", "text", "webdataset", "parquet", "classes", "flickr30k", *DRAWN}
    assert set(SAMPLES) | elsewhere == set(SOURCES)


@pytest.mark.parametrize("type", SAMPLES)
def test_anything_may_stand_in_a_file(tmp_path: Path, type: str) -> None:
    """Values swapped for others anywhere: one line that names the file or the row, and nothing else is raised."""
    rng, used = random.Random(type), 0
    for trial in range(300):
        content, beside, _ = copy.deepcopy(SAMPLES[type])
        for _ in range(rng.randint(0, 2)):
            holder, key = rng.choice(list(nodes([content, beside]))[2:])
            if rng.random() < 0.2 and isinstance(holder, dict):
                del holder[key]
            else:
                holder[key] = copy.deepcopy(rng.choice(_JUNK))
        try:
            source = written(tmp_path, type, content, beside if isinstance(beside, dict) else {})
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), error
            continue
        for index in range(len(source)):
            try:
                row = source[index]
                assert row.turns and all(answer for _, answer in row.turns)
                used += 1
            except BadRowError as error:
                assert ".json:" in str(error) and "\n" not in str(error), error
        if trial % 50 == 0:
            assert len(pickle.loads(pickle.dumps(source))) == len(source)
    assert used > 20 or type not in ("llava", "detection", "people", "captions", "refcoco", "textvqa", "textcaps")


def test_the_boxes_of_a_picture_that_is_tall() -> None:
    """100 x 200: side 200, 50 to the left of it."""
    assert square([0, 0, 100, 200], (100, 200)).xyxy == (0.25, 0.0, 0.75, 1.0)
    assert square([-50, 100, 50, 999], (100, 200)).xyxy == (0.25, 0.5, 0.5, 1.0)
    nan = float("nan")
    for corners in (
        [0, 0, 0, 9],
        [9, 9, 1, 1],
        [100, 0, 120, 9],
        [0, 0, nan, 1],
        [0, 0, 1],
        [0, 0, 10**400, 1],
        list("0011"),
    ):
        with pytest.raises(BadRowError) as caught:
            square(corners, (100, 200))
        assert caught.value.kind == "box"


def test_what_is_asked_can_be_chosen() -> None:
    assert chosen("b", "a", "b") == ("b",) and chosen(["b", "a"], "a", "b") == ("b", "a")
    for nothing in ([], "c", ["a", "c"], [["a"]], None, 3):
        with pytest.raises(ValueError, match="ask: expected some of a, b"):
            chosen(nothing, "a", "b")
