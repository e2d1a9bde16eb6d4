"""Grades: the right answer gets 1, wrong ones what the rules say."""

from random import Random

import pytest

from sphinx_fast.data.scene_grading import grade
from sphinx_fast.data.scene_questions import Question, questions
from sphinx_fast.data.scenes import KINDS, scene

ASKED = [q for kind in KINDS for k in range(20) for q in questions(scene(k, kind=kind), Random(k))]
BOX, OTHER = (0.1, 0.2, 0.5, 0.6), (0.6, 0.6, 0.9, 0.9)


def test_the_right_answer_is_right() -> None:
    assert [q for q in ASKED if grade(q, q.answer) != 1.0] == []


@pytest.mark.parametrize("answer", ["", "?", "[", "]][[", "no idea", "[0.1,0.2]", "yes " * 50, "[nan,nan,nan,nan]"])
def test_nonsense_is_wrong_and_harmless(answer: str) -> None:
    assert not [(q, answer) for q in ASKED if q.answer != "no" and not 0.0 <= grade(q, answer) < 1.0]


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("2", "Two.", 1.0),
        ("2", "3", 0.0),
        ("red", "It is red", 0.0),
        ("red", " Red.\n", 1.0),
        ("yes", "Yes", 1.0),
        ("yes", "no", 0.0),
        ("left of", "Left of", 1.0),
    ],
)
def test_short_answers(answer: str, said: str, right: float) -> None:
    assert grade(Question("vqa", "any", "?", answer), said) == right


@pytest.mark.parametrize("task", ["option_letter", "options"])
def test_letters(task: str) -> None:
    a, b = (Question(task, "colour", "?", letter) for letter in "AB")
    said = ("A", " A.", "(A)", "A. circle", "", "the", "a circle", "A circle", "B", "AB", "a")
    assert [grade(a, text) for text in said] == [1.0] * 4 + [0.0] * 7
    assert grade(b, "B") == 1.0 and grade(b, "A") == 0.0


def test_boxes_count_from_half_overlap() -> None:
    q = Question("refer", "shape", "?", "[0.10,0.20,0.50,0.60]", (BOX,), ("circle",))
    assert grade(q, "[0.10,0.20,0.50,0.41]") == 1.0  # IoU 0.525
    assert grade(q, "[0.10,0.20,0.50,0.39]") == 0.0  # IoU 0.475
    assert grade(q, "[0.60,0.60,0.90,0.90];[0.10,0.20,0.50,0.60]") == 0.0  # only the first is read


def test_detection_is_f1_with_names() -> None:
    q = Question("detect_all", "all", "?", "", (BOX, OTHER), ("red circle", "blue star"))
    assert grade(q, "red circle[0.1,0.2,0.5,0.6], blue star[0.6,0.6,0.9,0.9]") == 1.0
    assert grade(q, "red circle[0.1,0.2,0.5,0.6]") == pytest.approx(2 / 3)
    assert grade(q, "red circle[0.1,0.2,0.5,0.6], green star[0.6,0.6,0.9,0.9]") == 0.5
    assert grade(q, "red circle[0.1,0.2,0.5,0.6], red circle[0.1,0.2,0.5,0.6]") == 0.5  # said twice, counted once


def test_key_points_count_one_by_one() -> None:
    points = (("nose", 0.3, 0.3), ("left knee", 0.4, 0.5))
    q = Question("key_points", "person", "?", "", (BOX,), ("person",), points)
    assert grade(q, "nose[0.33,0.30], left knee[0.40,0.55]") == 0.5  # reach is a tenth of 0.4


def test_defects() -> None:
    none, found = Question("defect", "none", "?", "no"), Question("defect", "hole", "?", "yes", (BOX,), ("hole",))
    assert grade(none, "No.") == 1.0 and grade(none, "yes, a hole[0.1,0.2,0.5,0.6]") == 0.0
    assert grade(found, "no") == 0.0 and grade(found, "yes, a spot[0.1,0.2,0.5,0.6]") == 1.0
    assert grade(found, "no, nothing[0.1,0.2,0.5,0.6]") == 0.0 and grade(found, "yes") == 0.0


def test_captions_are_f1_of_words() -> None:
    q = Question("caption", "things", "?", "a red circle and two blue stars")
    assert grade(q, "2 blue stars, a red circle") == 1.0
    assert grade(q, "a red circle") == pytest.approx(2 * 2 / (2 + 5))
