"""A conversation about one picture: it is encoded once, and every turn sees the turns before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinx_fast.infer.engine import Engine
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.model.conversation import conversation_prompt


class Conversation:
    """Questions and answers so far. Made by `Sphinx.chat(image)`.

    >>> talk = sphinx.chat("photo.jpg")          # doctest: +SKIP
    >>> talk.say("What is in the image?")        # doctest: +SKIP
    >>> talk.say("What color is it?")            # doctest: +SKIP
    """

    def __init__(self, engine: Engine, image: Any = None) -> None:
        self._engine = engine
        self._visual_tokens = engine.encode(image)
        self.turns: list[tuple[str, str]] = []

    def stream(self, question: str, **sampling: Any) -> Iterator[str]:
        """The answer piece by piece; the turn is remembered when the answer is complete."""
        prompt = conversation_prompt([*self.turns, (question, None)])
        answer = ""
        for piece in self._engine.stream(prompt, self._visual_tokens, Sampling(**sampling)):
            answer += piece
            yield piece
        self.turns.append((question, answer))

    def say(self, question: str, **sampling: Any) -> str:
        """Ask and wait for the whole answer. `sampling` as in `Sphinx.ask`."""
        return "".join(self.stream(question, **sampling))
