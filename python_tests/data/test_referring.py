"""RefCOCO in both forms, Visual Genome's regions and relations, Flickr30k Entities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphinx_fast.data.record import BadRowError
from sphinx_fast.data.rows import Reader
from sphinx_fast.data.sources import open_source

REFER = "Please provide the bounding box coordinate of the region this sentence describes: {}."
DESCRIBE = "Please provide a short description for this region: {}."


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def bad(source: Reader, index: int = 0) -> str:
    with pytest.raises(BadRowError, match=r"^[^\n]+:\d+: [^\n]+$") as caught:
        source[index]
    return caught.value.kind


# --- RefCOCO ----------------------------------------------------------------------------------------------------------
def test_refcoco_as_coco(tmp_path: Path) -> None:
    """One image entry for each expression; those of one picture are one conversation."""
    common = {"file_name": "COCO_train2014_000000581857.jpg", "height": 480, "width": 640, "original_id": 581857}
    images = [
        common | {"id": 1, "caption": "the lady with the blue shirt", "dataset_name": "refcoco"},
        common | {"id": 2, "caption": "Left one. "},
        common | {"id": 3, "caption": "nobody"},
        common | {"id": 4, "caption": "nowhere"},
    ]
    boxes = [[320.0, 160.0, 160.0, 80.0], [0.0, 0.0, 64.0, 64.0], [700.0, 0.0, 9.0, 9.0]]
    annotations = [
        {"id": n, "image_id": n, "bbox": box, "category_id": 1, "iscrowd": 0, "tokens_positive": [[0, 8]], "area": 1.0}
        for n, box in zip((1, 2, 4), boxes, strict=True)
    ]
    path = put(
        tmp_path / "finetune_refcoco_train.json", {"images": images, "annotations": annotations, "categories": []}
    )
    (tmp_path / common["file_name"]).touch()
    source = open_source("refcoco", path)
    assert len(source) == 3 and source[0].picture == tmp_path / common["file_name"]
    assert source[0].turns == (
        (REFER.format("the lady with the blue shirt"), "[0.50,0.38,0.75,0.50]"),
        (REFER.format("Left one"), "[0.00,0.12,0.10,0.23]"),
    )
    assert bad(source, 1) == "fields" and bad(source, 2) == "box"
    describe = open_source("refcoco", path, ask="describe")
    assert describe[0].turns[1] == (DESCRIBE.format("[0.00,0.12,0.10,0.23]"), "Left one.")


def test_refcoco_as_refs(tmp_path: Path) -> None:
    put(
        tmp_path / "instances.json",
        {
            "images": [{"id": 581857, "file_name": "a.jpg", "height": 200, "width": 100}],
            "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [0, 100, 50, 50], "category_id": 1}],
        },
    )
    sentences = [{"sent": "left guy", "raw": "Left guy!", "tokens": ["left", "guy"], "sent_id": 0}, {"sent": "him"}]
    ref = {"ref_id": 0, "image_id": 581857, "ann_id": 1719310, "split": "train", "category_id": 1}
    ref |= {"file_name": "COCO_train2014_000000581857_16.jpg", "sent_ids": [0, 1], "sentences": sentences}
    path = put(tmp_path / "refs.json", [ref, ref | {"split": "testA"}, ref | {"ann_id": 1}, ref | {"sentences": [{}]}])
    (tmp_path / "a.jpg").touch()
    source = open_source("refcoco", path, ask=("refer", "describe"))
    box = "[0.25,0.50,0.50,0.75]"
    assert source[0].turns == ((REFER.format("left guy"), box), (REFER.format("him"), box))
    # The same place is not asked for twice in one conversation.
    assert source[1].turns == ((DESCRIBE.format(box), "left guy"),) and source[2].turns == (
        (DESCRIBE.format(box), "him"),
    )
    assert len(source) == 5 and bad(source, 3) == bad(source, 4) == "fields"
    assert len(open_source("refcoco", path, split="testA")) == 1
    with pytest.raises(ValueError, match="ask: expected some of refer, describe, got 'all'"):
        open_source("refcoco", path, ask="all")


# --- Visual Genome ----------------------------------------------------------------------------------------------------
def genome(folder: Path) -> None:
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    put(folder / "image_data.json", [{"image_id": 1, "url": url, "width": 800, "height": 600, "coco_id": None}])
    put(folder / "VG_100K_2" / "1.jpg", "")


def test_genome_regions(tmp_path: Path) -> None:
    genome(tmp_path)
    region = {"region_id": 1382, "image_id": 1, "width": 200, "height": 100, "x": 400, "y": 300}
    regions = [
        region | {"phrase": "the clock is green in colour"},
        region | {"x": 700, "phrase": "A wall."},  # cut at the edge
        region | {"x": 900, "phrase": "outside"},
        region | {"phrase": " "},
        region | {"image_id": 2, "phrase": "of no picture"},
        region | {"x": None, "phrase": "p"},
    ]
    path = put(tmp_path / "region_descriptions.json", [{"id": 1, "regions": regions}, {"id": 3}, 7])
    source = open_source("genome_regions", path)
    boxes = "[0.50,0.50,0.75,0.62]", "[0.88,0.50,1.00,0.62]"
    assert source[0].picture == tmp_path / "VG_100K_2/1.jpg"
    assert source[0].turns == (
        (REFER.format("the clock is green in colour"), boxes[0]),
        (REFER.format("A wall"), boxes[1]),
    )
    assert source[1].turns == (
        (DESCRIBE.format(boxes[0]), "the clock is green in colour"),
        (DESCRIBE.format(boxes[1]), "A wall."),
    )
    assert [bad(source, i) for i in range(2, len(source))] == ["box", "fields", "fields", "box", "fields", "fields"]


def test_genome_relations(tmp_path: Path) -> None:
    genome(tmp_path)
    man = {"name": "man", "h": 100, "w": 200, "x": 0, "y": 0, "object_id": 5}
    street = {"names": ["street"], "h": 300, "w": 800, "x": 0, "y": 300, "object_id": 6}
    relation = {
        "predicate": "ON",
        "subject": man,
        "object": street,
        "relationship_id": 15927,
        "synsets": ["along.r.01"],
    }
    relations = [relation, relation | {"subject": man | {"w": 0}}, relation | {"object": None}]
    path = put(tmp_path / "relationships.json", [{"image_id": 1, "relationships": relations}])
    source = open_source("genome_relations", path)
    question = (
        "What is the relationship between the object in [0.00,0.12,0.25,0.25] and the object in [0.00,0.50,1.00,0.88]?"
    )
    assert source[0].turns == ((question, "on"),)
    assert bad(source, 1) == "box" and bad(source, 2) == "fields" and len(source) == 3


# --- Flickr30k Entities -----------------------------------------------------------------------------------------------
def entity(*numbers: int, box: tuple[int, int, int, int] | None = None) -> str:
    names = "".join(f"<name>{number}</name>" for number in numbers)
    if box is None:
        return f"<object>{names}<scene>1</scene><nobndbox>1</nobndbox></object>"
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>{names}<bndbox>{corners}</bndbox></object>"


def flickr(folder: Path, sentences: str, objects: str, head: str = "", number: int = 1000092795) -> Path:
    size = "<size><width>250</width><height>500</height><depth>3</depth></size>"
    xml = f"{head}<annotation><!-- one --><filename>{number}.jpg</filename>{size}{objects}</annotation>"
    put(folder / "Annotations" / f"{number}.xml", xml)
    put(folder / "Sentences" / f"{number}.txt", sentences)
    put(folder / "images" / f"{number}.jpg", "")
    return folder


def test_flickr30k(tmp_path: Path) -> None:
    sentences = (
        "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] stand [/EN#3/scene outside] .\n"
        "[/EN#1/people Two men] near [/EN#4/people/clothing a wall] .\n"
    )
    objects = (
        entity(1, 2, box=(0, 0, 125, 250))
        + entity(1, box=(125, 250, 250, 500))
        + entity(3)
        + entity(4, box=(300, 0, 400, 10))  # outside: the phrase has no box
    )
    source = open_source("flickr30k", flickr(tmp_path, sentences, objects), root=tmp_path / "images")
    question = "Describe the image concisely. Include the bounding box for each mentioned object."
    two, one = "[0.25,0.00,0.50,0.50];[0.50,0.50,0.75,1.00]", "[0.25,0.00,0.50,0.50]"
    first = f"<p>Two young guys</p>{two} with <p>shaggy hair</p>{one} stand outside ."
    assert len(source) == 2 and source[0].picture == tmp_path / "images" / "1000092795.jpg"
    assert source[0].turns == ((question, first),)
    assert source[1].turns == ((question, f"<p>Two men</p>{two} near a wall ."),)


@pytest.mark.parametrize(
    ("kind", "head", "objects"),
    [
        ("not readable", '<!DOCTYPE a [<!ENTITY x "y">]>', ""),
        ("not readable", "", "<object>"),
        ("box", "", entity(1, box=(9, 9, 9, 9))),
        ("fields", "", entity(1, box=(9, 9, 10, 10)).replace("10", "ten")),
    ],
)
def test_bad_xml(tmp_path: Path, kind: str, head: str, objects: str) -> None:
    assert bad(open_source("flickr30k", flickr(tmp_path, "A [/EN#1/x thing]", objects, head))) == kind


def test_no_flickr_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder with Sentences"):
        open_source("flickr30k", tmp_path)
