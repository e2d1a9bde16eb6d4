"""What a model's places and passes must survive: interruptions, errors, neighbours of all kinds, and being dropped."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tiny import GOLDEN, converted

from sphinx_fast import Sphinx
from sphinx_fast.infer.request import Request
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.model.conversation import conversation_prompt

CAT = GOLDEN / "cat.png"
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "stop": ()}


@pytest.fixture
def sphinx() -> Sphinx:
    return Sphinx.from_pretrained(converted("llama_ens"), device="cpu", dtype=torch.float32)


def asked(sphinx: Sphinx, question: str, image: Any = CAT, earlier: Any = None, **settings: Any) -> Request:
    prompt = conversation_prompt([*(earlier.turns if earlier else []), (question, None)])
    sampling = Sampling(**{**SETTINGS, **settings})
    return sphinx.engine.request(prompt, sphinx.engine.see(image), sampling, earlier._last if earlier else None)


def tokens(sphinx: Sphinx, requests: list[Request]) -> list[list[int]]:
    for _ in sphinx.engine.serve(requests):
        pass
    for request in requests:
        request.answer()
    return [request.tokens for request in requests]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("moment", [1, 2, 3, 5, 6, 7])
def test_an_interrupted_step_is_repeated_with_the_same_tokens(
    sphinx: Sphinx, monkeypatch: pytest.MonkeyPatch, moment: int, temperature: float
) -> None:
    """Between two rows that get their tokens: some have theirs already."""

    def requests() -> list[Request]:
        return [asked(sphinx, f"What {number}?", temperature=temperature, seed=number) for number in range(3)]

    expected, again = tokens(sphinx, requests()), requests()
    calls, add = 0, Request.add

    def interrupted(request: Request, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        add(request, *args, **kwargs)

    monkeypatch.setattr(Request, "add", interrupted)
    sphinx.engine.scheduler._coming.extend(again)
    with pytest.raises(KeyboardInterrupt):
        tokens(sphinx, [asked(sphinx, "another")])
    assert tokens(sphinx, [asked(sphinx, "and another", max_new_tokens=40)])
    assert [request.tokens for request in again] == expected


@pytest.mark.parametrize("where", ["prefixes", "suffixes"])
def test_an_error_while_places_are_given_takes_none(
    sphinx: Sphinx, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = tokens(sphinx, [asked(sphinx, "What?")])
    pool = getattr(sphinx.engine.runner, where)
    if where == "prefixes":
        sphinx.picture_cache.clear()

    def refuse() -> None:
        raise MemoryError("no place")

    with monkeypatch.context() as patched:
        patched.setattr(pool, "take", refuse)
        failing = asked(sphinx, "What?")
        list(sphinx.engine.serve([failing]))
        assert isinstance(failing.error, MemoryError)
    for places in (sphinx.engine.runner.prefixes, sphinx.engine.runner.suffixes):
        owners = [owner() for owner in places._owners if owner is not None]
        assert not any(slot.holders for slot in owners if slot is not None)
    assert tokens(sphinx, [asked(sphinx, "What?")]) == expected


def test_text_only_conversations_and_new_questions_join_in_one_pass(sphinx: Sphinx) -> None:
    talks = [sphinx.chat(), sphinx.chat()]
    for talk in talks:
        talk.say("Hello there", max_new_tokens=3, stop=())

    def requests() -> list[Request]:
        first, last = (asked(sphinx, "And now?", None, talk) for talk in talks)
        return [first, asked(sphinx, "A new one", None), last, asked(sphinx, "What?")]

    together = tokens(sphinx, requests())
    assert together == [tokens(sphinx, [request])[0] for request in requests()]


def test_clearing_the_cache_is_for_all_that_was_kept(sphinx: Sphinx) -> None:
    """Writes through `.data` cannot be seen; whoever makes them clears the cache."""
    talk = sphinx.chat(CAT)
    talk.say("What?", **SETTINGS)
    turns = list(talk.turns)
    with torch.no_grad():
        for parameter in sphinx.model.model.language_model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(1.5)
    sphinx.picture_cache.clear()
    fresh = Sphinx(sphinx.model, sphinx.processor)
    again, right = (one.ask(CAT, "What?", return_logprobs=True, **SETTINGS) for one in (sphinx, fresh))
    assert again == right
    other = fresh.chat(CAT)
    other.turns = turns
    assert talk.say("And now?", **SETTINGS) == other.say("And now?", **SETTINGS)


def test_nothing_of_a_question_lives_on(sphinx: Sphinx, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Request]] = []
    request = sphinx.engine.request

    def noted(*args: Any, **rest: Any) -> Request:
        one = request(*args, **rest)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(sphinx.engine, "request", noted)
    sphinx.ask(CAT, "What?", **SETTINGS)
    sphinx.ask_batch([(CAT, "What?"), ("/no/such/picture", "What?"), (None, "Hello")], return_exceptions=True)
    next(sphinx.stream(CAT, "What?", **SETTINGS))
    for _ in sphinx.stream_many(CAT, ["What?", "Who?"], **SETTINGS):
        break
    scheduler = sphinx.engine.scheduler
    assert not scheduler.running and not scheduler.waiting and not scheduler._coming
    gc.collect()
    assert made and not any(one() for one in made)


def test_closing_a_stream_frees_its_row_at_once(sphinx: Sphinx) -> None:
    gc.disable()
    try:
        pieces: Any = sphinx.stream(CAT, "What?", **SETTINGS)
        next(pieces)
        pieces.close()
        assert not sphinx.engine.scheduler.running
    finally:
        gc.enable()


def test_a_conversation_left_halfway_and_edited_answers_as_a_new_one(sphinx: Sphinx) -> None:
    """Whatever stands in its place: a turn cut short, two turns at once, turns that were changed."""
    talk = sphinx.chat(CAT)

    def same(question: str) -> bool:
        fresh = sphinx.chat(CAT)
        fresh.turns = list(talk.turns)
        return talk.say(question, **SETTINGS) == fresh.say(question, **SETTINGS)

    assert same("What?")
    left = talk.stream("A long question that is not read to its end", **SETTINGS)
    next(iter(left))
    del left
    assert same("And now?")
    first, second = (iter(talk.stream(question, **SETTINGS)) for question in ("One?", "Two?"))
    for pieces in (first, second, first):
        next(pieces, None)
    assert same("Three?")
    for _ in (*first, *second):
        pass
    assert same("Four?")
    talk.turns[1] = ("Something else", "entirely")
    assert same("Five?")
    del talk.turns[:2]
    assert same("Six?")
