"""Short answers, captions and classes: each data set's own form, and what it becomes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sphinx_fast.data.record import BadRowError
from sphinx_fast.data.rows import Reader
from sphinx_fast.data.sources import open_source

SHORT = "\nAnswer the question using a single word or phrase."


def put(path: Path, content: Any, *pictures: str) -> Path:
    path.write_text(json.dumps(content))
    for picture in pictures:
        (path.parent / picture).touch()
    return path


def bad(source: Reader, index: int) -> str:
    with pytest.raises(BadRowError, match=r"^[^\n]+:\d+: [^\n]+$") as caught:
        source[index]
    return caught.value.kind


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, 1)]


def vqa(folder: Path) -> Reader:
    questions = [
        {"image_id": 458752, "question": "What is this?", "question_id": 458752000},
        {"image_id": 262146, "question": "Where?", "question_id": 262146000},
        {"image_id": 458752, "question": "What colour?", "question_id": 458752001},
        {"image_id": 458752, "question": "No answer?", "question_id": 458752002},
        {"image_id": "x", "question": "No number?", "question_id": 458752001},
        {"image_id": 458752, "question": "Empty?", "question_id": 458752003},
        {"image_id": 458752, "question": None, "question_id": 458752003},
        "question",
    ]
    annotations = [
        {"question_id": 458752001, "image_id": 458752, "answers": answers("blue", "red", "red")},
        {"question_id": 458752000, "multiple_choice_answer": "cat", "answers": answers("dog", "cat", "cat ", "dog")},
        {"question_id": 262146000, "answers": answers("here")},
        {"question_id": 458752003, "answers": answers(" ", "")},
    ]
    put(folder / "q.json", {"info": {}, "data_subtype": "train2014", "questions": questions})
    put(folder / "a.json", {"annotations": annotations})
    for number in (458752, 262146):
        (folder / f"COCO_train2014_{number:012d}.jpg").touch()
    return open_source("vqa", folder / "q.json", annotations=folder / "a.json")


def test_vqa(tmp_path: Path) -> None:
    """The most common answer, the first of equals; the questions of a picture are one conversation."""
    source = vqa(tmp_path)
    assert source[0].turns == (("What is this?" + SHORT, "dog"), ("What colour?" + SHORT, "red"))
    assert source[0].picture == tmp_path / "COCO_train2014_000000458752.jpg" and source[0].name == "q.json:0"
    assert source[1].turns == (("Where?" + SHORT, "here"),) and source[1].name == "q.json:1"
    kinds = [bad(source, i) for i in range(2, len(source))]
    assert kinds == ["no answer", "fields", "no answer", "fields", "fields"]
    with pytest.raises(ValueError, match="missing option annotations"):
        open_source("vqa", tmp_path / "q.json")


def test_gqa(tmp_path: Path) -> None:
    row = {"imageId": "2354786", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No, it is not."}
    table = {"02930152": row, "07333408": row | {"question": "Who?", "answer": "girl"}, "1": row | {"answer": None}}
    source = open_source("gqa", put(tmp_path / "train.json", table, "2354786.jpg"))
    assert source[0].turns == (("Is it overcast?" + SHORT, "no"), ("Who?" + SHORT, "girl"))
    assert bad(source, 1) == "fields" and len(source) == 2


def test_aokvqa(tmp_path: Path) -> None:
    row = {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What will he do?",
    }
    row |= {"choices": ["ride", "shoes", "boot", "walk"], "correct_choice_idx": 3}
    row |= {"direct_answers": ["ride", "walk", "walk"], "difficult_direct_answer": False, "rationales": ["r"]}
    source = open_source("aokvqa", put(tmp_path / "a.json", [row, row | {"correct_choice_idx": 4}], "000000299207.jpg"))
    options = "\nA. ride\nB. shoes\nC. boot\nD. walk\n"
    letter = "Answer with the option's letter from the given choices directly."
    assert source[0].turns == (("What will he do?" + SHORT, "walk"),)
    assert source[1].turns == (("What will he do?" + options + letter, "D"),)
    assert bad(source, 2) == "fields" and len(source) == 3
    assert len(open_source("aokvqa", tmp_path / "a.json", ask="direct")) == 2  # asked twice: two conversations


def test_ocr_vqa(tmp_path: Path) -> None:
    book = {"imageURL": "http://ecx.images-amazon.com/images/I/51l6XIoa3rL.png", "split": 1, "title": "T"}
    book |= {"questions": ["Who?", "Is it?"], "answers": ["Sandra", "Yes"], "genre": "Calendars"}
    table = {"0761183272": book, "2": book | {"split": 2}, "3": book | {"answers": ["one"]}, "4": 4}
    source = open_source("ocr_vqa", put(tmp_path / "dataset.json", table, "0761183272.png", "2.png"))
    assert source[0].turns == (("Who?" + SHORT, "Sandra"), ("Is it?" + SHORT, "Yes"))
    assert source[0].picture == tmp_path / "0761183272.png" and len(source) == 3
    assert [bad(source, i) for i in (1, 2)] == ["fields", "fields"]
    assert open_source("ocr_vqa", tmp_path / "dataset.json", split=2)[0].picture == tmp_path / "2.png"


def test_textvqa(tmp_path: Path) -> None:
    row = {"image_id": "0054c91397f2fe05", "question_id": 0, "question": "what brand?", "set_name": "train"}
    row |= {"answers": ["nous les gosses", "dakota", "dakota"], "image_width": 1024}
    rows = [row | {"ocr_tokens": ["DAKOTA", "DIGITAL"]}, row | {"ocr_tokens": []}, row | {"question": "read?"}]
    path = put(tmp_path / "t.json", {"dataset_name": "textvqa", "data": rows}, "0054c91397f2fe05.jpg")
    source = open_source("textvqa", path)
    with_ocr = "what brand?\nReference OCR token: DAKOTA, DIGITAL" + SHORT
    assert source[0].turns == ((with_ocr, "dakota"), ("what brand?" + SHORT, "dakota"), ("read?" + SHORT, "dakota"))
    ocr = put(tmp_path / "ocr.json", {"data": [{"image_id": "0054c91397f2fe05", "ocr_tokens": ["A"], "ocr_info": []}]})
    asked = open_source("textvqa", path, ocr=ocr)[0].turns[2][0]
    assert asked == "read?\nReference OCR token: A" + SHORT


def test_captions(tmp_path: Path) -> None:
    """Captions of one picture answer the same question, so each is its own conversation."""
    rows = [
        {"image_id": "a1", "caption_str": text, "caption_id": i} for i, text in enumerate(("A sign.", "A red sign."))
    ]
    textcaps = open_source("textcaps", put(tmp_path / "t.json", {"data": rows}, "a1.jpg"))
    assert [textcaps[i].turns for i in range(2)] == [
        (("Describe the image concisely.", row["caption_str"]),) for row in rows
    ]
    coco = {
        "images": [{"id": 9, "file_name": "a1.jpg"}],
        "annotations": [{"image_id": 9, "id": 1, "caption": "A cat. "}, {"image_id": 8, "id": 2, "caption": "A dog."}],
    }
    captions = open_source("captions", put(tmp_path / "c.json", coco))
    assert captions[0].turns == (("Describe the image concisely.", "A cat."),) and bad(captions, 1) == "fields"


def test_classes_of_folders(tmp_path: Path) -> None:
    for name in ("n01440764/b.JPEG", "n01440764/a.jpg", "great_white_shark/c.png", "great_white_shark/notes.txt"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    (tmp_path / "names.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    source = open_source("classes", tmp_path / "train", names=str(tmp_path / "names.txt"))
    said = ["great white shark", "tench", "tench"]
    assert [source[i].turns for i in range(len(source))] == [
        (("Classify the image.", f"This is a {name}"),) for name in said
    ]
    assert source[1].picture == tmp_path / "train/n01440764/a.jpg"
    os.mkdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected folders of pictures"):
        open_source("classes", tmp_path / "empty")


def test_classes_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_bytes(b"a.jpg\ttench\r\n\nb.jpg\nc.jpg\t\n\xff\tx\nb.jpg\thouse_finch\n")
    (tmp_path / "a.jpg").touch()
    source = open_source("classes", tmp_path / "list.tsv")
    assert source[0].turns == (("Classify the image.", "This is a tench"),) and source[0].name == "list.tsv:1"
    assert [bad(source, i) for i in range(1, 5)] == ["fields", "fields", "not readable", "no picture"]
