"""What a model is asked: held-out scenes, one question of each task about each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from sphinx_fast.data.scene_drawing import HELD_OUT_NAMES
from sphinx_fast.data.scene_questions import Question, questions
from sphinx_fast.data.scene_words import count_of
from sphinx_fast.data.scenes import Scene, scene

LENGTHS = {  # new tokens an answer may take
    "vqa": 6,
    "pope": 6,
    "read": 6,
    "refer": 14,
    "region_description": 8,
    "relation": 20,
    "caption": 48,
    "defect": 20,
    "detect_category": 90,
    "detect_all": 90,
    "text_boxes": 60,
    "key_points": 90,
    "grounded_caption": 180,
    "option_letter": 6,
    "options": 6,
    "unanswerable": 12,
    "ocr_vqa": 6,
    "classify": 16,
    "detailed_caption": 180,
}
MAIN_TASKS = ("vqa", "refer")
UNSEEN_TASKS = ("vqa", "refer", "region_description")  # whose question can be about one held-out thing


@dataclass(frozen=True)
class Item:
    """A question that counts for a task.

    task     a key of LENGTHS: the question's own, or "pope" for its yes/no questions in pairs
    seed     of the scene: what is asked about one scene belongs together
    setting  for pope where the pair's "no" comes from: "random", or "adversarial": colour and shape are both there, but
             not together
    """

    task: str
    question: Question
    seed: int
    setting: str = ""


def about_held_out(question: Question) -> bool:
    """Whether a question is about a shape and colour that training never showed together; a count, about none else."""
    told = [any(f" {held} " in f" {name} " for held in HELD_OUT_NAMES) for name in question.names]
    return all(told) and bool(told) if question.kind == "count" else any(told)


def _setting(s: Scene, absent: str) -> str:
    colour, _, shape = absent.rpartition(" ")
    return "adversarial" if colour and count_of(s, f"{colour} shape") and count_of(s, shape) else "random"


def _pope(s: Scene, asked: Sequence[Question]) -> list[Item]:
    """The scene's pair of yes/no questions, the one answered yes first."""
    yes, no = ([q for q in asked if q.kind == "yes/no" and q.answer == answer] for answer in ("yes", "no"))
    if not yes or not no:
        return []
    setting = _setting(s, no[0].names[0])
    return [Item("pope", q, s.seed, setting) for q in (yes[0], no[0])]


def items_about(s: Scene, tasks: Iterable[str]) -> list[Item]:
    """For each task a question about the scene, the one `examples` picks; in "unseen" one about a held-out thing."""
    rng = Random(s.seed)
    asked = questions(s, rng)
    if s.split == "unseen":
        asked = [q for q in asked if about_held_out(q)]
    state, items = rng.getstate(), []
    for task in tasks:
        if task == "pope":
            items += _pope(s, asked)
        elif found := [q for q in asked if q.task == task]:
            rng.setstate(state)
            items.append(Item(task, rng.choice(found), s.seed))
    return items


def walk(
    tasks: Sequence[str], scenes: int, *, split: str = "test", domain: str = "clean"
) -> Iterator[tuple[Scene, list[Item]]]:
    """Scenes of the seeds 0, 1, ... with what is asked about each, until every task has been asked about `scenes`.

    Raises:
        ValueError: a task that there is none of, or that says nothing about the split.
    """
    known = UNSEEN_TASKS if split == "unseen" else tuple(LENGTHS)
    if wrong := [task for task in tasks if task not in known]:
        raise ValueError(f"tasks of the split {split}: expected some of {', '.join(known)}, got {wrong[0]}")
    left = dict.fromkeys(tasks, scenes)
    for seed in itertools.count():
        wanted = [task for task, count in left.items() if count > 0]
        if not wanted:
            return
        s = scene(seed, split=split, domain=domain)
        items = items_about(s, wanted)
        for task in {item.task for item in items}:
            left[task] -= 1
        if items:
            yield s, items
