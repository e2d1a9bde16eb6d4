"""Pictures annotated as COCO does it: objects (COCO, LVIS, Objects365, ...) and people with key points.

{"images": [{"id", "file_name" or "coco_url", "width", "height"}], "categories": [{"id", "name", "keypoints"}],
 "annotations": [{"image_id", "category_id", "bbox": [x, y, w, h], "iscrowd", "keypoints": [x, y, v, ...]}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx_fast.data.annotations import Asked, Recipe, chosen, from_sides, good, grouped, size_of, square, tail
from sphinx_fast.data.record import BadRowError
from sphinx_fast.data.rows import by_id, field, load_lists
from sphinx_fast.tasks import prompts
from sphinx_fast.tasks.boxes import Box, Point, Region, format_boxes, format_region

_SIDES = ("left", "right")
JOINTS = (
    "nose",
    *(
        f"{side} {part}"
        for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in _SIDES
    ),
)


def coco_picture(image: Any, root: Path) -> Path:
    """The file of a picture; LVIS has no names, and the URL's folder and name are the path."""
    if isinstance(image, dict) and "file_name" in image:
        return root / field(image, "file_name", str)
    return root / tail(field(image, "coco_url", str))


def box_of(annotation: Any, size: tuple[int, int]) -> Box:
    return square(from_sides(annotation.get("bbox") if isinstance(annotation, dict) else None), size)


def pictures(images: list[Any], annotations: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Every picture with its annotations, then, one by one, the annotations that belong to no picture."""
    groups = grouped(annotations, "image_id")
    for image in images:
        yield image, groups.pop(image["id"], []) if by_id([image]) else []
    for orphans in groups.values():
        for annotation in orphans:
            yield None, [annotation]


def _one_by_one(annotations: list[Any]) -> list[Any]:
    """Without crowds, whose box is around many."""
    return [
        annotation for annotation in annotations if not (isinstance(annotation, dict) and annotation.get("iscrowd"))
    ]


def detection(path: Path, root: Path, *, ask: Any = ("all", "category")) -> Recipe:
    """Objects: `person[..];[..], dog[..]` for all of them, `[..];[..]` for each category that is there."""
    asks = chosen(ask, "all", "category")
    images, annotations, categories = load_lists(path, "images", "annotations", "categories")
    names = {key: row.get("name") for key, row in by_id(categories).items()}

    def name_of(annotation: Any) -> str:
        name = names.get(field(annotation, "category_id", int))
        if not isinstance(name, str):
            raise BadRowError("fields", f"category {annotation['category_id']}: unknown")
        return name.replace("_", " ")

    def turns(entry: tuple[Any, list[Any]]) -> Iterator[Asked]:
        image, objects = entry
        size, picture = size_of(image), coco_picture(image, root)
        found: dict[str, list[Box]] = {}
        for annotation, box in good(_one_by_one(objects), lambda annotation: box_of(annotation, size)):
            found.setdefault(name_of(annotation), []).append(box)
        if found and "all" in asks:
            answer = ", ".join(format_region(Region(name, tuple(boxes))) for name, boxes in found.items())
            yield Asked(picture, prompts.detect_all(), answer, "all")
        for name, boxes in found.items() if "category" in asks else ():
            yield Asked(picture, prompts.detect_category(name), format_boxes(boxes))

    return pictures(images, annotations), turns


def people(path: Path, root: Path, *, ask: Any = ("people", "joints"), occluded: bool = False) -> Recipe:
    """People: their boxes, and of each the joints that are seen; with `occluded` also labelled ones that are not."""
    asks = chosen(ask, "people", "joints")
    images, annotations = load_lists(path, "images", "annotations")

    def turns(entry: tuple[Any, list[Any]]) -> Iterator[Asked]:
        image, persons = entry
        size, picture = size_of(image), coco_picture(image, root)
        found = good(_one_by_one(persons), lambda annotation: box_of(annotation, size))
        if found and "people" in asks:
            yield Asked(picture, prompts.detect_people(), format_boxes(box for _, box in found))
        for person, box in found if "joints" in asks else ():
            joints = _joints(field(person, "keypoints", list), size, 1 if occluded else 2)
            if joints:
                yield Asked(picture, prompts.key_points(box), ", ".join(map(format_region, joints)))

    return pictures(images, annotations), turns


def _joints(values: list[Any], size: tuple[int, int], least: int) -> list[Region]:
    """Of [x, y, v, ...] the joints inside the picture with v >= least: 0 not labelled, 1 hidden, 2 seen."""
    if len(values) != 3 * len(JOINTS) or not all(isinstance(v, int | float) for v in values):
        raise BadRowError("fields", f"'keypoints': expected {3 * len(JOINTS)} numbers")
    joints = zip(JOINTS, values[::3], values[1::3], values[2::3], strict=True)
    return [
        Region(name, points=(Point(x, y, "picture").to_square(*size),))
        for name, x, y, v in joints
        if v >= least and 0 <= x <= size[0] and 0 <= y <= size[1]
    ]
