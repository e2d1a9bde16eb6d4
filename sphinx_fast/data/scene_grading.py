"""Grades for answers to questions about scenes, 0 to 1.

vqa, read, relation, region_description    1 for the same words, apart from case, articles, stops, "two" for "2"; so
                                           "Unanswerable", a reference from OCR and a class
option_letter, options                     1 for the letter, alone or before a stop: "A", "(A)", "A. circle"
refer                                      1 where the first box has IoU >= 0.5 with the right one
detect_all, detect_category, text_boxes,   F1 of boxes paired one to one at IoU >= 0.5 (and of one name, where names
grounded_caption                           are asked for)
key_points                                 share of joints within a tenth of the longer side of the person's box
caption, detailed_caption                  F1 of the words, articles left out
defect                                     no: 1 for "no"; yes: 1 where the first box has IoU >= 0.5
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from sphinx_fast.data.scene_questions import Question
from sphinx_fast.data.scene_words import NUMERALS
from sphinx_fast.tasks.boxes import Box, first_box, iou, parse_boxes, parse_key_points, parse_regions

_DROPPED = {"a", "an", "the", "and"}
_DIGITS = {word: str(n) for n, word in enumerate(NUMERALS) if n}
IOU, REACH = 0.5, 0.1
_LETTER = re.compile(r"\(?([A-Z])\)?(?:[.:,].*)?", re.DOTALL)


def plain_words(text: str) -> list[str]:
    """Lower-case words and numbers without articles; number words become digits."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    return [_DIGITS.get(w, w) for w in found if w not in _DROPPED]


def f1(right: int, said: int, wanted: int) -> float:
    """2 right / (said + wanted); 1 where nothing was wanted and nothing said."""
    return 2 * right / (said + wanted) if said + wanted else 1.0


def _words_f1(answer: str, truth: str) -> float:
    said, wanted = Counter(plain_words(answer)), Counter(plain_words(truth))
    return f1((said & wanted).total(), said.total(), wanted.total())


def _box_hits(answer: str, question: Question) -> float:
    """1 where the first box of the answer overlaps the right one enough."""
    said = first_box(answer)
    return float(said is not None and iou(said, Box(*question.boxes[0])) >= IOU)


def _boxes_f1(said: Sequence[tuple[str, Box]], wanted: Sequence[tuple[str, Box]]) -> float:
    """F1 after pairing the boxes greedily, best overlap first; names must agree in their plain words."""
    overlaps = sorted(
        (
            (iou(a, b), i, j)
            for i, (name, a) in enumerate(said)
            for j, (truth, b) in enumerate(wanted)
            if plain_words(name) == plain_words(truth)
        ),
        key=lambda pair: -pair[0],
    )
    mine, theirs = set[int](), set[int]()
    for overlap, i, j in overlaps:
        if overlap >= IOU and i not in mine and j not in theirs:
            mine.add(i)
            theirs.add(j)
    return f1(len(mine), len(said), len(wanted))


def joints_near(answer: str, question: Question, reach: float = REACH) -> float:
    """Share of the joints that are within `reach` of the longer side of the person's box."""
    x1, y1, x2, y2 = question.boxes[0]
    near, said = reach * max(x2 - x1, y2 - y1), parse_key_points(answer)
    hits = [name in said and math.hypot(said[name].x - x, said[name].y - y) <= near for name, x, y in question.points]
    return sum(hits) / len(hits)


def grade(question: Question, answer: str) -> float:
    """How right an answer is, 0 to 1 (see the top of this file)."""
    if question.task == "refer":
        return _box_hits(answer, question)
    if question.task in ("option_letter", "options"):  # "A" is no article here
        letter = _LETTER.fullmatch(answer.strip())
        return float(letter is not None and letter[1] == question.answer)
    if question.task == "key_points":
        return joints_near(answer, question)
    if question.task in ("caption", "detailed_caption"):
        return _words_f1(answer, question.answer)
    if question.task == "defect":
        says_no = plain_words(answer)[:1] == ["no"]
        return float(says_no) if not question.boxes else (0.0 if says_no else _box_hits(answer, question))
    if question.task == "detect_category":
        return _boxes_f1([("", b) for b in parse_boxes(answer)], [("", Box(*b)) for b in question.boxes])
    if question.task in ("detect_all", "text_boxes", "grounded_caption"):
        said = [(region.name, box) for region in parse_regions(answer) for box in region.boxes]
        return _boxes_f1(said, [(n, Box(*b)) for n, b in zip(question.names, question.boxes, strict=True)])
    return float(plain_words(answer) == plain_words(question.answer))
