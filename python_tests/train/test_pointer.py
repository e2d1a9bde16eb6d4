"""The pointer's loss is the attention on the box, wherever a piece lies in its row."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from training_data import tiny_processor

from sphinx_fast import EMBEDDED_MODEL, SphinxForConditionalGeneration, SphinxProcessor, preset
from sphinx_fast.data.record import BadRowError, Conversation, Look
from sphinx_fast.data.scene_questions import examples
from sphinx_fast.data.scene_source import NAMING, Scenes, looks
from sphinx_fast.data.scene_targets import CROPS, WHOLE, dense_targets
from sphinx_fast.data.scenes import scene
from sphinx_fast.train.learner import Learner
from sphinx_fast.train.packing import make_row
from sphinx_fast.train.pieces import IGNORED, Piece, PieceMaker
from sphinx_fast.train.pointer import HEADS, BoxFinder, Pointing, coordinate_ids, quotes_of

PROCESSOR = SphinxProcessor.from_pretrained(EMBEDDED_MODEL)
FINDER = BoxFinder(PROCESSOR.tokenizer)
CONFIG = preset("sphinx-mini")


def piece(*turns: tuple[str, str], independent: bool = False, picture: bool = True) -> Piece:
    record = Conversation(turns, Path("p.png") if picture else None, "row")
    return PieceMaker(PROCESSOR, 2000, independent).conversation(record)


BOX = "[0.10,0.20,0.30,0.45]"
REFER = ("where is the red circle?", BOX)
SAID = ("what is in [0.50,0.50,0.90,0.90]?", "a word")
MANY = ("all?", f"circle{BOX}, word[0.00,0.00,1.00,1.00];[0.20,0.20,0.21,0.21] person[0.10,0.20]")


def test_boxes_are_found_where_they_are_to_be_said() -> None:
    row = make_row([piece(SAID, REFER), piece(MANY, picture=False)])
    places, boxes, anywhere = FINDER(row)
    assert not anywhere.any(), "coordinates are of the whole"
    assert boxes.shape == (18 + 5, 1, 4)
    assert boxes[[0, 5, 10, 15, 20], 0].tolist() == [
        pytest.approx(box)
        for box in (
            [0.1, 0.2, 0.3, 0.45],
            [0.1, 0.2, 0.3, 0.45],
            [0, 0, 1, 1],
            [0.2, 0.2, 0.21, 0.21],
            [0.1, 0.2, 0.1, 0.2],  # a point
        )
    ]
    said = [PROCESSOR.tokenizer.convert_ids_to_tokens(int(row.targets[place])) for place in places]
    assert said[1:5] == ["0.10", "0.20", "0.30", "0.45"] and said[21:] == ["0.10", "0.20"]
    assert [said[k].strip("\u2581") for k in (0, 5, 10, 15, 20)] == ["", "circle", "word", "[", "person"]


@pytest.mark.parametrize("independent", [False, True])
def test_answers_without_coordinates_look_at_what_they_are_about(independent: bool) -> None:
    turns = (("how many?", "two"), ("is it red?", "yes"), REFER)
    both = ((0.1, 0.1, 0.2, 0.2), (0.5, 0.5, 0.9, 0.9))
    looks = ((Look(0, 3, both),), (), (Look(0, 1, ((0.1, 0.2, 0.3, 0.45),)),))
    record = Conversation(turns, Path("p.png"), "row", looks=looks)
    made = PieceMaker(PROCESSOR, 2000, independent).conversation(record)
    row = make_row([piece(SAID), made])
    places, boxes, anywhere = FINDER(row, [piece(SAID), made])
    said = [PROCESSOR.tokenizer.convert_ids_to_tokens(int(row.targets[place])).strip("\u2581") for place in places]
    assert said == ["two", "", "[", "0.10", "0.20", "0.30", "0.45"]
    assert boxes.shape == (7, 2, 4) and boxes[1:, 1].isnan().all()
    torch.testing.assert_close(boxes[0], torch.tensor(both))
    patches = Pointing(row, CONFIG).targets(boxes, anywhere)[:, 0].view(7, 6, 6)
    assert patches[0].nonzero().tolist() == [[0, 0], *([y, x] for y in (3, 4) for x in (3, 4))]


@pytest.mark.parametrize("independent", [False, True])
def test_a_part_of_an_answer_looks_at_its_own_thing(independent: bool) -> None:
    """And what quotes the question at the tokens it repeats, also where branches begin with them."""
    a, b = ((0.1, 0.1, 0.2, 0.2),), ((0.5, 0.5, 0.9, 0.9),)
    turns = (("how?", "red circle above blue ring"), ("the number 12?\ntwice", "12"), ("the number 12?\nonce", "12"))
    looks = ((Look(0, 10, a), Look(17, 26, b)), (Look(0, 2, (), (11, 13)),), (Look(0, 2, (), (11, 13)),))
    record = Conversation(turns[independent:], Path("p.png"), "row", looks=looks[independent:])
    alone = Conversation(turns[:1], Path("p.png"), "row", looks=looks[:1])
    maker = PieceMaker(PROCESSOR, 2000, independent)
    pieces = [piece(SAID), maker.conversation(record), maker.conversation(alone)]
    row = make_row(pieces)
    places, boxes, anywhere = FINDER(row, pieces)
    assert anywhere[-4:].all()
    words = PROCESSOR.tokenizer.convert_ids_to_tokens
    said = words(row.targets[places[-4:]].tolist())
    assert [word.strip("\u2581") for word in said] == ["red", "circle", "blue", "ring"]
    torch.testing.assert_close(boxes[-4:, 0], torch.tensor([*a, *a, *b, *b]))
    quotes = quotes_of(pieces)
    assert (
        words(row.targets[quotes[:, 0]].tolist()) == words(row.input_ids[quotes[:, 1]].tolist()) == ["\u25811", "2"] * 2
    )
    assert (quotes[:, 1] < quotes[:, 0]).all()


@pytest.mark.parametrize("task", ["options", "option_letter", "ocr_vqa"])
def test_scenes_say_what_is_quoted(task: str) -> None:
    """The right option, or the reference that is right; not a wrong one."""
    quoted = set()
    for _, question in islice(examples(task, split="train"), 20):
        if question.quote is None:
            quoted.add(False)
            assert task == "ocr_vqa" and f": {question.answer}" not in question.prompt
            continue
        quoted.add(True)
        word = question.prompt[slice(*question.quote)]
        before = question.prompt[: question.quote[0]]
        assert before.endswith(f"{question.answer}. ") if task != "ocr_vqa" else word == question.answer
        assert looks(question)[0].quote == question.quote
    assert quoted == ({True, False} if task == "ocr_vqa" else {True})


def test_names_in_an_answer_look_at_their_things() -> None:
    """One thing each; a phrase for several things at all of them."""
    found = 0
    for task in NAMING:
        for _, question in islice(examples(task), 20):
            parts = looks(question)
            assert sum(len(part.boxes) for part in parts) == len(question.boxes) > 0
            assert all(question.answer[part.start : part.stop] in question.names for part in parts)
            assert [box for part in parts for box in part.boxes] == list(question.boxes)
            found += any(len(part.boxes) > 1 for part in parts)
    assert found


def test_the_loss_is_the_attention_on_the_patches_of_the_box() -> None:
    """Against transformers' own attention weights, each conversation alone."""
    torch.manual_seed(0)
    model = SphinxForConditionalGeneration(CONFIG).eval()
    visual = torch.randn(2, CONFIG.vision_config.tokens_per_picture, CONFIG.text_config.hidden_size)
    questions = [REFER, MANY, SAID]
    row = make_row([piece(*questions, independent=True), piece(REFER)])
    row.pointers, row.pointed, row.anywhere = FINDER(row)
    pointing = Pointing(row, CONFIG)
    with torch.no_grad():
        embeddings = model.model.splice(row.input_ids, visual)
        pointing.run(model.model.language_model, embeddings)
    model.set_attn_implementation("eager")
    expected = []
    for picture, turn in ((0, REFER), (0, MANY), (1, REFER)):
        alone = make_row([piece(turn)])
        with torch.no_grad():
            outputs = model.model(
                input_ids=alone.input_ids[None], visual_tokens=visual[picture], output_attentions=True
            )
        weights = outputs.attentions[pointing.layer][0, list(HEADS)]
        places, boxes, anywhere = FINDER(alone)
        patches = weights[:, places][..., 1 + pointing.patches]
        expected.append(-(patches * pointing.targets(boxes, anywhere)).sum((-2, -1)).log().mean(0))
    torch.testing.assert_close(pointing.losses, torch.cat(expected))


def test_the_loss_of_a_quote_is_the_attention_on_its_tokens() -> None:
    """Against transformers' own attention weights; in a row behind what is looked at in the picture."""
    torch.manual_seed(0)
    model = SphinxForConditionalGeneration(CONFIG).eval()
    looks = ((Look(0, 2, ((0.1, 0.1, 0.5, 0.5),), (11, 13)),),)
    record = Conversation((("the number 12?", "12"),), None, "row", looks=looks)
    made = PieceMaker(PROCESSOR, 2000).conversation(record)
    row = make_row([piece(SAID, picture=False), made])
    row.pointers, row.pointed, row.anywhere = FINDER(row, [piece(SAID, picture=False), made])
    row.quotes = quotes_of([piece(SAID, picture=False), made])
    pointing = Pointing(row, CONFIG)
    with torch.no_grad():
        pointing.run(model.model.language_model, model.model.language_model.embed_tokens(row.input_ids))
    model.set_attn_implementation("eager")
    alone, quotes = make_row([made]), quotes_of([made])
    with torch.no_grad():
        outputs = model.model(input_ids=alone.input_ids[None], output_attentions=True)
    weights = outputs.attentions[-1][0, list(HEADS)][:, quotes[:, 0], quotes[:, 1]]
    assert row.looked == len(row.pointers) + 2 == 4 and not pointing.losses[:2].any()
    torch.testing.assert_close(pointing.losses[2:], -weights.log().mean(0))


def test_the_patches_of_a_box_are_those_its_owner_has() -> None:
    drawn = scene(0)
    row = make_row([piece(REFER)])
    boxes = torch.tensor([drawn.square_box(thing.box) for thing in drawn.things])[:, None]
    owned = Pointing(row, CONFIG).targets(boxes, torch.ones(len(boxes), dtype=torch.bool)).any(0)
    for patches, window in zip(owned, (WHOLE, *CROPS), strict=True):
        assert torch.equal(patches.view(6, 6), torch.from_numpy(dense_targets(drawn, 6, window)["thing"] > 0))
    whole = Pointing(row, CONFIG).targets(boxes, torch.zeros(len(boxes), dtype=torch.bool)).any(0)
    assert torch.equal(whole[0], owned[0]) and not whole[1:].any()


def test_it_reaches_queries_and_keys_and_counts_in_the_loss() -> None:
    torch.manual_seed(0)
    model = SphinxForConditionalGeneration(CONFIG)
    row = make_row([piece(REFER), piece(REFER, picture=False)])
    row.pointers, row.pointed, row.anywhere = FINDER(row)
    features = model.model.vision_tower(torch.zeros(5, 3, 96, 96))
    ones = torch.ones(int((row.targets != IGNORED).sum()))
    learner = Learner(model)
    plain, _, none = learner(row, features, ones)
    loss, _, pointed = learner(row, features, ones, torch.tensor(0.5))
    assert none.shape == (0,) and pointed.shape == (10,)
    assert (pointed[:5] > 0).all() and not pointed[5:].any(), "without a picture there is nothing to look at"
    assert math.isclose(loss.item(), (plain + 0.5 * pointed.sum()).item(), rel_tol=1e-6)
    (loss - plain).backward()
    attention = model.model.language_model.layers[2].self_attn
    assert attention.q_proj.weight.grad is not None and attention.q_proj.weight.grad.any()
    assert not attention.o_proj.weight.grad.any()


def test_a_tokenizer_without_coordinates() -> None:
    assert coordinate_ids(tiny_processor().tokenizer) is None
    ids = coordinate_ids(PROCESSOR.tokenizer)
    assert ids is not None and len(set(ids)) == 101
    with pytest.raises(ValueError, match="several tokens"):
        BoxFinder(tiny_processor().tokenizer)


def test_scenes_are_rows() -> None:
    data = Scenes(Path("scenes"), Path(), count=5, start=7)
    assert len(data) == 5
    rows = [data[k] for k in range(5)]
    assert rows[2] == data[2] and rows[0].name == "scenes-clean:7"
    assert all(len(row.turns) == len(row.weights) and set(row.weights) <= {0.5, 1.0, 1.5, 2.0} for row in rows)
    captions = Scenes(Path("scenes"), Path(), count=5, captions=True)[0]
    assert captions.turns[0][0] == "" and captions.turns[0][1] and captions.weights == ()
    assert all(len(row.looks) == len(row.turns) for row in rows)
    assert rows[0].picture != Scenes(Path("scenes"), Path(), start=7, domain="textured")[0].picture
    words = Scenes(Path("scenes"), Path(), count=5, kinds={"text": 1.0}, captions=True)
    assert all(" word " in words[k].turns[0][1] or " number " in words[k].turns[0][1] for k in range(5))
    small = Scenes(Path("scenes"), Path(), count=5, kinds={"shapes": 1.0}, tasks=["vqa"], shrink=0.5, scale=2)
    assert all("single word" in question or question.endswith("?") for k in range(5) for question, _ in small[k].turns)
    assert {weight for k in range(5) for weight in small[k].weights} == {2.0}
    with pytest.raises(BadRowError, match="nothing to ask for key_points"):
        Scenes(Path("scenes"), Path(), kinds={"shapes": 1.0}, tasks=["key_points"])[0]
    for wrong in (
        {"count": -1},
        {"most": 0},
        {"start": -2},
        {"domain": "oil"},
        {"kinds": {"cat": 1}},
        {"kinds": {}},
        {"tasks": ["cat"]},
        {"tasks": []},
        {"shrink": 2.0},
        {"scale": 0},
    ):
        with pytest.raises(ValueError, match=r"scenes: .*expected"):
            Scenes(Path("scenes"), Path(), **wrong)
