"""Every way of asking gives the same answers, and none computes twice what another has computed."""

from __future__ import annotations

import copy
import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import GOLDEN, converted
from torch import Tensor

from sphinx_fast import Sphinx
from sphinx_fast.infer import Answer
from sphinx_fast.model.conversation import conversation_prompt

CAT, COFFEE = GOLDEN / "cat.png", GOLDEN / "coffee_portrait.png"
WORDS = ["what", "where", "is", "are", "the", "a", "cat", "red", "blue", "left of", "how many", "and?", "this"]
LONG: dict[str, Any] = {"max_new_tokens": 10, "stop": ()}


def prompts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 25))) for _ in range(count)]


class Watched(Sphinx):
    """Counts what the parts of the model compute."""

    def watch(self) -> Watched:
        self.encoded = self.passes = self.positions = 0

        def encoded(_: Any, given: tuple[Tensor, ...]) -> None:
            self.encoded += given[0].shape[0] if isinstance(given[0], Tensor) else given[0].clip.shape[0]

        def passed(_: Any, __: Any, given: dict[str, Any]) -> None:
            self.passes += 1
            self.positions += given["inputs_embeds"].shape[1]

        self.model.model.vision_tower.register_forward_pre_hook(encoded)
        self.model.model.language_model.register_forward_pre_hook(passed, with_kwargs=True)
        return self

    def counts(self) -> tuple[int, int, int]:
        """(views encoded, passes of the language model, positions in them) since the last call."""
        seen = self.encoded, self.passes, self.positions
        self.encoded = self.passes = self.positions = 0
        return seen


def load(name: str = "llama_ens5", dtype: torch.dtype = torch.float32, **options: Any) -> Watched:
    sphinx = Watched.from_pretrained(converted(name), device="cpu", dtype=dtype, **options)
    assert isinstance(sphinx, Watched)
    return sphinx.watch()


@pytest.fixture(scope="module")
def shared() -> Watched:
    return load()


@pytest.fixture
def sphinx(shared: Watched) -> Iterator[Watched]:
    """The same weights each time, nothing kept."""
    yield Watched(shared.model, shared.processor)
    shared.counts()


def generated(sphinx: Sphinx, image: Any, question: str, count: int) -> list[int]:
    """By transformers' generate with its own attention and cache."""
    prompt = conversation_prompt([(question, None)])
    inputs = sphinx.processor(images=None if image is None else [image], text=[prompt], return_tensors="pt")
    language_model = sphinx.model.model.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("sdpa")
    try:
        out = sphinx.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    finally:
        language_model.set_attn_implementation(before)
    ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(2)] if 2 in ids else ids


def same(answer: Answer, ids: Sequence[int], sphinx: Sphinx) -> bool:
    """Tokens at the end that add no text are not the answer's."""
    text = sphinx.processor.tokenizer.decode(ids, skip_special_tokens=True)
    return bool(answer.text == text and answer.tokens == list(ids[: len(answer.tokens)]))


# --- the same answers -------------------------------------------------------------------------------------------------
def test_fifty_prompts_have_the_same_greedy_tokens_however_they_are_asked() -> None:
    sphinx, uncached, few = load(), load(picture_cache=0), load(max_rows=3)
    pairs = [((CAT, COFFEE, None)[k % 7 % 3], question) for k, question in enumerate(prompts(50))]
    expected = [generated(sphinx, image, question, LONG["max_new_tokens"]) for image, question in pairs]
    assert len({tuple(ids) for ids in expected}) > 40, "the questions hardly matter: nothing is shown"

    logged: dict[str, Any] = {**LONG, "return_logprobs": True}
    for cache in (sphinx, uncached):
        asked = [cache.ask(image, question, **logged) for image, question in pairs]
        assert all(same(answer, ids, sphinx) for answer, ids in zip(asked, expected, strict=True))
    again = [sphinx.ask(image, question, **logged) for image, question in pairs[:10]]  # now from the cache
    assert [answer.tokens for answer in again] == [answer.tokens for answer in asked[:10]]
    texts = [answer.text for answer in asked]
    for several in (sphinx, uncached, few):
        batch = several.ask_batch(pairs, **logged)
        assert [answer.tokens for answer in batch] == [answer.tokens for answer in asked]
        for image in (CAT, COFFEE, None):
            own = [k for k, pair in enumerate(pairs) if pair[0] is image]
            assert several.ask_many(image, [pairs[k][1] for k in own], **LONG) == [texts[k] for k in own]
    for (image, question), text in zip(pairs[::5], texts[::5], strict=True):
        assert "".join(sphinx.stream(image, question, **LONG)) == text
        assert sphinx.chat(image).say(question, **LONG) == uncached.chat(image).say(question, **LONG) == text
    pieces = [""] * len(pairs)
    for index, piece in few.stream_batch(pairs, **LONG):
        pieces[index] += piece
    assert pieces == texts


def test_first_differences_in_bfloat16_are_near_ties() -> None:
    """Libraries sum in another order for other numbers of rows; that may decide between tokens that are as good."""
    sphinx = load(dtype=torch.bfloat16)
    exact = copy.deepcopy(sphinx.model).double()
    questions = prompts(50, seed=1)
    together = sphinx.ask_many(CAT, questions, return_logprobs=True, **LONG)
    visual = sphinx.engine.encode(CAT)
    assert visual is not None
    different = 0
    for question, many in zip(questions, together, strict=True):
        one = sphinx.ask(CAT, question, return_logprobs=True, **LONG)
        at = next((k for k, (a, b) in enumerate(zip(one.tokens, many.tokens, strict=False)) if a != b), None)
        if at is None:
            continue
        different += 1
        ids = sphinx.processor.prompt_ids(conversation_prompt([(question, None)]), views=[visual.shape[0]])
        ids = torch.tensor([[*ids, *one.tokens[:at]]])
        with torch.inference_mode():
            logits = sphinx.model(input_ids=ids, visual_tokens=visual, logits_to_keep=1).logits[0, -1].double()
            true = exact(input_ids=ids, visual_tokens=visual.double(), logits_to_keep=1).logits[0, -1]
        gap = (true[one.tokens[at]] - true[many.tokens[at]]).abs()
        assert gap <= 2 * (logits - true).abs().max(), f"{question}: token {at} differs by {gap:.3g}"
    assert different < len(questions) // 2


def test_a_seed_gives_the_same_answer_in_any_batch(sphinx: Watched) -> None:
    questions = prompts(8, seed=2)
    settings: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "max_new_tokens": 12}
    seeds = list(range(8))
    together = sphinx.ask_many(CAT, questions, seed=seeds, **settings)
    assert together == [sphinx.ask(CAT, q, seed=s, **settings) for q, s in zip(questions, seeds, strict=True)]
    assert together != sphinx.ask_many(CAT, questions, seed=seeds[::-1], **settings)
    greedy, drawn = sphinx.ask_many(CAT, questions[:1] * 2, temperature=[0.0, 1.3], seed=5, max_new_tokens=12)
    assert greedy == sphinx.ask(CAT, questions[0], max_new_tokens=12)
    assert drawn == sphinx.ask(CAT, questions[0], temperature=1.3, seed=5, max_new_tokens=12)


def test_settings_of_each_request(sphinx: Watched) -> None:
    answers = sphinx.ask_many(CAT, ["a", "a", "a"], max_new_tokens=[2, 5, 9], stop=(), return_logprobs=True)
    assert [len(answer.tokens) for answer in answers] == [2, 5, 9]
    assert answers[2].tokens[:5] == answers[1].tokens and answers[1].tokens[:2] == answers[0].tokens
    whole = answers[2].text
    first, second = sphinx.ask_many(CAT, ["a", "a"], max_new_tokens=9, stop=[[whole[3:5]], []])
    assert (first, second) == (whole[: whole.index(whole[3:5])], whole)
    with pytest.raises(ValueError, match="temperature: expected one value for each of 2 requests, got 3"):
        sphinx.ask_many(CAT, ["a", "b"], temperature=[0, 0, 0])
    with pytest.raises(TypeError, match="questions: expected several texts, got one"):
        sphinx.ask_many(CAT, "one question")
    assert sphinx.ask_many(CAT, []) == [] == sphinx.ask_batch([])


def test_logprobs_are_those_of_the_models_own_distribution(sphinx: Watched) -> None:
    answers = sphinx.ask_many(
        CAT, ["What?", "Where is it?"], temperature=[0.0, 1.5], seed=3, return_logprobs=True, **LONG
    )
    for question, answer in zip(["What?", "Where is it?"], answers, strict=True):
        visual = sphinx.engine.encode(CAT)
        assert visual is not None and len(answer.tokens) == len(answer.logprobs) > 3
        prompt = sphinx.processor.prompt_ids(conversation_prompt([(question, None)]), views=[visual.shape[0]])
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *answer.tokens]])
            logits = sphinx.model(input_ids=ids, visual_tokens=visual).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=2e-4, rtol=2e-4)


# --- nothing twice ----------------------------------------------------------------------------------------------------
def test_a_picture_is_encoded_and_read_once_whatever_is_asked(sphinx: Watched, shared: Watched) -> None:
    questions = prompts(6, seed=3)
    head = len(sphinx.engine.runner.head)
    prefix = 1 + sphinx.model.config.vision_config.tokens_per_picture + head
    bos = len(sphinx.processor.prompt_ids(""))
    own = [len(sphinx.processor.prompt_ids(conversation_prompt([(q, None)]))) - bos - head for q in questions]
    steps = LONG["max_new_tokens"] - 1

    sphinx.ask_many(CAT, questions, **LONG)
    assert shared.counts() == (5, 1 + steps, prefix + sum(own) + 6 * steps)
    for index, question in enumerate(questions):  # follow-ups: no encoder, their own words only
        sphinx.ask(CAT, question, **LONG)
        assert shared.counts() == (0, 1 + steps, own[index] + steps)
    sphinx.ask_batch([(CAT, questions[0]), (COFFEE, questions[1])], **LONG)
    assert shared.counts() == (5, 1 + steps, own[0] + prefix + own[1] + 2 * steps)
    list(sphinx.stream(COFFEE, questions[2], max_new_tokens=1))
    assert shared.counts() == (0, 1, own[2])
    assert sphinx.picture_cache.stats().misses == 2


@pytest.mark.parametrize("cache", [None, 0])
def test_a_turn_computes_only_what_is_new(shared: Watched, cache: int | None) -> None:
    sphinx = Watched(shared.model, shared.processor, picture_cache=cache)
    talk, alone = sphinx.chat(CAT), Watched(shared.model, shared.processor, picture_cache=0)
    shared.counts()
    for turn, question in enumerate(prompts(4, seed=4)):
        before = conversation_prompt([*talk.turns, (question, None)])
        answer = talk.say(question, max_new_tokens=6)
        encoded, _, positions = shared.counts()
        assert encoded == (0 if turn else 5)
        length = len(sphinx.processor.prompt_ids(before, views=[5]))
        assert positions <= (length if not turn else len(question) + 40) + 5
        request = alone.engine.request(before, alone.engine.see(CAT), _greedy(6))
        list(alone.engine.serve([request]))
        assert request.answer().text == answer, turn
        shared.counts()
    talk.turns[1] = ("Something else", "entirely")  # what is in common is used, the rest computed anew
    changed = conversation_prompt([*talk.turns, ("And?", None)])
    request = alone.engine.request(changed, alone.engine.see(CAT), _greedy(6))
    list(alone.engine.serve([request]))
    shared.counts()
    assert talk.say("And?", max_new_tokens=6) == request.answer().text
    assert 0 < shared.counts()[2] < len(alone.processor.prompt_ids(changed))


def _greedy(count: int) -> Any:
    from sphinx_fast.infer import Sampling

    return Sampling(max_new_tokens=count)


def test_conversations_go_on_when_others_took_their_places(shared: Watched) -> None:
    sphinx = Watched(shared.model, shared.processor, picture_cache=0, max_rows=2)
    talks = [sphinx.chat(image) for image in (CAT, COFFEE, None, CAT, COFFEE, CAT)]
    alone = [Watched(shared.model, shared.processor, picture_cache=0).chat(i) for i in (CAT, COFFEE, None)]
    for question in ("What?", "Where is it?", "And the other?"):
        answers = [talk.say(question, max_new_tokens=5) for talk in talks]
        expected = [talk.say(question, max_new_tokens=5) for talk in alone]
        assert answers == [*expected, *expected[:2], expected[0]]
    assert sphinx.engine.runner.suffixes.slots <= 4 < len(talks), "two for each row at most"


def test_prefixes_are_under_the_bound_of_the_cache(shared: Watched) -> None:
    probe = Watched(shared.model, shared.processor)
    probe.ask(CAT, "a", max_new_tokens=1)
    slot, tokens = probe.engine.runner.prefixes.slot_bytes, probe.picture_cache.stats().bytes
    assert tokens > slot > 0
    sphinx = Watched(shared.model, shared.processor, picture_cache=tokens)  # one picture and no more
    shared.counts()
    for image, encoded in ((CAT, 5), (CAT, 0), (COFFEE, 5), (COFFEE, 0), (CAT, 5)):
        sphinx.ask(image, "What?", max_new_tokens=1)
        assert shared.counts()[0] == encoded
        assert sphinx.picture_cache.stats().bytes <= tokens
    assert sphinx.engine.runner.prefixes.slots <= 2
    sphinx.picture_cache.clear()
    sphinx.ask(CAT, "What?", max_new_tokens=1)
    assert shared.counts()[0] == 5


def test_changed_weights_are_not_answered_from_old_prefixes() -> None:
    sphinx = load()
    before = sphinx.ask(CAT, "What?", **LONG)
    with torch.no_grad():
        for parameter in sphinx.model.model.language_model.layers[0].parameters():
            parameter.mul_(-1.5)
    sphinx.counts()
    changed = sphinx.ask(CAT, "What?", **LONG)
    assert sphinx.counts()[0] == 0, "the encoders have not changed"
    assert changed != before
    assert changed == Watched(sphinx.model, sphinx.processor, picture_cache=0).ask(CAT, "What?", **LONG)


def test_pictures_with_views_left_out_share_a_pass(shared: Watched) -> None:
    processor = copy.deepcopy(shared.processor)
    processor.image_processor.skip_padding = True
    wide = np.zeros((20, 300, 3), np.uint8)
    wide[:, 100:180] = 200
    sphinx = Watched(shared.model, processor)
    pairs: list[Any] = [(wide, "What?"), (CAT, "What?"), (wide.transpose(1, 0, 2).copy(), "Where?"), (wide, "And?")]
    together = sphinx.ask_batch(pairs, **LONG)
    alone = Watched(shared.model, processor, picture_cache=0)
    assert together == [alone.ask(*pair, **LONG) for pair in pairs]


def test_random_views_are_shared_by_the_questions_of_a_call_and_by_nobody_else(shared: Watched) -> None:
    processor = copy.deepcopy(shared.processor)
    processor.image_processor.transform = "random_resized_crop"
    sphinx = Watched(shared.model, processor)
    square = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    shared.counts()
    answers = sphinx.ask_many(square, ["What?", "What?", "What?"], **LONG)
    assert shared.counts()[0] == 5 and len(set(answers)) == 1
    sphinx.ask(square, "What?", **LONG)
    assert shared.counts()[0] == 5 and sphinx.picture_cache.stats().entries == 0


# --- errors, streams, threads -----------------------------------------------------------------------------------------
def test_a_bad_pair_costs_itself_only(sphinx: Watched, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(CAT.read_bytes()[:200])
    pairs: list[Any] = [(CAT, "a"), (broken, "b"), (COFFEE, "word " * 5000), (tmp_path / "no.png", "c"), (None, "d")]
    found = sphinx.ask_batch(pairs, return_exceptions=True, **LONG)
    assert [type(one) is str for one in found] == [True, False, False, False, True]
    assert all(isinstance(one, Exception) for one in found[1:4]) and "leaves no room" in str(found[2])
    assert (found[0], found[4]) == (sphinx.ask(CAT, "a", **LONG), sphinx.ask(None, "d", **LONG))
    for bad in (1, 2, 3):
        with pytest.raises(ValueError, match=f"pair 1: {found[bad]}".split("\n")[0][:30]):
            sphinx.ask_batch([pairs[0], pairs[bad]], **LONG)
    with pytest.raises(ValueError, match="question 1: the prompt takes"):
        sphinx.ask_many(CAT, ["a", "word " * 5000])
    assert not sphinx.engine.scheduler.running and not sphinx.engine.scheduler.waiting


def test_pieces_of_many_come_side_by_side_and_one_can_be_given_up(sphinx: Watched) -> None:
    questions = prompts(4, seed=6)
    settings: dict[str, Any] = {"max_new_tokens": 30, "stop": ()}
    whole = sphinx.ask_many(CAT, questions, **settings)
    pieces: list[list[str]] = [[], [], [], []]
    order = []
    batch = sphinx.stream_many(CAT, questions, **settings)
    for index, piece in batch:
        pieces[index].append(piece)
        order.append(index)
        if len(pieces[2]) == 3:
            batch.cancel(2)
    assert len({*order[:12]}) == 4, "all four speak from the beginning"
    texts = ["".join(parts) for parts in pieces]
    assert [texts[k] for k in (0, 1, 3)] == [whole[k] for k in (0, 1, 3)]
    assert whole[2].startswith(texts[2]) and len(texts[2]) < len(whole[2])
    stopped = sphinx.stream_many(CAT, questions, **settings)
    next(stopped)
    stopped.close()
    assert list(stopped) == [] and not sphinx.engine.scheduler.running


def test_a_stream_that_is_closed_or_dropped_leaves(sphinx: Watched) -> None:
    stream = sphinx.stream(CAT, "What?", max_new_tokens=200, stop=())
    next(stream)
    assert len(sphinx.engine.scheduler.running) == 1
    stream.close()  # type: ignore[attr-defined]
    assert sphinx.engine.scheduler.running == []
    stream = sphinx.stream(CAT, "What?", max_new_tokens=200, stop=())
    next(stream)
    del stream
    assert sphinx.engine.scheduler.running == []
    talk = sphinx.chat(CAT)
    said = talk.stream("What?", max_new_tokens=200, stop=())
    next(said)
    said.close()  # type: ignore[attr-defined]
    assert talk.turns == [] and sphinx.engine.scheduler.running == []
    assert talk.say("What?", **LONG) == sphinx.ask(CAT, "What?", **LONG)


def test_two_streams_that_are_read_in_turn_do_not_disturb_each_other(sphinx: Watched) -> None:
    expected = [sphinx.ask(CAT, "What?", **LONG), sphinx.ask(COFFEE, "Where?", **LONG)]
    streams = [sphinx.stream(CAT, "What?", **LONG), sphinx.stream(COFFEE, "Where?", **LONG)]
    texts = ["", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == expected


def test_threads_that_ask_at_once_decode_together(shared: Watched) -> None:
    sphinx = Watched(shared.model, shared.processor)
    questions = prompts(16, seed=7)
    expected = sphinx.ask_many(CAT, questions, **LONG)
    start = threading.Barrier(16)
    shared.counts()

    def ask(question: str) -> str:
        start.wait()
        return str(sphinx.ask(CAT, question, **LONG))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, questions)) == expected
    assert shared.counts()[1] < 16 * LONG["max_new_tokens"] // 2, "they waited for one another instead"


def test_an_error_in_a_pass_is_raised_and_the_next_question_is_answered(
    sphinx: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sphinx.ask(CAT, "What?", **LONG)
    runner = sphinx.engine.runner
    for name in ("prefill", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(runner.model.lm_head, "forward", _fails)
            with pytest.raises(RuntimeError, match="out of order"):
                sphinx.ask(COFFEE if name == "prefill" else CAT, "What?", **LONG)
        assert sphinx.ask(CAT, "What?", **LONG) == expected
    alone = Watched(sphinx.model, sphinx.processor, picture_cache=0)
    assert sphinx.ask(COFFEE, "What?", **LONG) == alone.ask(COFFEE, "What?", **LONG)


def test_a_language_model_with_layers_of_another_kind_is_refused(
    sphinx: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.cumsum(1), None  # sees whatever stands before it in the row

    with monkeypatch.context() as patch:
        patch.setattr(sphinx.model.model.language_model.layers[1].self_attn, "forward", forward)
        with pytest.raises(ValueError, match="LlamaModel: 1 of 2 layers attend through"):
            sphinx.ask(CAT, "What?", **LONG)
    assert sphinx.ask(CAT, "What?", **LONG)


def _fails(*_: Any) -> Tensor:
    raise RuntimeError("out of order")


def test_an_interrupted_pass_loses_nothing(sphinx: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sphinx.ask(CAT, "What?", max_new_tokens=12, stop=())
    runner = sphinx.engine.runner
    real = runner._choose
    for at in (1, 5):
        calls = itertools.count()

        def interrupted(*given: Any, at: int = at, calls: Iterator[int] = calls) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt
            real(*given)

        other = sphinx.stream(CAT, "What?", max_new_tokens=12, stop=())
        text = next(other)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runner, "_choose", interrupted)
            sphinx.ask(CAT, "Where is it?", max_new_tokens=12, stop=())
        assert text + "".join(other) == whole
    assert sphinx.ask(CAT, "What?", max_new_tokens=12, stop=()) == whole
