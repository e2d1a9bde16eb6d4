"""Short answers: VQAv2, OK-VQA, GQA, A-OKVQA, OCR-VQA and TextVQA; captions: TextCaps and COCO; classes: ImageNet.

Pictures are found by a template that the fields of a row fill, the option `picture`. Where several people answered, the
answer most of them gave is taken; among equals, the first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sphinx_fast.data.annotations import Asked, Recipe, chosen, named
from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.rows import Lines, Memory, Reader, by_id, conversation, field, load_json, load_lists, opening
from sphinx_fast.tasks import prompts

COCO_2014 = "COCO_train2014_{image_id:012d}.jpg"
COCO_2017 = "{image_id:012d}.jpg"


def most_common(answers: Iterable[Any]) -> str:
    texts = [answer.strip() for answer in answers if isinstance(answer, str) and answer.strip()]
    if not texts:
        raise BadRowError("no answer", "nobody answered")
    return Counter(texts).most_common(1)[0][0]


def vqa(path: Path, root: Path, *, annotations: Any, picture: str = COCO_2014) -> Recipe:
    """VQAv2 and OK-VQA: a file of questions, and one of `annotations` with the answers of ten people."""
    questions = load_lists(path, "questions")[0]
    answers = by_id(load_lists(Path(annotations), "annotations")[0], "question_id")

    def turns(row: Any) -> Iterator[Asked]:
        number, question = field(row, "question_id", int), field(row, "question", str)
        if number not in answers:
            raise BadRowError("no answer", f"question {number}: no annotation")
        given = (one.get("answer") for one in field(answers[number], "answers", list) if isinstance(one, dict))
        yield Asked(named(picture, row, root), prompts.short_answer(question), most_common(given))

    return questions, turns


def gqa(path: Path, root: Path, *, picture: str = "{imageId}.jpg") -> Recipe:
    """GQA: an object of questions by number."""

    def turns(row: Any) -> Iterator[Asked]:
        question = prompts.short_answer(field(row, "question", str))
        yield Asked(named(picture, row, root), question, field(row, "answer", str))

    return load_json(path, dict).values(), turns


def aokvqa(path: Path, root: Path, *, ask: Any = ("direct", "choice"), picture: str = COCO_2017) -> Recipe:
    """A-OKVQA: asked directly, and with its four choices, which is another conversation."""
    asks = chosen(ask, "direct", "choice")

    def turns(row: Any) -> Iterator[Asked]:
        file, question = named(picture, row, root), field(row, "question", str)
        if "direct" in asks:
            answer = most_common(field(row, "direct_answers", list))
            yield Asked(file, prompts.short_answer(question), answer, "direct")
        if "choice" in asks:
            choices, right = field(row, "choices", list), field(row, "correct_choice_idx", int)
            if not 0 <= right < len(choices) <= 26 or not all(isinstance(choice, str) for choice in choices):
                raise BadRowError("fields", f"choice {right} of {len(choices)}")
            yield Asked(file, prompts.option_letter(question, choices), chr(ord("A") + right), "choice")

    return load_json(path, list), turns


def ocr_vqa(path: Path, root: Path, *, split: int = 1) -> Recipe:
    """OCR-VQA's `dataset.json`: books by key; a picture is the key and its URL's suffix. Split 1 is training."""

    def turns(entry: tuple[str, Any]) -> Iterator[Asked]:
        key, row = entry
        file = root / (key + (Path(row.get("imageURL") or "").suffix or ".jpg"))
        questions, answers = field(row, "questions", list), field(row, "answers", list)
        if len(questions) != len(answers) or not all(isinstance(text, str) for text in questions + answers):
            raise BadRowError("fields", f"{len(questions)} questions, {len(answers)} answers")
        for question, answer in zip(questions, answers, strict=True):
            yield Asked(file, prompts.short_answer(question), answer)

    books = load_json(path, dict).items()
    return (entry for entry in books if not isinstance(entry[1], dict) or entry[1].get("split", split) == split), turns


def textvqa(path: Path, root: Path, *, ocr: Any = None, picture: str = "{image_id}.jpg") -> Recipe:
    """TextVQA. What the picture says is given with the question: `ocr_tokens` of the row, or of the file `ocr`."""
    read = by_id(load_lists(Path(ocr), "data")[0], "image_id") if ocr else {}

    def turns(row: Any) -> Iterator[Asked]:
        file, question = named(picture, row, root), field(row, "question", str)
        source = row if "ocr_tokens" in row else read.get(field(row, "image_id", str), {"ocr_tokens": []})
        tokens = [token for token in field(source, "ocr_tokens", list) if isinstance(token, str) and token]
        asked = prompts.ocr_vqa(question, ", ".join(tokens)) if tokens else prompts.short_answer(question)
        yield Asked(file, asked, most_common(field(row, "answers", list)))

    return load_lists(path, "data")[0], turns


def textcaps(path: Path, root: Path, *, picture: str = "{image_id}.jpg") -> Recipe:
    """TextCaps: five captions of a picture, which are five conversations."""

    def turns(row: Any) -> Iterator[Asked]:
        yield Asked(named(picture, row, root), prompts.caption(), field(row, "caption_str", str))

    return load_lists(path, "data")[0], turns


def captions(path: Path, root: Path) -> Recipe:
    """Captions as COCO writes them; every caption of a picture is a conversation of its own."""
    images, annotations = load_lists(path, "images", "annotations")
    pictures = by_id(images)

    def turns(row: Any) -> Iterator[Asked]:
        image, text = pictures.get(field(row, "image_id", int)), field(row, "caption", str)
        yield Asked(root / field(image, "file_name", str), prompts.caption(), text)

    return annotations, turns


# --- ImageNet ---------------------------------------------------------------------------------------------------------
def classes(path: Path, root: Path, *, names: Any = None) -> Reader:
    """A folder of one folder for each class, or lines `picture<tab>class`: "This is a tench".

    `names` is a file of lines `n01440764 tench, Tinca tinca`, whose first name a class is called by; without it a class
    is called as it is written, underscores as spaces.
    """
    read = partial(_classified, root=path if path.is_dir() else root, names=_names(names))
    if path.is_dir():
        return Memory(path, partial(_pictures_of, path), read)
    return Lines(path, read)


def _names(file: Any) -> dict[str, str]:
    if file is None:
        return {}
    with opening(Path(file)):
        pairs = (line.split(maxsplit=1) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip())
        return {pair[0]: pair[1].split(",")[0].strip() for pair in pairs}


def _pictures_of(path: Path) -> list[bytes]:
    """`class/picture<tab>class` of every picture, in order."""
    with opening(path):
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        found = [
            f"{folder}/{name}\t{folder}".encode(errors="surrogateescape")
            for folder in folders
            for name in sorted(os.listdir(path / folder))
            if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))
        ]
        if not found:
            raise ValueError("expected folders of pictures, one for each class")
    return found


def _classified(line: bytes, root: Path, names: dict[str, str]) -> Conversation:
    try:
        picture, tab, label = line.decode().strip("\r\n").partition("\t")
    except UnicodeDecodeError as error:
        raise BadRowError("not readable", "no UTF-8") from error
    label = label.strip()
    if not tab or not picture or not label:
        raise BadRowError("fields", "expected picture<tab>class")
    name = names.get(label, label.replace("_", " "))
    return conversation([(prompts.classify(), f"This is a {name}")], root / picture)
