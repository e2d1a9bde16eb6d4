"""Tokens -> text in pieces: what is held back, what is shown, and which tokens a text is made of."""

from __future__ import annotations

import pytest
from tiny import converted
from transformers import AutoProcessor

from sphinx_fast.infer import Sampling
from sphinx_fast.infer.request import Request
from sphinx_fast.model import SphinxTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> SphinxTokenizer:
    found: SphinxTokenizer = AutoProcessor.from_pretrained(converted("llama_ens")).tokenizer
    return found


def scripted(tokenizer: SphinxTokenizer, ids: list[int], sampling: Sampling | None = None) -> tuple[Request, list[str]]:
    """A request whose tokens are given, and the pieces it says."""
    request = Request([1], None, sampling or Sampling(), tokenizer, room=1000)
    pieces = []
    for number, token in enumerate(ids):
        request.add(token, -float(number), ends=False)
        if request.news and (piece := request.take()):
            pieces.append(piece)
        if request.done:
            return request, pieces
    request.add(2, 0.0, ends=True)
    if piece := request.take():
        pieces.append(piece)
    return request, pieces


@pytest.mark.parametrize(
    "text",
    ["red\n###", "a\n##b\n### Human: next", "snow 雪 and 👋🏽 done", "\n###", "no stop at all\n#", "é\n###é", ""],
)
def test_pieces_join_to_the_text_before_the_stop(tokenizer: SphinxTokenizer, text: str) -> None:
    request, pieces = scripted(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(pieces) == text.split("\n###")[0] == request.answer().text
    shown = ""
    for piece in pieces:  # nothing shown is ever taken back, and no half character appears
        shown += piece
        assert text.startswith(shown)


def test_broken_bytes_are_shown_in_the_end(tokenizer: SphinxTokenizer) -> None:
    assert "".join(scripted(tokenizer, [3 + 0xE2, 3 + 0x82])[1]) == "\ufffd\ufffd"


def test_tokens_of_the_stop_text_are_not_the_answers(tokenizer: SphinxTokenizer) -> None:
    ids, stop = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a red cat", "a red cat\n###"))
    answer = scripted(tokenizer, stop)[0].answer()
    assert answer.text == "a red cat" and answer.tokens == ids
    assert answer.logprobs == [-float(number) for number in range(len(ids))]
    assert scripted(tokenizer, tokenizer("\n###", add_special_tokens=False)["input_ids"])[0].answer() == ("", [], [])


def test_the_number_of_tokens_is_bound_by_the_setting_and_by_the_room(tokenizer: SphinxTokenizer) -> None:
    for sampling, room, most in ((Sampling(max_new_tokens=3), 9, 3), (Sampling(max_new_tokens=9), 2, 2)):
        request = Request([1], None, sampling, tokenizer, room)
        for _ in range(most):
            assert not request.done
            request.add(70, 0.0, ends=False)
        assert request.done and len(request.answer().tokens) == most


def test_a_failed_request_raises_its_error() -> None:
    with pytest.raises(OSError, match="gone"):
        Request.failed(OSError("gone")).answer()


def test_draws_repeat_by_seed_and_greedy_requests_draw_nothing(tokenizer: SphinxTokenizer) -> None:
    def draws(**settings: float) -> list[float]:
        request = Request([1], None, Sampling(**settings), tokenizer, 9)  # type: ignore[arg-type]
        return [request.draw() for _ in range(4)]

    assert draws(temperature=1, seed=3) == draws(temperature=1, seed=3) != draws(temperature=1, seed=4)
    assert draws(temperature=1) != draws(temperature=1)
    assert draws() == [0.0] * 4
