"""Words for a place, and a place for words: RefCOCO, RefCOCO+ and RefCOCOg, Visual Genome, Flickr30k Entities."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sphinx_fast.data.annotations import Asked, Recipe, chosen, from_sides, good, size_of, square, tail
from sphinx_fast.data.coco import box_of, coco_picture, pictures
from sphinx_fast.data.record import BadRowError
from sphinx_fast.data.rows import by_id, field, load_json, load_lists, opening
from sphinx_fast.tasks import prompts
from sphinx_fast.tasks.boxes import Box, Region, format_region


def _about(picture: Path, words: str, box: Box, asks: tuple[str, ...]) -> Iterator[Asked]:
    words = words.strip()
    if not words.strip(" ."):
        raise BadRowError("fields", "an empty description")
    if "refer" in asks:
        yield Asked(picture, prompts.refer(words.rstrip(" .")), box.text(), "refer")
    if "describe" in asks:
        yield Asked(picture, prompts.region_description(box), words, "describe")


# --- RefCOCO ----------------------------------------------------------------------------------------------------------
def refcoco(path: Path, root: Path, *, ask: Any = "refer", split: str = "train", instances: Any = None) -> Recipe:
    """Referring expressions, in one of two forms:

    COCO's (`finetune_refcoco_train.json` of MDETR): every image entry is one expression, its `caption`, with one box.
    A list of refs ({"image_id", "ann_id", "split", "sentences": [{"sent"}]}), which is a dump of `refs(unc).p`; boxes
    and files come from `instances` (default: `instances.json` beside it). Only refs of this `split`.
    """
    asks = chosen(ask, "refer", "describe")
    table: Any = load_json(path, object)
    if isinstance(table, list):
        return _refs(table, root, asks, split, Path(instances or path.parent / "instances.json"))
    images, annotations = load_lists(path, "images", "annotations", table=table)

    def turns(entry: tuple[Any, list[Any]]) -> Iterator[Asked]:
        image, targets = entry
        size, words = size_of(image), field(image, "caption", str)
        if not targets:
            raise BadRowError("fields", "an expression without a box")
        yield from _about(coco_picture(image, root), words, box_of(targets[0], size), asks)

    return pictures(images, annotations), turns


def _refs(refs: list[Any], root: Path, asks: tuple[str, ...], split: str, instances: Path) -> Recipe:
    images, annotations = map(by_id, load_lists(instances, "images", "annotations"))

    def turns(ref: Any) -> Iterator[Asked]:
        ids = field(ref, "image_id", int), field(ref, "ann_id", int)
        if ids[0] not in images or ids[1] not in annotations:
            raise BadRowError("fields", f"image {ids[0]}, annotation {ids[1]}: not in {instances.name}")
        image = images[ids[0]]
        box = box_of(annotations[ids[1]], size_of(image))
        for sentence in field(ref, "sentences", list):
            yield from _about(coco_picture(image, root), field(sentence, "sent", str), box, asks)

    return (ref for ref in refs if not isinstance(ref, dict) or ref.get("split", split) == split), turns


# --- Visual Genome ----------------------------------------------------------------------------------------------------
def _genome(path: Path, root: Path, images: Any, key: str) -> tuple[Any, Any]:
    """(picture's number, row) of every row under `key`, and what finds a picture's file and size by its number."""
    sizes = by_id(load_json(Path(images or path.parent / "image_data.json"), list), "image_id")

    def rows() -> Iterator[tuple[Any, Any]]:
        for entry in load_json(path, list):
            inside = entry.get(key) if isinstance(entry, dict) else None
            number = entry.get("image_id", entry.get("id")) if isinstance(entry, dict) else None
            for row in inside if isinstance(inside, list) else [None]:
                yield (row.get("image_id", number) if isinstance(row, dict) else number), row

    def find(number: Any) -> tuple[Path, tuple[int, int]]:
        if number not in sizes:
            raise BadRowError("fields", f"image {number}: not in the list of images")
        return root / tail(field(sizes[number], "url", str)), size_of(sizes[number])

    return rows(), find


def _genome_box(row: dict[str, Any], size: tuple[int, int], sides: tuple[str, str]) -> Box:
    return square(from_sides([row.get(key) for key in ("x", "y", *sides)]), size)


def genome_regions(path: Path, root: Path, *, ask: Any = ("describe", "refer"), images: Any = None) -> Recipe:
    """`region_descriptions.json`; files and sizes from `images` (default: `image_data.json` beside it)."""
    asks = chosen(ask, "describe", "refer")
    rows, find = _genome(path, root, images, "regions")

    def turns(entry: tuple[Any, Any]) -> Iterator[Asked]:
        picture, size = find(entry[0])
        yield from _about(
            picture, field(entry[1], "phrase", str), _genome_box(entry[1], size, ("width", "height")), asks
        )

    return rows, turns


def genome_relations(path: Path, root: Path, *, images: Any = None) -> Recipe:
    """`relationships.json`: the predicate between two boxes, in lower case."""
    rows, find = _genome(path, root, images, "relationships")

    def turns(entry: tuple[Any, Any]) -> Iterator[Asked]:
        picture, size = find(entry[0])
        a, b = (_genome_box(field(entry[1], key, dict), size, ("w", "h")) for key in ("subject", "object"))
        yield Asked(picture, prompts.relation(a, b), field(entry[1], "predicate", str).lower())

    return rows, turns


# --- Flickr30k Entities -----------------------------------------------------------------------------------------------
_PHRASE = re.compile(r"\[/EN#([0-9]+)/[^\s\[\]]* ([^\[\]]*)\]")


def flickr30k(path: Path, root: Path) -> Recipe:
    """A folder with `Sentences/*.txt` and `Annotations/*.xml`: every sentence with the boxes of its phrases."""
    with opening(path):
        sentences = sorted((path / "Sentences").glob("*.txt"))
        if not sentences:
            raise ValueError("expected a folder with Sentences/*.txt and Annotations/*.xml")

    def turns(file: Path) -> Iterator[Asked]:
        annotation = path / "Annotations" / f"{file.stem}.xml"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            name, boxes = _entities(annotation.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
            raise BadRowError("not readable", f"{file.stem}: {error}") from error

        def tagged(phrase: re.Match[str]) -> str:
            found = boxes.get(phrase[1], [])
            return format_region(Region(phrase[2], tuple(found)), tags=True) if found else phrase[2]

        for line in lines:
            if line.strip():
                yield Asked(root / name, prompts.grounded_caption(), _PHRASE.sub(tagged, line.strip()))

    return sentences, turns


def _entities(xml: str) -> tuple[str, dict[str, list[Box]]]:
    """The picture's file, and the boxes of every number; entities of XML are refused, they can grow without end."""
    if "<!" in xml.replace("<!--", ""):
        raise BadRowError("not readable", "XML with a document type")
    tree = ElementTree.fromstring(xml)
    size = size_of({side: int(tree.findtext(f"size/{side}", "")) for side in ("width", "height")})

    def place(found: ElementTree.Element) -> Box:
        return square([float(found.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")], size)

    objects = [found for found in tree.findall("object") if found.find("bndbox") is not None]
    boxes: dict[str, list[Box]] = {}
    for found, box in good(objects, place):
        for number in found.findall("name"):
            boxes.setdefault(number.text or "", []).append(box)
    return tree.findtext("filename", ""), boxes
