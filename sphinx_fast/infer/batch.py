"""Questions answered together: all answers in order, or pieces as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NoReturn

from sphinx_fast.infer.engine import Engine
from sphinx_fast.infer.request import Answer, Request


class Batch:
    """Questions that share an engine's steps, with each other and with whoever else asks.

    Args:
        engine: answers them.
        asked: makes the request of each, when its turn comes. What goes wrong is that question's error.
        name: of a question in error messages: "pair 3: ..."; None: errors are raised as they are.
    """

    def __init__(self, engine: Engine, asked: Iterable[Callable[[], Request]], name: str | None) -> None:
        self._engine, self._asked, self._name = engine, asked, name
        self._open: dict[Request, int] = {}
        self._cancelled: set[int] = set()
        self._stream: Generator[tuple[int, str]] | None = None

    def _requests(self) -> Iterator[Request]:
        for index, make in enumerate(self._asked):
            if index in self._cancelled:
                continue
            try:
                request = make()
            except Exception as error:
                request = Request.failed(error)
            self._open[request] = index
            yield request

    def answers(self, return_exceptions: bool = False) -> list[Answer | Exception]:
        """All answers in the order of the questions; with `return_exceptions` an error in the place of its answer."""
        found: dict[int, Answer | Exception] = {}
        for request in self._engine.serve(self._requests()):
            index = self._open.pop(request)
            if request.error is not None and not return_exceptions:
                self._refuse(index, request.error)
            found[index] = request.error or request.answer()
        return [found[index] for index in sorted(found)]

    def cancel(self, index: int) -> None:
        """Give up one question while pieces are read; the others go on. What was said of its answer is said."""
        self._cancelled.add(index)
        for request, number in self._open.items():
            if number == index:
                self._engine.cancel(request)

    def close(self) -> None:
        """Give up all that are not answered yet."""
        if self._stream is not None:
            self._stream.close()

    def texts(self) -> Iterator[str]:
        """The pieces alone. Closing this iterator gives up all that are not answered yet."""
        try:
            for _, piece in self:
                yield piece
        finally:
            self.close()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        """(index of the question, next piece of its answer)."""
        if self._stream is None:
            self._stream = self._pieces()
        return next(self._stream)

    def _pieces(self) -> Generator[tuple[int, str]]:
        for request in self._engine.serve(self._requests(), pieces=True):
            index = self._open.get(request, -1)
            if index < 0:  # it ended between two looks at it, and that was noticed then
                continue
            if piece := request.take():
                yield index, piece
            if request.done:
                del self._open[request]
                if request.error is not None:
                    self._refuse(index, request.error)

    def _refuse(self, index: int, error: Exception) -> NoReturn:
        if self._name is None:
            raise error
        kind = ValueError if isinstance(error, (ValueError, TypeError, OSError)) else RuntimeError
        raise kind(f"{self._name} {index}: {error}") from error
