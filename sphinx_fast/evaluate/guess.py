"""The best guess without a picture: what questions in the same words are mostly answered, on training scenes.

A guess is a function of task and prompt. It has read the questions and answers of training scenes, and chooses for the
questions that are asked alike one constant answer, which does best on them:

    tasks with a short answer     the most frequent answer to the same prompt where that was asked LEAST times, else to
                                  the same template (colours, shapes, words, numbers and boxes left blank)
    ocr_vqa                       the reading that the prompt gives
    region_description            the most frequent answer for boxes of about this size and form
    refer                         of the training boxes of the template, their mean and their median, the one that the
                                  most of them overlap at IoU 0.5
    detect_category               the same, one box
    detect_all, text_boxes,       the same, one box, with the most frequent name
    grounded_caption, defect      (defect: always "yes", which is right for as many as "no", so that there is a box)
    caption, detailed_caption     the training caption with the best mean F1 against the others
    key_points                    the median place of each joint within the box that the prompt gives
    relation                      read off the two boxes that the prompt gives, between two things of the most
                                  frequent name
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from random import Random

import numpy as np
from tqdm import tqdm

from sphinx_fast.data.scene_drawing import COLOURS, SHAPES
from sphinx_fast.data.scene_grading import IOU, grade
from sphinx_fast.data.scene_questions import Question, box_text, questions
from sphinx_fast.data.scene_words import article
from sphinx_fast.data.scenes import SquareBox, scene
from sphinx_fast.tasks.boxes import Box, parse_boxes

LEAST = 50  # questions of a prompt before it is trusted more than its template
MOST = 400  # boxes or captions of a group that are compared with one another
SHORT = ("vqa", "read", "option_letter", "options", "unanswerable", "classify")
Boxes = Sequence[SquareBox]

_BLANKS = (
    (re.compile(rf"\b({'|'.join(COLOURS)})\b"), "<colour>"),
    (re.compile(rf"\b({'|'.join(SHAPES)})(e?s)?\b"), "<shape>"),
    (re.compile(r"\bthe (word|number) \w+"), "the word"),
    (re.compile(r"\[[0-9.,]*\]"), "<box>"),
)


def template(prompt: str) -> str:
    """The prompt with blanks for what differs from one scene to the next."""
    for pattern, blank in _BLANKS:
        prompt = pattern.sub(blank, prompt)
    return prompt


def form(box: Box) -> str:
    """Size and form of a box, coarsely: the longer side to a twentieth, width over height to a factor of 1.4."""
    width, height = (max(v, 0.01) for v in (box.x2 - box.x1, box.y2 - box.y1))
    return f"{round(20 * max(width, height))} {round(2 * np.log2(width / height))}"


def groups(task: str, prompt: str) -> list[str]:
    """Names of the groups of questions a prompt belongs to, the narrowest first."""
    if task == "region_description":
        return [form(box) for box in parse_boxes(prompt)[:1]] + [""]
    if task in SHORT:
        return [prompt, template(prompt), ""]
    return [template(prompt), ""]


def overlaps(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU [n, m] of boxes [n, 4] and [m, 4]."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (some, others)]
    return both / (areas[0][:, None] + areas[1][None] - both)


def best_box(boxes: Boxes) -> SquareBox:
    """Of the boxes, their mean and their median, the one that the most of them overlap at IoU 0.5."""
    seen = np.array(boxes[:MOST], float)
    tried = np.vstack([seen.mean(0), np.median(seen, 0), seen])
    x1, y1, x2, y2 = tried[(overlaps(tried, seen) >= IOU).sum(1).argmax()].tolist()
    return x1, y1, x2, y2


def _most_frequent(values: Sequence[str]) -> str:
    return Counter(values).most_common(1)[0][0]


def _typical_caption(asked: Sequence[Question]) -> str:
    """The caption that comes nearest to the others."""
    some = asked[:MOST]
    return max({q.answer for q in some}, key=lambda said: (sum(grade(q, said) for q in some), said))


def _joints(asked: Sequence[Question], prompt: str) -> str:
    """Each joint at its median place in the box of the prompt."""
    places = defaultdict(list)
    for q in asked:
        x1, y1, x2, y2 = q.boxes[0]
        for name, x, y in q.points:
            places[name].append(((x - x1) / (x2 - x1), (y - y1) / (y2 - y1)))
    box = parse_boxes(prompt)[0]
    said = []
    for name, seen in places.items():
        x, y = np.median(seen, 0).tolist()
        said.append(name + box_text((box.x1 + x * (box.x2 - box.x1), box.y1 + y * (box.y2 - box.y1))))
    return ", ".join(said)


def _relation(prompt: str) -> str:
    """Which way the middles of the two boxes are further apart, and on which side the first is."""
    a, b = parse_boxes(prompt)[:2]
    dx, dy = a.x1 + a.x2 - b.x1 - b.x2, a.y1 + a.y2 - b.y1 - b.y2
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _reading(prompt: str) -> str:
    """What the prompt says a reader of words has read, which is right more often than not."""
    found = re.search(r"OCR token: *([^\n]*)", prompt)
    return found[1] if found else ""


class Guess:
    """Guesses from the questions about the first `scenes` training scenes."""

    def __init__(self, scenes: int) -> None:
        self._asked: dict[tuple[str, str], list[Question]] = defaultdict(list)
        self._constants: dict[tuple[str, str], str] = {}
        for seed in tqdm(range(scenes), desc="guess", mininterval=5):
            self.read(questions(scene(seed, split="train"), Random(seed)))

    def read(self, asked: Sequence[Question]) -> None:
        """Learn from questions with their answers."""
        self._constants.clear()
        for q in asked:
            for group in groups(q.task, q.prompt):
                self._asked[q.task, group].append(q)

    def __call__(self, task: str, prompt: str) -> str:
        """The answer to a prompt; "" where the task was never asked."""
        known = [group for group in groups(task, prompt) if self._asked.get((task, group))]
        if not known:
            return ""
        group = next((g for g in known if len(self._asked[task, g]) >= LEAST), known[-1])
        asked = self._asked[task, group]
        if task == "relation":
            name = _most_frequent([name for q in asked for name in q.names])
            return f"{name} {_relation(prompt)} {name}"
        if task == "ocr_vqa":
            return _reading(prompt)
        if task == "key_points":
            return _joints(asked, prompt)
        if (task, group) not in self._constants:
            self._constants[task, group] = self._constant(task, asked)
        return self._constants[task, group]

    @staticmethod
    def _constant(task: str, asked: Sequence[Question]) -> str:
        """One answer to all these questions."""
        if task in (*SHORT, "region_description"):
            return _most_frequent([q.answer for q in asked])
        if task in ("caption", "detailed_caption"):
            return _typical_caption(asked)
        box = box_text(best_box([box for q in asked for box in q.boxes]))
        if task in ("refer", "detect_category"):
            return box
        name = _most_frequent([name for q in asked for name in q.names])
        return {"defect": f"yes, {article(name)}", "grounded_caption": f"<p>{name}</p>"}.get(task, name) + box
