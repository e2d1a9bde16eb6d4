"""The guess knows words only, and is the best constant for them."""

import inspect
from itertools import product
from random import Random

import numpy as np
import pytest

from sphinx_fast.data import scenes
from sphinx_fast.data.scene_grading import grade
from sphinx_fast.data.scene_questions import Question, questions
from sphinx_fast.evaluate import guess as guesses
from sphinx_fast.evaluate.guess import LEAST, Guess, best_box, groups, overlaps, template
from sphinx_fast.evaluate.items import LENGTHS, walk
from sphinx_fast.tasks.boxes import Box, iou, parse_boxes


@pytest.fixture(scope="module")
def guess() -> Guess:
    return Guess(400)


def test_it_is_a_function_of_task_and_prompt(guess: Guess, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(Guess.__call__).parameters) == ["self", "task", "prompt"]
    walked = [item for _, items in walk(tuple(LENGTHS), 3) for item in items]

    def unseen(*_: object, **__: object) -> None:
        raise AssertionError("a guess drew a scene")

    monkeypatch.setattr(guesses, "scene", unseen)
    monkeypatch.setattr(scenes, "scene", unseen)
    assert all(guess(item.question.task, item.question.prompt) for item in walked)


def test_it_learns_from_the_training_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        guesses, "scene", lambda seed, split: drawn.append((seed, split)) or scenes.scene(seed, split=split)
    )
    Guess(3)
    assert drawn == [(0, "train"), (1, "train"), (2, "train")]


def asked(task: str, prompt: str, answer: str, *boxes: tuple[float, float, float, float]) -> Question:
    return Question(task, "any", prompt, answer, boxes, ("thing",) * len(boxes))


def test_the_most_frequent_answer_to_the_same_prompt_else_to_the_template() -> None:
    guess = Guess(0)
    assert guess("vqa", "What color is the circle?") == ""
    guess.read(
        [asked("vqa", "What color is the circle?", "red")] * 3 + [asked("vqa", "What color is the star?", "blue")] * 9
    )
    assert guess("vqa", "What color is the circle?") == "blue"  # asked too seldom: the template decides
    guess.read([asked("vqa", "What color is the circle?", "pink")] * LEAST + [asked("vqa", "What?", "7")] * 500)
    assert guess("vqa", "What color is the circle?") == "pink"
    assert guess("vqa", "never asked") == "7"


def test_templates_leave_out_what_is_drawn() -> None:
    assert template("Is there a red circle in the image?") == template("Is there a black heart in the image?")
    assert template("How many crosses are there?") == template("How many rings are there?")
    assert template("a small red star at the top") != template("a large red star at the top")
    assert template("from [0.1,0.2,0.3,0.4].") == template("from [0.5,0.6,0.7,0.8].")
    assert groups("refer", "the word stop") == groups("refer", "the number 7")


def test_overlaps_are_ious() -> None:
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.random((12, 2, 2)), axis=1).reshape(12, 4)
    wanted = [[iou(Box(*a), Box(*b)) for b in boxes.tolist()] for a in boxes.tolist()]
    np.testing.assert_allclose(overlaps(boxes, boxes), wanted, atol=1e-12)


def test_the_best_box_is_hit_by_most() -> None:
    left, right = (0.0, 0.0, 0.3, 0.3), (0.6, 0.6, 0.9, 0.9)
    assert best_box([left, right, right]) == right
    sides = [(x, 0.0, x + 1.0, 1.0) for x in (0.0, 0.6)]
    assert best_box(sides) == pytest.approx((0.3, 0.0, 1.3, 1.0))  # the mean overlaps both, neither the other


def test_relations_and_joints_are_read_off_the_boxes(guess: Guess) -> None:
    found = [item.question for _, items in walk(("relation", "key_points"), 30) for item in items]
    by_task = {t: [grade(q, guess(t, q.prompt)) for q in found if q.task == t] for t in ("relation", "key_points")}
    relations = [q for q in found if q.task == "relation"]
    assert all(f" {q.kind} " in guess("relation", q.prompt) for q in relations)  # so only the names need seeing
    assert np.mean(by_task["relation"]) < 0.1
    assert 0.4 < np.mean(by_task["key_points"]) < 0.9


def test_it_is_better_than_any_one_answer_and_far_from_right(guess: Guess) -> None:
    found = [q for k in range(5000, 5300) for q in questions(scenes.scene(k), Random(k)) if q.task == "vqa"]
    ours = np.mean([grade(q, guess("vqa", q.prompt)) for q in found])
    constants = max(np.mean([grade(q, said) for q in found]) for said in {q.answer for q in found})
    assert constants < ours < 0.6


def test_every_task_gets_an_answer_in_its_form(guess: Guess) -> None:
    for _, items in walk(tuple(LENGTHS), 2):
        for item in items:
            task, said = item.question.task, guess(item.question.task, item.question.prompt)
            boxed = task in ("refer", "detect_all", "detect_category", "text_boxes", "grounded_caption", "defect")
            assert len(parse_boxes(said)) == boxed
            assert 0.0 <= grade(item.question, said) <= 1.0


def test_the_same_scenes_give_the_same_guesses() -> None:
    one, two = Guess(30), Guess(30)
    prompts = [(q.task, q.prompt) for k in range(5) for q in questions(scenes.scene(k, split="test"), Random(k))]
    assert [one(*p) for p, _ in product(prompts, range(2))] == [two(*p) for p in prompts for _ in range(2)]
