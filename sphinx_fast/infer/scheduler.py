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
        """One pass over the prompts of admitted requests; their first tokens."""

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
        self.model, self.max_rows, self.max_prompt_tokens = model, max_rows, max_prompt_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._coming: deque[Request] = deque()  # from any thread, at any time; all else belongs to who has the lock
        self._lock = threading.Lock()

    def serve(self, requests: Iterable[Request], pieces: bool = False) -> Iterator[Request]:
        """Requests, asked for only as there is room for them -> each as it is done; with `pieces`, whenever it has one.

        Closing the iterator cancels those that are not done.
        """
        coming, own = iter(requests), list[Request]()

        def ready() -> list[Request]:
            return [request for request in own if request.done or (pieces and request.news)]

        try:
            while True:
                for request in islice(coming, 2 * self.max_rows - len(own)):
                    own.append(request)
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
        # A finalizer may call this in the middle of a step of the same thread. Then the next step sees to it.
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

    def step(self) -> None:
        """Those who fit join, in one pass over their prompts; then everybody who runs gets a token."""
        while self._coming:
            self.waiting.append(self._coming.popleft())
        self._leave()
        joined = self._join()
        if joined:
            self._compute(self.model.prefill, joined)
            self.running += joined
            self._leave()
        if self.running:
            self._compute(self.model.decode, self.running)
            self._leave()

    def _join(self) -> list[Request]:
        joined: list[Request] = []
        tokens = 0
        while self.waiting and len(self.running) + len(joined) < self.max_rows:
            request = self.waiting[0]
            if tokens >= self.max_prompt_tokens:
                break
            try:
                if not self.model.admit(request):
                    break
            except Exception as error:
                request.finish(error)
            else:
                joined.append(request)
                tokens += request.new_tokens
            self.waiting.popleft()
        return joined

    def _compute(self, work: Callable[[Sequence[Request]], None], requests: Sequence[Request]) -> None:
        """An error in a pass is the error of all who took part; an interruption leaves them as they were."""
        try:
            work(requests)
        except Exception as error:
            for request in requests:
                request.finish(error)
        except BaseException:
            if work == self.model.prefill:
                for request in reversed(requests):
                    if request.tokens or request.done:  # it has what the pass was for
                        self.running.append(request)
                    else:
                        request.release()
                        self.waiting.appendleft(request)
            raise

    def _leave(self) -> None:
        """Requests that are done or cancelled."""
        for request in [*self.waiting, *self.running]:
            if request.cancelled and not request.done:
                request.finish()
        self.waiting = deque(request for request in self.waiting if not request.done)
        for request in self.running:
            if request.done:
                request.release()
        self.running = [request for request in self.running if not request.done]
