"""What is asked: held-out scenes, the questions `examples` picks, pairs for POPE, held-out combinations in "unseen"."""

from itertools import islice
from random import Random

import pytest

from sphinx_fast.data.scene_drawing import HELD_OUT, HELD_OUT_NAMES
from sphinx_fast.data.scene_questions import TASKS, Question, examples, questions
from sphinx_fast.data.scenes import scene
from sphinx_fast.evaluate.items import LENGTHS, UNSEEN_TASKS, about_held_out, items_about, walk
from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import SphinxProcessor


def test_every_task_has_a_length() -> None:
    assert set(LENGTHS) == {*TASKS, "pope"}


def test_right_answers_fit() -> None:
    tokenizer = SphinxProcessor.from_pretrained(EMBEDDED_MODEL).tokenizer
    asked = [q for k in range(300) for q in questions(scene(k, split="test"), Random(k))]
    sizes = [(q, len(tokenizer(" " + q.answer, add_special_tokens=False)["input_ids"])) for q in asked]
    assert [(q.task, q.answer, size) for q, size in sizes if size > LENGTHS[q.task]] == []


@pytest.mark.parametrize("task", ["vqa", "refer", "defect"])
def test_questions_are_those_of_examples(task: str) -> None:
    wanted = [(s.seed, q) for s, q in islice(examples(task, split="test"), 12)]
    walked = [
        (item.seed, item.question) for _, items in walk(("caption", task), 12) for item in items if item.task == task
    ]
    assert walked == wanted


def test_each_task_is_asked_about_as_many_scenes() -> None:
    walked = list(walk(("vqa", "pope", "read"), 7))
    counts = {task: sum(any(i.task == task for i in items) for _, items in walked) for task in ("vqa", "pope", "read")}
    assert counts == {"vqa": 7, "pope": 7, "read": 7}
    assert {s.split for s, _ in walked} == {"test"}
    assert all(item.seed == s.seed for s, items in walked for item in items)


def test_pope_asks_in_pairs_and_knows_where_a_no_comes_from() -> None:
    for s, (yes, no) in walk(("pope",), 60):
        assert (yes.question.answer, no.question.answer) == ("yes", "no") and yes.setting == no.setting
        words = no.question.prompt.removeprefix("Is there a").split(" in the image")[0].removeprefix("n").split()
        both = {o.colour for o in s.objects} >= {words[0]} and {o.shape for o in s.objects} >= {words[-1]}
        assert yes.setting == ("adversarial" if len(words) == 2 and both else "random")
    assert {items[0].setting for _, items in walk(("pope",), 60)} == {"random", "adversarial"}


def test_unseen_questions_are_about_held_out_combinations() -> None:
    walked = list(walk(UNSEEN_TASKS, 20, split="unseen"))
    items = [item for _, found in walked for item in found]
    assert {item.task for item in items} == set(UNSEEN_TASKS)
    assert all(about_held_out(item.question) for item in items)
    assert all(
        {(o.shape, o.colour) for o in s.objects} & HELD_OUT for s, found in walked for i in found if i.task == "refer"
    )
    assert not any(about_held_out(q) for k in range(50) for q in questions(scene(k, split="train"), Random(k)))


def test_names_are_compared_in_whole_words() -> None:
    name = sorted(HELD_OUT_NAMES)[0]
    for asked, right in ((name, True), (f"small {name} on the left", True), (f"{name}s", False), (name[1:], False)):
        assert about_held_out(Question("refer", "shape", "?", "", (), (asked,))) is right
    assert not about_held_out(Question("vqa", "count", "?", "2"))


def test_tasks_without_a_held_out_thing_are_refused() -> None:
    with pytest.raises(ValueError, match="got read"):
        next(walk(("vqa", "read"), 3, split="unseen"))
    with pytest.raises(ValueError, match="got nonsense"):
        next(walk(("nonsense",), 3))


def test_domains_differ() -> None:
    clean, textured = (next(walk(("vqa",), 1, domain=domain))[0] for domain in ("clean", "textured"))
    assert clean.picture.shape != textured.picture.shape or (clean.picture != textured.picture).any()
    assert items_about(textured, ("vqa",))
