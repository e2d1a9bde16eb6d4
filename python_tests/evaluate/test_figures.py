"""Figures of an answerer that is right, of one that is wrong, and of one that cannot be read."""

from functools import lru_cache

import pytest

from sphinx_fast.data.scene_questions import Question
from sphinx_fast.evaluate.ask import Said
from sphinx_fast.evaluate.figures import by_size, figures_of
from sphinx_fast.evaluate.items import LENGTHS, Item, walk

BOX, OTHER = (0.1, 0.2, 0.5, 0.6), (0.6, 0.6, 0.9, 0.9)


@lru_cache(maxsize=1)
def asked() -> dict[str, list[Item]]:
    items: dict[str, list[Item]] = {task: [] for task in LENGTHS}
    for _, found in walk(tuple(LENGTHS), 30):
        for item in found:
            items[item.task].append(item)
    return items


def right(item: Item) -> Said:
    return Said(item.question.answer, yes=0.9 if item.question.answer.startswith("yes") else 0.1)


@pytest.mark.parametrize("task", LENGTHS)
def test_a_perfect_answerer_gets_all(task: str) -> None:
    figures = figures_of(task, asked()[task], [right(item) for item in asked()[task]])
    values = {name: figure["value"] for name, figure in figures.items() if not name.startswith("yes")}
    assert values == pytest.approx(dict.fromkeys(values, 1.0))
    assert all(figure["n"] > 0 and 0 < figure["error"] < 1 for figure in figures.values())
    if task == "pope":
        assert (
            figures["yes"]["value"] == 0.5
            and figures["accuracy random"]["n"] + figures["accuracy adversarial"]["n"] == 60
        )


def wrong(item: Item) -> Said:
    opposite = {"yes": "no", "no": "yes"}
    if item.question.task == "vqa" and item.question.answer in opposite:
        return Said(opposite[item.question.answer])
    if item.task == "defect":
        return Said(
            "no" if item.question.boxes else "yes, a hole[0.00,0.00,1.00,1.00]", yes=0.1 if item.question.boxes else 0.9
        )
    return Said("zebra[0.00,0.00,0.01,0.01]")


@pytest.mark.parametrize("task", LENGTHS)
def test_a_wrong_answerer_gets_nothing(task: str) -> None:
    figures = figures_of(task, asked()[task], [wrong(item) for item in asked()[task]])
    values = {name: figure["value"] for name, figure in figures.items() if not name.startswith("yes")}
    assert values == pytest.approx(dict.fromkeys(values, 0.0))


@pytest.mark.parametrize("task", [task for task in LENGTHS if task != "pope"])
@pytest.mark.parametrize("text", ["", "?!", "[[0.1,", "maybe", "[nan,nan,nan,nan]"])
def test_what_cannot_be_read_is_wrong(task: str, text: str) -> None:
    figures = figures_of(task, asked()[task], [Said(text)] * len(asked()[task]))
    values = {name: figure["value"] for name, figure in figures.items() if name != "AUROC"}
    assert values == dict.fromkeys(values, 0.0)
    if "AUROC" in figures:
        assert figures["AUROC"]["value"] == 0.5  # the first token's probabilities need no reading


def test_pope_reads_what_it_cannot_read_as_yes() -> None:
    figures = figures_of("pope", asked()["pope"], [Said("?!")] * len(asked()["pope"]))
    assert figures["accuracy"]["value"] == 0.5 and figures["yes"]["value"] == figures["recall"]["value"] == 1.0


def test_boxes_at_a_half_and_at_three_quarters() -> None:
    items = [Item("refer", Question("refer", kind, "?", "", (BOX,), ("circle",)), k) for k, kind in enumerate("ab")]
    said = [Said("[0.10,0.20,0.50,0.49]"), Said("[0.10,0.20,0.50,0.45]")]  # IoU 0.725 and 0.625
    figures = figures_of("refer", items, said)
    assert figures["Acc@0.5"]["value"] == 1.0 and figures["Acc@0.75"]["value"] == 0.0
    figures = figures_of("refer", items, [Said("[0.10,0.20,0.50,0.51]"), Said("[0.10,0.20,0.50,0.39]")])
    assert figures["Acc@0.75"]["value"] == figures["Acc@0.5"]["value"] == 0.5  # IoU 0.775 and 0.475
    assert figures["Acc@0.5 a"]["value"] == 1.0 and figures["Acc@0.5 b"]["value"] == 0.0


def test_ap50_orders_boxes_by_confidence() -> None:
    question = Question("detect_all", "all", "?", "", (BOX, OTHER), ("red circle", "blue star"))
    item = Item("detect_all", question, 0)
    text = "red circle[0.7,0.1,0.9,0.2], red circle[0.1,0.2,0.5,0.6], green ring[0.6,0.6,0.9,0.9]"
    # blue star is never said: 0; the right red circle after a wrong one: precision 1/2 at recall 1
    for confidences, value in (((0.9, 0.8, 0.7), 0.25), ((0.8, 0.9, 0.7), 0.5), ((), 0.25)):
        assert figures_of("detect_all", [item], [Said(text, confidences)])["AP50"]["value"] == pytest.approx(value)


def test_ap50_pools_a_category_over_pictures() -> None:
    items = [Item("detect_all", Question("detect_all", "all", "?", "", (BOX,), ("person",)), k) for k in range(2)]
    said = [Said("person[0.1,0.2,0.5,0.6]", (0.5,)), Said("person[0.7,0.1,0.9,0.2]", (0.9,))]
    figure = figures_of("detect_all", items, said)["AP50"]
    assert figure["value"] == pytest.approx(51 / 101 / 2) and figure["n"] == 2  # 1/2 at recalls up to 1/2
    twice = Said("person[0.1,0.2,0.5,0.6], person[0.1,0.2,0.5,0.6]", (0.9, 0.8))  # the second has no truth left
    assert figures_of("detect_all", items[:1], [twice])["AP50"]["value"] == 1.0
    assert figures_of("detect_all", items[:1], [twice])["F1"]["value"] == pytest.approx(2 / 3)


def test_the_surer_of_two_boxes_takes_the_truth() -> None:
    item = Item("detect_all", Question("detect_all", "all", "?", "", (BOX,), ("person",)), 0)
    text = "person[0.1,0.2,0.5,0.5], person[0.1,0.2,0.5,0.6]"
    assert figures_of("detect_all", [item], [Said(text, (0.5, 0.9))])["AP50"]["value"] == 1.0


def test_sizes_are_binned_by_the_longer_side() -> None:
    sides = (0.04, 0.1, 0.19, 0.19, 0.5)
    items = [
        Item("refer", Question("refer", "shape", "?", "", ((0.0, 0.0, side, side / 2),), ("circle",)), k)
        for k, side in enumerate(sides)
    ]
    items.append(Item("refer", Question("refer", "shape", "?", "", (BOX, OTHER), ("circle",) * 2), 9))
    rows = by_size(items, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0], edges=(0.0, 0.1, 0.2, 0.3, 1.0))
    assert [(row["low"], row["high"], row["value"], row["n"]) for row in rows] == [
        (0.0, 0.1, 0.0, 1),
        (0.1, 0.2, pytest.approx(2 / 3), 3),
        (0.3, 1.0, 1.0, 1),
    ]
    assert "Acc@0.5 size 0.15-0.20" in figures_of("refer", items, [Said("")] * 6)


def test_questions_with_one_thing_have_a_size() -> None:
    for task, name in (("vqa", "accuracy size"), ("refer", "Acc@0.5 size")):
        figures = figures_of(task, asked()[task], [right(item) for item in asked()[task]])
        assert any(key.startswith(name) for key in figures)


def test_no_questions_are_an_error() -> None:
    with pytest.raises(ValueError, match="read: no questions"):
        figures_of("read", [], [])
