"""Questions answered together: all answers in order, or pieces as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from sphinx_fast.infer.engine import Engine
from sphinx_fast.infer.request import Answer, Request


@dataclass
class _Asked:
    """The requests of a batch while they are served. Generators refer to this and not to the batch that refers to them,
    so a batch that is dropped is closed at once and not by the next garbage collection.
    """

    makes: Iterable[Callable[[], Request]]
    open: dict[Request, int] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)

    def __iter__(self) -> Iterator[Request]:
        for index, make in enumerate(self.makes):
            if index in self.cancelled:
                continue
            try:
                request = make()
            except Exception as error:
                request = Request.failed(error)
            self.open[request] = index
            request.cancelled = index in self.cancelled  # meanwhile
            yield request


class Batch:
    """Questions that share an engine's steps, with each other and with whoever else asks.

    Args:
        engine: answers them.
        asked: makes the request of each, when its turn comes. What goes wrong is that question's error.
        name: of a question in error messages: "pair 3: ..."; None: errors are raised as they are.
    """

    def __init__(self, engine: Engine, asked: Iterable[Callable[[], Request]], name: str | None) -> None:
        self._engine, self._asked, self._name = engine, _Asked(asked), name
        self._stream = _pieces(engine, self._asked, name)

    def answers(self, return_exceptions: bool = False) -> list[Answer | Exception]:
        """All answers in the order of the questions; with `return_exceptions` an error in the place of its answer."""
        found: dict[int, Answer | Exception] = {}
        for request in self._engine.serve(self._asked):
            index = self._asked.open.pop(request)
            if request.error is not None and not return_exceptions:
                _refuse(self._name, index, request.error)
            found[index] = request.error or request.answer()
        return [found[index] for index in sorted(found)]

    def cancel(self, index: int) -> None:
        """Give up one question while pieces are read; the others go on. What was said of its answer is said."""
        self._asked.cancelled.add(index)
        for request, number in list(self._asked.open.items()):  # a copy: another thread may be reading pieces
            if number == index:
                self._engine.cancel(request)

    def close(self) -> None:
        """Give up all that are not answered yet."""
        self._stream.close()

    def texts(self) -> Iterator[str]:
        """The pieces alone. Closing this iterator gives up all that are not answered yet."""
        return _texts(self._stream)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        """(index of the question, next piece of its answer)."""
        return next(self._stream)


def _pieces(engine: Engine, asked: _Asked, name: str | None) -> Generator[tuple[int, str]]:
    for request in engine.serve(asked, pieces=True):
        index = asked.open.get(request)
        if index is None:
            continue  # its end was seen already
        done = request.done  # before the piece, which then is the last: others may drive on while it is read
        if piece := request.take():
            yield index, piece
        if done:
            del asked.open[request]
            if request.error is not None:
                _refuse(name, index, request.error)


def _texts(pieces: Generator[tuple[int, str]]) -> Iterator[str]:
    try:
        for _, piece in pieces:
            yield piece
    finally:
        pieces.close()


def _refuse(name: str | None, index: int, error: Exception) -> NoReturn:
    if name is None:
        raise error
    kind = ValueError if isinstance(error, (ValueError, TypeError, OSError)) else RuntimeError
    raise kind(f"{name} {index}: {error}") from error
