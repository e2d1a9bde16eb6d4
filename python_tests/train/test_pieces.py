"""Token ids and targets of conversations, captions and documents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from training_data import tiny_processor

from sphinx_fast import EMBEDDED_MODEL, SphinxProcessor
from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.model.conversation import SYSTEM, conversation_prompt
from sphinx_fast.train.pieces import IGNORED, Piece, PieceMaker, text_pieces

PROCESSORS = {"golden": tiny_processor(), "mini": SphinxProcessor.from_pretrained(EMBEDDED_MODEL)}
PICTURE = Path("a.png")
TALKS = [
    (("What is it?", "a cat"),),
    (("How many?", "5"), ("Are you sure, 5?", "yes, five.")),
    (("Where?", "[0.10,0.20,0.30,0.40]"), ("日本 é?", "ü 日本\nnew line"), ("x", "### Human: no")),
    (("trailing ", " leading and trailing "), ("", "an answer to nothing")),
]


def maker(name: str = "golden", length: int = 4000, **options: bool) -> PieceMaker:
    return PieceMaker(PROCESSORS[name], length, **options)


def answer_spans(turns: tuple[tuple[str, str], ...]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it ` {answer}\\n###` stand: the rule, without tokens."""
    text, spans = SYSTEM, []
    for question, answer in turns:
        text += f"### Human: {question}\n### Assistant:"
        spans.append((len(text), len(text) + len(f" {answer}\n###")))
        text += f" {answer}\n"
    return text + "###", spans


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("turns", TALKS)
@pytest.mark.parametrize("picture", [PICTURE, None])
def test_label_mask_token_by_token(name: str, turns: tuple[tuple[str, str], ...], picture: Path | None) -> None:
    make = maker(name)
    piece = make.conversation(Conversation(turns, picture, "row"))
    text, spans = answer_spans(turns)
    encoded = make.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    visual = len(make.visual) if picture else 0
    head = [make.tokenizer.bos_token_id] + [PROCESSORS[name].image_token_id] * visual
    assert piece.ids.tolist() == head + encoded["input_ids"]
    for at, (start, end) in enumerate(encoded["offset_mapping"]):
        inside = [a < end <= b for a, b in spans]
        target = piece.targets[len(head) + at - 1]
        assert (target != IGNORED) == any(inside), (at, text[start:end])
        if any(inside):
            assert target == encoded["input_ids"][at]
    assert piece.targets[-1] == IGNORED
    assert not np.isin(piece.targets, [make.tokenizer.eos_token_id, PROCESSORS[name].image_token_id]).any()
    assert piece.lengths == (len(piece),)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("turns", TALKS)
def test_what_is_predicted_is_the_answer_and_the_stop_text(name: str, turns: tuple[tuple[str, str], ...]) -> None:
    make = maker(name)
    piece = make.conversation(Conversation(turns, None, "row"))
    runs = np.split(piece.targets, np.flatnonzero(np.diff(piece.targets == IGNORED)) + 1)
    said = [make.tokenizer.sentencepiece.decode(run.tolist()) for run in runs if run[0] != IGNORED]
    assert [text.strip(" ") for text in said] == [f"{answer}\n###".strip(" ") for _, answer in turns]


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_prompt_is_what_inference_asks_with(name: str) -> None:
    """The ids before the first target are those of the prompt that `ask` writes."""
    make, turns = maker(name), TALKS[0]
    piece = make.conversation(Conversation(turns, PICTURE, "row"))
    prompt = PROCESSORS[name].prompt_ids(
        conversation_prompt([(turns[0][0], None)]), [make.processor.image_processor.num_views]
    )
    first = int(np.flatnonzero(piece.targets != IGNORED)[0]) + 1
    assert piece.ids[:first].tolist() == prompt


def test_a_caption_has_no_prompt_and_ends() -> None:
    make = maker()
    piece = make.caption(Conversation((("", "a cat on a mat"),), PICTURE, "row"), kind=3)
    ids = make.tokenizer("a cat on a mat", add_special_tokens=False)["input_ids"]
    head = [1] + [400] * len(make.visual)
    assert piece.ids.tolist() == [*head, *ids, 2]
    assert piece.targets.tolist() == [IGNORED] * (len(head) - 1) + [*ids, 2, IGNORED]
    assert piece.kind == 3 and piece.picture == PICTURE


@pytest.mark.parametrize(
    ("turns", "picture", "kind"), [((("", " "),), PICTURE, "no answer"), ((("", "a"),), None, "no picture")]
)
def test_captions_that_cannot_be_used(turns: tuple[tuple[str, str], ...], picture: Path | None, kind: str) -> None:
    with pytest.raises(BadRowError, match="row") as caught:
        maker().caption(Conversation(turns, picture, "row"))
    assert caught.value.kind == kind


def test_long_conversations_keep_their_whole_answers() -> None:
    turns = tuple((f"question {n}", "an answer " * 5) for n in range(6))
    whole = maker().conversation(Conversation(turns, PICTURE, "row"))
    for length in range(len(whole) // 3, len(whole), 17):
        try:
            piece = maker(length=length).conversation(Conversation(turns, PICTURE, "row"))
        except BadRowError as error:
            assert error.kind == "too long"
            continue
        assert len(piece) <= length
        assert piece.ids.tolist() == whole.ids[: len(piece)].tolist()
        assert piece.targets[:-1].tolist() == whole.targets[: len(piece) - 1].tolist()
        assert PROCESSORS["golden"].tokenizer.decode(piece.ids[-3:].tolist()).endswith("###"), "it ends with an answer"


def test_an_answer_that_does_not_fit_says_so() -> None:
    """What users of the released loader met: max_words 512 below the 1,455 visual positions."""
    with pytest.raises(
        BadRowError, match=r"ends at position 183, 120 allowed \(111 are before the text\); raise max_length"
    ):
        maker(length=120).conversation(Conversation(TALKS[0], PICTURE, "row"))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("turns", TALKS)
def test_branches_are_conversations_of_one_turn(name: str, turns: tuple[tuple[str, str], ...]) -> None:
    piece = maker(name, independent_turns=True).conversation(Conversation(turns, PICTURE, "row"))
    alone = [maker(name).conversation(Conversation((turn,), PICTURE, "row")) for turn in turns]
    if len(turns) == 1:
        assert piece.ids.tolist() == alone[0].ids.tolist()
        return
    trunk, *branches = piece.lengths
    assert len(branches) == len(turns) and sum(piece.lengths) == len(piece)
    assert (piece.targets[: trunk - 1] == IGNORED).all()
    at = trunk
    for single, size in zip(alone, branches, strict=True):
        assert [*piece.ids[:trunk], *piece.ids[at : at + size]] == single.ids.tolist()
        assert piece.targets[at : at + size - 1].tolist() == single.targets[trunk:-1].tolist()
        assert (single.targets[:trunk] == IGNORED).all(), "nothing the trunk predicts is lost"
        at += size


def test_branches_that_do_not_fit_are_left_out() -> None:
    turns = tuple((f"what about {n}?", "a long answer " * (1 + 3 * (n == 1))) for n in range(3))
    whole = maker(independent_turns=True).conversation(Conversation(turns, PICTURE, "row"))
    piece = maker(length=len(whole) - 1, independent_turns=True).conversation(Conversation(turns, PICTURE, "row"))
    assert len(piece.lengths) == len(whole.lengths) - 1
    with pytest.raises(BadRowError, match="no turn fits"):
        maker(length=whole.lengths[0], independent_turns=True).conversation(Conversation(turns, PICTURE, "row"))


@pytest.mark.parametrize("independent", [False, True])
def test_weights_of_answers(independent: bool) -> None:
    turns = (("a?", "one"), ("b?", "two"), ("c?", "three"))
    make = maker(independent_turns=independent)
    plain = make.conversation(Conversation(turns, None, "row"))
    piece = make.conversation(Conversation(turns, None, "row", weights=(0.5, 0.0, 2.0)))
    runs = np.split(np.arange(len(plain)), np.flatnonzero(np.diff(plain.targets == IGNORED)) + 1)
    runs = [run for run in runs if plain.targets[run[0]] != IGNORED]
    for run, weight in zip(runs, (0.5, 0.0, 2.0), strict=True):
        assert (piece.weights[run] == weight).all()
        assert ((piece.targets[run] == IGNORED) == (weight == 0)).all()


def test_documents_see_only_themselves() -> None:
    tokens = np.array([5, 6, 2, 1, 7, 8, 2, 1, 9], np.uint32)
    pieces = text_pieces(tokens, SimpleNamespace(bos_token_id=1, eos_token_id=2), kind=4, name="chunk")
    assert [piece.ids.tolist() for piece in pieces] == [[5, 6, 2], [1, 7, 8, 2], [1]]
    assert [piece.targets.tolist() for piece in pieces] == [[6, 2, IGNORED], [7, 8, 2, IGNORED], [9]]
    assert {piece.kind for piece in pieces} == {4}
    whole: list[Piece] = text_pieces(tokens, SimpleNamespace(bos_token_id=None, eos_token_id=2), 0, "chunk")
    assert [piece.targets.tolist() for piece in whole] == [tokens[1:].tolist()]


def test_one_token_that_begins_and_ends_documents() -> None:
    """GPT-2's: a document's last token still learns to say that it is the end."""
    tokens = np.array([1, 5, 6, 1, 7, 8, 1, 9], np.uint32)
    pieces = text_pieces(tokens, SimpleNamespace(bos_token_id=1, eos_token_id=1), 0, "chunk")
    assert [piece.ids.tolist() for piece in pieces] == [[1, 5, 6], [1, 7, 8], [1]]
    assert [piece.targets.tolist() for piece in pieces] == [[5, 6, 1], [7, 8, 1], [9]]
