"""A conversation about one picture: it is read once, and a turn computes only what is new in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_fast.infer.engine import Engine
from sphinx_fast.infer.request import Request
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.model.conversation import conversation_prompt


class Conversation:
    """Questions and answers so far. Made by `Sphinx.chat(image)`.

    >>> talk = sphinx.chat("photo.jpg")          # doctest: +SKIP
    >>> talk.say("What is in the image?")        # doctest: +SKIP
    >>> talk.say("What color is it?")            # doctest: +SKIP

    `turns` may be changed: what the next prompt has in common with the last one is not computed again.
    """

    def __init__(self, engine: Engine, image: Any = None) -> None:
        self._engine = engine
        self._picture = engine.see(image)
        self._last: Request | None = None  # its places in the pools are ours as long as we refer to it
        self.turns: list[tuple[str, str]] = []

    def stream(self, question: str, **sampling: Any) -> Iterator[str]:
        """The answer piece by piece; the turn is remembered when the answer is complete."""
        prompt = conversation_prompt([*self.turns, (question, None)])
        request = self._engine.request(prompt, self._picture, Sampling(**sampling), self._last)
        return self._pieces(question, request)

    def _pieces(self, question: str, request: Request) -> Iterator[str]:
        for news in self._engine.serve([request], pieces=True):
            if piece := news.take():
                yield piece
        self._last = request
        self.turns.append((question, request.answer().text))

    def say(self, question: str, **sampling: Any) -> str:
        """Ask and wait for the whole answer. `sampling` as in `Sphinx.ask`."""
        return "".join(self.stream(question, **sampling))
