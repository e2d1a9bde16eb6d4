"""Continuous batching: requests join and leave between steps, and whoever waits for one drives the steps for all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from sphinx_fast.infer.request import Request


class Model(Protocol):
    """What the scheduler schedules."""

    def admit(self, request: Request) -> bool:
        """Give a request its places; False: there are none at the moment."""

    def prefill(self, requests: Sequence[Request]) -> None:
        """One pass over the prompts of admitted requests; their first tokens, or their ends."""

    def decode(self, requests: Sequence[Request]) -> None:
        """The next token of each."""


class Scheduler:
    """Who computes next. Safe to use from many threads: there is no thread of its own.

    Args:
        model: places and passes.
        max_rows: requests that run at once.
        max_prompt_tokens: when the prompts of those who join in a step have as many, others join later.
    """

    def __init__(self, model: Model, max_rows: int, max_prompt_tokens: int) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        self.model, self.max_rows, self.max_prompt_tokens = model, max_rows, max_prompt_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # all that have places; those without a token wait for their prompt's pass
        self._coming: deque[Request] = deque()  # from any thread, at any time; all else belongs to who has the lock
        self._lock = threading.Lock()

    def serve(self, requests: Iterable[Request], pieces: bool = False) -> Iterator[Request]:
        """Requests, asked for only as there is room for them -> each as it is done; with `pieces`, whenever it has one.

        With `pieces` a request comes again until it is seen done. Closing the iterator cancels those that are not done.
        """
        coming, own = iter(requests), list[Request]()

        def ready() -> list[Request]:
            return [request for request in own if request.done or (pieces and request.news)]

        try:
            while True:
                for request in islice(coming, 2 * self.max_rows - len(own)):
                    own.append(request)
                    if not request.done:
                        self._coming.append(request)
                if not own:
                    return
                self._drive(ready)
                for request in ready():
                    if request.done:
                        own.remove(request)
                    yield request
        finally:
            for request in own:
                self.cancel(request)

    def cancel(self, request: Request) -> None:
        """Give up a request; what it has said so far is its answer."""
        request.cancelled = True
        self._tidy()

    def _tidy(self) -> None:
        """Lets go of requests that were cancelled, unless someone has the lock: then they do it when they are done.

        A finalizer may come here in the middle of anything, a step of the same thread too, so nothing is waited for.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._leave()
            finally:
                self._lock.release()

    def _drive(self, ready: Callable[[], object]) -> None:
        while not ready():
            with self._lock:
                if not ready():
                    self.step()
        self._tidy()

    def step(self) -> None:
        """Those who fit join, in one pass over their prompts; then everybody who runs gets a token."""
        self._leave()
        self._join()
        if joined := [request for request in self.running if not request.tokens]:
            self._compute(self.model.prefill, joined)
            self._leave()
        if self.running:
            self._compute(self.model.decode, self.running)
            self._leave()

    def _join(self) -> None:
        tokens = 0
        while self.waiting and len(self.running) < self.max_rows and tokens < self.max_prompt_tokens:
            request = self.waiting[0]
            try:
                if self.model.admit(request):
                    self.running.append(request)
                    tokens += request.new_tokens
                elif self.running:
                    break  # until one of them leaves
                else:
                    request.finish(RuntimeError("there is no place for this request's keys and values"))
            except Exception as error:
                request.finish(error)
            self.waiting.popleft()

    def _compute(self, work: Callable[[Sequence[Request]], None], requests: Sequence[Request]) -> None:
        """An error in a pass is the error of all who took part. After an interruption the next step repeats it."""
        try:
            work(requests)
        except Exception as error:
            for request in requests:
                request.finish(error)

    def _leave(self) -> None:
        """Requests that are done or cancelled."""
        while self._coming:
            self.waiting.append(self._coming.popleft())
        for request in [*self.waiting, *self.running]:
            if request.cancelled and not request.done:
                request.finish()
        self.waiting = deque(request for request in self.waiting if not request.done)
        for request in self.running:
            if request.done:
                request.release()
        self.running = [request for request in self.running if not request.done]
