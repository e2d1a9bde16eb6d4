"""Who computes next: joining, leaving, errors, interruptions and threads, with a model that only counts."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from sphinx_fast.infer.batch import Batch
from sphinx_fast.infer.request import Request
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.infer.scheduler import Scheduler

SECONDS = 20  # until a thread that is still alive counts as stuck


class Letters:
    """A tokenizer: token 0 is a, 1 is b."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


class Place:
    """A slot that knows how often it was given back."""

    def __init__(self) -> None:
        self.length, self.ids, self.released = 0, [0], 0

    def release(self) -> None:
        self.released += 1


class Counting:
    """A model whose answer to request n is the letters from n on, so a token that is lost or comes twice is seen."""

    def __init__(self, places: int = 1000) -> None:
        self.places, self.given = places, list[Any]()
        self.passes: list[tuple[str, list[int]]] = []
        self.fail: Callable[[str, Sequence[Request]], None] = lambda work, requests: None
        self.halfway: Callable[[str, Request], None] = lambda work, request: None

    def admit(self, request: Request) -> bool:
        self.fail("admit", [request])
        if sum(not place.released for place in self.given) >= self.places:
            return False
        place: Any = Place()
        request.suffix = place
        self.given.append(place)
        return True

    def prefill(self, requests: Sequence[Request]) -> None:
        assert not any(request.tokens for request in requests), "a prompt is read once"
        self._add("prefill", requests)

    def decode(self, requests: Sequence[Request]) -> None:
        assert all(request.tokens for request in requests), "a prompt is read first"
        self._add("decode", requests)

    def _add(self, work: str, requests: Sequence[Request]) -> None:
        places: list[Any] = [request.place for request in requests]
        assert places and not any(place.released for place in places) and not any(one.done for one in requests)
        self.passes.append((work, [request.ids[0] for request in requests]))
        self.fail(work, requests)
        for request in requests:
            self.halfway(work, request)
            request.add((request.ids[0] + len(request.tokens)) % 26, 0.0, ends=False)

    def check(self) -> None:
        assert [place.released for place in self.given] == [1] * len(self.given), "places are given back exactly once"


class Stuck(BaseException):
    """Requests wait and nobody computes."""


class Watched(Scheduler):
    """A scheduler that says so instead of running in circles."""

    model: Any
    idle = 0

    def step(self) -> None:
        before = len(self.model.passes), len(self.waiting), len(self.running)
        super().step()
        after = len(self.model.passes), len(self.waiting), len(self.running)
        self.idle = self.idle + 1 if before == after else 0
        if self.idle > 100:
            raise Stuck


def asked(number: int, tokens: int = 3, prompt: int = 1) -> Request:
    return Request([number] * prompt, None, Sampling(max_new_tokens=tokens, stop=()), Letters(), 1000)


def said(request: Request) -> str:
    return request.answer().text


def expected(number: int, tokens: int = 3) -> str:
    return Letters().decode([(number + index) % 26 for index in range(tokens)])


@pytest.fixture
def model() -> Iterator[Counting]:
    counting = Counting()
    yield counting
    counting.check()


def together(*functions: Callable[[], Any]) -> None:
    """Runs each in a thread of its own; raises what they raise, and a Stuck when one does not come back."""
    errors: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    end = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise Stuck


def test_requests_join_and_leave_between_steps(model: Counting) -> None:
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    requests = [asked(0, 2), asked(1, 4), asked(2, 2)]
    assert [request.ids[0] for request in scheduler.serve(requests)] == [0, 2, 1]  # as each is done
    assert [said(request) for request in requests] == [expected(0, 2), expected(1, 4), expected(2, 2)]
    assert model.passes == [
        ("prefill", [0, 1]), ("decode", [0, 1]), ("prefill", [2]), ("decode", [1, 2]), ("decode", [1]),
    ]  # fmt: skip


def test_an_answer_of_one_token_never_decodes(model: Counting) -> None:
    scheduler = Watched(model, max_rows=8, max_prompt_tokens=100)
    assert [said(request) for request in scheduler.serve([asked(n, 1) for n in range(3)])] == ["a", "b", "c"]
    assert model.passes == [("prefill", [0, 1, 2])]


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_never_more_than_max_rows_compute(model: Counting, rows: int) -> None:
    scheduler = Watched(model, max_rows=rows, max_prompt_tokens=100)
    done = list(scheduler.serve(asked(n, 1 + n % 5) for n in range(40)))
    assert sorted(request.ids[0] for request in done) == list(range(40))
    assert all(said(request) == expected(request.ids[0], 1 + request.ids[0] % 5) for request in done)
    assert max(len(numbers) for _, numbers in model.passes) == rows


def test_prompts_of_one_pass_are_bounded_and_a_longer_one_still_comes(model: Counting) -> None:
    scheduler = Watched(model, max_rows=8, max_prompt_tokens=10)
    assert len(list(scheduler.serve([asked(n, 5, prompt=length) for n, length in enumerate([4, 4, 4, 4, 30, 4])]))) == 6
    assert [numbers for work, numbers in model.passes if work == "prefill"] == [[0, 1, 2], [3, 4], [5]]


def test_who_finds_no_place_waits_for_one(model: Counting) -> None:
    model.places = 2
    scheduler = Watched(model, max_rows=8, max_prompt_tokens=100)
    assert [request.ids[0] for request in scheduler.serve([asked(n) for n in range(6)])] == list(range(6))
    assert max(len(numbers) for _, numbers in model.passes) == 2


def test_a_place_that_comes_late_is_waited_for(model: Counting) -> None:
    model.places = 1
    scheduler = Watched(model, max_rows=8, max_prompt_tokens=100)
    first, second = asked(4, 5), asked(5)
    scheduler._coming.extend([first, second])
    for _ in range(3):
        scheduler.step()
    assert list(scheduler.waiting) == [second] and scheduler.running == [first]
    assert [said(one) for one in scheduler.serve([asked(6)])] == [expected(6)]
    assert (said(first), said(second)) == (expected(4, 5), expected(5))


def test_a_place_that_cannot_come_is_an_error(model: Counting) -> None:
    model.places = 0
    scheduler = Watched(model, max_rows=8, max_prompt_tokens=100)
    for request in scheduler.serve([asked(1), asked(2)]):
        with pytest.raises(RuntimeError, match="there is no place"):
            request.answer()
    assert not scheduler.waiting and not model.passes


def test_requests_are_asked_for_as_there_is_room(model: Counting) -> None:
    scheduler = Watched(model, max_rows=3, max_prompt_tokens=100)
    made = 0

    def feed() -> Iterator[Request]:
        nonlocal made
        for number in range(50):
            made += 1
            yield asked(number, 1 + number % 4)

    for count, _ in enumerate(scheduler.serve(feed()), 1):
        assert made <= count - 1 + 2 * scheduler.max_rows + scheduler.max_rows  # some of the done are still to be seen
    assert made == 50


def test_pieces_join_to_the_answer_and_the_end_comes_once(model: Counting) -> None:
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    pieces: dict[Request, str] = {}
    ends: list[Request] = []
    for request in scheduler.serve([asked(n, 4) for n in range(5)], pieces=True):
        assert request not in ends
        pieces[request] = pieces.get(request, "") + request.take()
        ends += [request] if request.done else []
    assert [pieces[request] for request in ends] == [expected(n, 4) for n in range(5)]


def test_nothing_to_do_is_done_at_once(model: Counting) -> None:
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    assert list(scheduler.serve([])) == []
    failed = Request.failed(KeyError("x"))
    assert list(scheduler.serve([failed])) == [failed]
    assert not model.passes and not scheduler._coming


def test_rows_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="max_rows: expected at least 1, got 0"):
        Scheduler(Counting(), 0, 100)


# --- errors -----------------------------------------------------------------------------------------------------------
def test_an_error_in_admit_is_that_requests(model: Counting) -> None:
    def fail(work: str, requests: Sequence[Request]) -> None:
        if work == "admit" and requests[0].ids[0] == 1:
            raise MemoryError("one")

    model.fail = fail
    requests = [asked(n) for n in range(3)]
    assert len(list(Watched(model, 8, 100).serve(requests))) == 3
    assert [type(request.error) for request in requests] == [type(None), MemoryError, type(None)]
    assert [said(request) for request in (requests[0], requests[2])] == [expected(0), expected(2)]


@pytest.mark.parametrize("work", ["prefill", "decode"])
def test_an_error_in_a_pass_is_that_of_all_in_it_and_of_nobody_else(model: Counting, work: str) -> None:
    def fail(done: str, requests: Sequence[Request]) -> None:
        if done == work and any(request.ids[0] == 2 for request in requests):
            raise RuntimeError("two")

    model.fail = fail
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    requests = [asked(n) for n in range(6)]
    assert len(list(scheduler.serve(requests))) == 6
    failed = [request.ids[0] for request in requests if request.error is not None]
    assert failed == [2, 3]
    assert all(said(request) == expected(request.ids[0]) for request in requests if request.error is None)
    with pytest.raises(RuntimeError, match="two"):
        requests[2].answer()


def test_an_error_halfway_through_a_pass_leaves_no_place_taken(model: Counting) -> None:
    def halfway(work: str, request: Request) -> None:
        if work == "prefill" and request.ids[0] == 1:
            raise RuntimeError("one")

    model.halfway = halfway
    scheduler = Watched(model, max_rows=4, max_prompt_tokens=100)
    assert all(request.error is not None for request in scheduler.serve([asked(0, 1), asked(1), asked(2)]))
    assert not scheduler.running and not scheduler.waiting


def test_a_feed_that_raises_cancels_what_it_gave(model: Counting) -> None:
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    given = []

    def feed(good: int) -> Iterator[Request]:
        for number in range(good):
            given.append(asked(number, 50))
            yield given[-1]
        raise KeyError("feed")

    for good in (0, 3, 4, 10):
        with pytest.raises(KeyError, match="feed"):
            list(scheduler.serve(feed(good)))
        assert not scheduler._coming and not scheduler.waiting and not scheduler.running
    assert all(request.done and request.error is None for request in given)


# --- interruptions ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("where", ["admit", "prefill", "decode", "halfway"])
def test_an_interruption_loses_nothing(model: Counting, where: str, rows: int) -> None:
    """At the first, second, .. moment: whoever comes next goes on, and every answer is what it would have been."""
    moment, interrupted = 0, True
    while interrupted:
        moment, interrupted = moment + 1, False
        seen = 0

        def interrupt(work: str, *_: Any, at: int = moment) -> None:
            nonlocal seen
            seen += work == where
            if work == where and seen == at:
                raise KeyboardInterrupt

        model.fail = interrupt
        model.halfway = lambda *_, interrupt=interrupt: interrupt("halfway")
        scheduler = Watched(model, rows, 100)
        requests = [asked(n, 1 + n % 3) for n in range(5)]
        scheduler._coming.extend(requests)
        for number in range(20, 24):  # whose reader is interrupted gives up
            try:
                assert [said(request) for request in scheduler.serve([asked(number, 5)])] == [expected(number, 5)]
            except KeyboardInterrupt:
                interrupted = True
        assert [said(request) for request in requests] == [expected(n, 1 + n % 3) for n in range(5)]
        assert not scheduler.waiting and not scheduler.running
        model.check()
    assert moment > 3


# --- leaving early ----------------------------------------------------------------------------------------------------
def test_cancelling_keeps_what_was_said_and_the_others_go_on(model: Counting) -> None:
    scheduler = Watched(model, max_rows=4, max_prompt_tokens=100)
    requests = [asked(n, 20) for n in range(3)]
    for count, request in enumerate(scheduler.serve(requests, pieces=True), 1):
        request.take()
        if count == 9:
            scheduler.cancel(requests[1])
    assert said(requests[0]) == expected(0, 20) and said(requests[2]) == expected(2, 20)
    assert said(requests[1]) == expected(1, len(requests[1].tokens)) and 0 < len(requests[1].tokens) < 20


@pytest.mark.parametrize("waiting", [True, False])
def test_a_finalizer_may_cancel_in_the_middle_of_a_step(model: Counting, waiting: bool) -> None:
    scheduler = Watched(model, max_rows=1 if waiting else 2, max_prompt_tokens=100)
    requests = [asked(0, 6), asked(1, 6)]

    def fail(work: str, computed: Sequence[Request]) -> None:
        if work == "decode":
            scheduler.cancel(requests[1])

    model.fail = fail
    assert {request.ids[0] for request in scheduler.serve(requests)} == {0, 1}
    assert said(requests[0]) == expected(0, 6) and len(requests[1].tokens) < 3


def test_what_is_cancelled_while_the_last_step_ends_leaves_with_it(
    model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever cancels while another has the lock does not wait, and nobody may come after that one."""
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    other = asked(1, 20)
    scheduler._coming.append(other)
    release = Place.release

    def cancelling(place: Place) -> None:
        release(place)
        scheduler.cancel(other)

    monkeypatch.setattr(Place, "release", cancelling)
    list(scheduler.serve([asked(0, 3)]))
    assert other.done and not scheduler.running


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("pieces", [True, False])
def test_an_iterator_that_is_closed_or_dropped_frees_its_rows(model: Counting, pieces: bool, close: bool) -> None:
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    gc.disable()
    try:
        requests = [asked(n, 1 + 10 * n) for n in range(4)]
        serving: Any = scheduler.serve(requests, pieces)
        assert next(serving) is requests[0]
        if close:
            serving.close()
        del serving
        assert not scheduler.running and not scheduler.waiting and not scheduler._coming
    finally:
        gc.enable()
    assert all(request.done for request in requests)


class Asking:
    """What a batch needs of an engine."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.serve, self.cancel = scheduler.serve, scheduler.cancel


def batch(scheduler: Scheduler, requests: Sequence[Request]) -> Batch:
    engine: Any = Asking(scheduler)
    return Batch(engine, [partial(lambda one: one, request) for request in requests], "question")


@pytest.mark.parametrize("close", [True, False])
def test_a_batch_that_is_closed_or_dropped_frees_its_rows(model: Counting, close: bool) -> None:
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    gc.disable()
    try:
        many = batch(scheduler, [asked(n, 10) for n in range(4)])
        assert next(many)[0] == 0
        if close:
            many.close()
            assert list(many) == []
        del many
        assert not scheduler.running and not scheduler.waiting
    finally:
        gc.enable()


def test_a_batch_that_is_closed_before_it_began_asks_nothing(model: Counting) -> None:
    many = batch(Watched(model, 2, 100), [asked(0)])
    many.close()
    assert list(many) == [] and not model.given


def test_pieces_are_whole_when_others_drive_while_they_are_read(model: Counting) -> None:
    """Between two pieces a reader may ask something else, and the answer it reads is done before it looks again."""
    scheduler = Watched(model, max_rows=4, max_prompt_tokens=100)
    read = {0: "", 1: ""}
    for index, piece in batch(scheduler, [asked(0, 8), asked(1, 9)]):
        read[index] += piece
        list(scheduler.serve([asked(2, 1 + len(read[0]))]))
    assert read == {0: expected(0, 8), 1: expected(1, 9)}


def test_who_is_done_while_others_are_looked_at_comes_too(model: Counting) -> None:
    """Between two looks at its requests another thread may finish one of them."""

    class Looked(Request):
        looks = at = 0

        @property
        def done(self) -> bool:
            self.looks += 1
            if self.looks == self.at:
                scheduler.cancel(self)
            return self.ended

        @done.setter
        def done(self, value: bool) -> None:
            self.ended = value

    for moment in range(1, 40):
        scheduler = Watched(model, max_rows=4, max_prompt_tokens=100)
        looked = Looked([1], None, Sampling(max_new_tokens=9, stop=()), Letters(), 1000)
        looked.at = moment
        assert sorted(request.ids[0] for request in scheduler.serve([asked(0, 2), looked])) == [0, 1]


# --- threads ----------------------------------------------------------------------------------------------------------
def test_threads_that_ask_at_once_compute_together(model: Counting) -> None:
    scheduler = Watched(model, max_rows=8, max_prompt_tokens=100)
    model.fail = lambda work, requests: time.sleep(0.002)

    def one(number: int) -> Callable[[], None]:
        def run() -> None:
            assert [said(request) for request in scheduler.serve([asked(number, 30)])] == [expected(number, 30)]

        return run

    together(*(one(number) for number in range(8)))
    assert len(model.passes) < 8 * 30 / 2


def test_no_reader_waits_while_another_one_drives(model: Counting) -> None:
    """Pieces come as they are made, whoever made them, and not all in the end."""
    scheduler = Watched(model, max_rows=8, max_prompt_tokens=100)
    model.fail = lambda work, requests: time.sleep(0.001)
    sizes: list[int] = []

    def reader(number: int) -> Callable[[], None]:
        def run() -> None:
            for request in scheduler.serve([asked(number, 150)], pieces=True):
                sizes.append(len(request.take()))

        return run

    together(*(reader(number) for number in range(4)))
    assert sum(sizes) == 4 * 150 and max(sizes) < 75


def test_cancelling_from_another_thread_ends_the_wait(model: Counting) -> None:
    scheduler = Watched(model, max_rows=2, max_prompt_tokens=100)
    model.fail = lambda work, requests: time.sleep(0.0005)
    request = asked(3, 900)

    def cancel() -> None:
        while len(request.tokens) < 5:
            time.sleep(0.0005)
        scheduler.cancel(request)

    together(lambda: list(scheduler.serve([request])), cancel)
    assert 5 <= len(request.tokens) < 900 and said(request) == expected(3, len(request.tokens))


def test_many_threads_asking_reading_and_leaving(model: Counting) -> None:
    """Drawn delays, cancels, errors, closed and dropped iterators: whoever waits gets every answer once, and whole."""
    scheduler = Watched(model, max_rows=5, max_prompt_tokens=12)
    model.places = 7
    chance = random.Random(3)

    def fail(work: str, requests: Sequence[Request]) -> None:
        if chance.random() < 0.3:
            time.sleep(chance.random() * 1e-3)
        if chance.random() < 0.01:
            raise RuntimeError("drawn")

    model.fail = fail
    counts = dict.fromkeys(("answered", "failed", "cancelled", "left"), 0)
    lock = threading.Lock()

    def note(what: str) -> None:
        with lock:
            counts[what] += 1

    def check(request: Request, cancelled: bool, text: str | None = None) -> None:
        if request.error is not None:
            assert request.error.args == ("drawn",)
            return note("failed")
        length = len(request.tokens)
        assert said(request) == expected(request.ids[0], length) and text in (None, said(request))
        assert cancelled or length == request.most
        note("cancelled" if cancelled else "answered")

    def client(seed: int) -> Callable[[], None]:
        def run() -> None:
            drawn = random.Random(seed)
            for _ in range(25):
                requests = [
                    asked(drawn.randrange(26), drawn.randint(1, 12), drawn.randint(1, 6))
                    for _ in range(drawn.randint(1, 9))
                ]
                pieces, given_up, texts = drawn.random() < 0.5, set(), dict.fromkeys(requests, "")
                serving, left, ends = scheduler.serve(iter(requests), pieces), drawn.random() < 0.2, list[Request]()
                for request in serving:
                    done = request.done
                    if pieces:
                        texts[request] += request.take()
                    if done:
                        ends.append(request)
                    if drawn.random() < 0.1:
                        given_up.add(one := drawn.choice(requests))
                        scheduler.cancel(one)
                    if drawn.random() < 0.2:
                        time.sleep(drawn.random() * 1e-3)
                    if left and drawn.random() < 0.1:
                        note("left")
                        break
                else:
                    assert set(ends) == set(requests) and (pieces or len(ends) == len(requests))
                    for request in requests:
                        check(request, request in given_up, texts[request] if pieces else None)
                del serving

        return run

    together(*(client(seed) for seed in range(8)))
    assert not scheduler.running and not scheduler.waiting and scheduler._coming == deque()
    assert min(counts.values()) > 0, counts
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
