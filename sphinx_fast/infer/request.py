"""A question on its way to an answer: prompt and settings go in, tokens and pieces of text come out."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.model.cache import Slot
from sphinx_fast.model.conversation import cut_at_stop, held_back

_REPLACEMENT = "\ufffd"


@dataclass(eq=False)
class Picture:
    """A picture that was read, and what is known of it.

    Attributes:
        pixels: uint8 [h, w, 3] or a normalised square, fp32 [3, S, S], until visual tokens were made of them.
        views: it is cut into.
        key: equal keys mean equal visual tokens.
        kept: whether they and their prefix may be kept for others; not if views are random or encoders train.
        visual_tokens: [V, tokens_per_view, D], once they were computed.
    """

    pixels: np.ndarray | Tensor | None
    views: int
    key: Hashable
    kept: bool
    visual_tokens: Tensor | None = None


class Decoder(Protocol):
    """What turns ids into text: a tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class Answer(NamedTuple):
    """A text with the tokens it is made of.

    Attributes:
        text: the answer.
        tokens: ids of the text, those of stop texts and EOS left out.
        logprobs: of each of them, log(softmax(logits)) as the model gives it, before temperature, top_k and top_p.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]


class Text:
    """Tokens -> text in pieces. What may still become a stop text, or half a character, is held back."""

    def __init__(self, decoder: Decoder | None, stop: Sequence[str]) -> None:
        self._decoder, self._stop = decoder, stop
        self._ids: list[int] = []
        self.text = ""
        self._ready = 0
        self._taken = 0

    def add(self, token: int) -> bool:
        """One more token; True when a stop text is complete."""
        assert self._decoder is not None
        self._ids.append(token)
        self.text, stopped = cut_at_stop(self._decoder.decode(self._ids, skip_special_tokens=True), self._stop)
        if stopped:
            self.finish()
            return True
        # The last three bytes may be the start of a character whose end is still to come.
        broken = min(len(self.text) - len(self.text.rstrip(_REPLACEMENT)), 3)
        self._ready = max(self._ready, len(self.text) - max(broken, held_back(self.text, self._stop)))
        return False

    def finish(self) -> None:
        """Nothing follows: all of the text may be shown."""
        self._ready = len(self.text)

    @property
    def waiting(self) -> bool:
        """Whether there is a piece to take."""
        return self._ready > self._taken

    def take(self) -> str:
        """The piece that became ready since the last one."""
        ready = self._ready  # read once, and before the text: another thread may add to both meanwhile
        piece, self._taken = self.text[self._taken : ready], max(ready, self._taken)
        return piece

    def tokens(self) -> int:
        """How many of the tokens the text is made of."""
        assert self._decoder is not None
        count = len(self._ids)
        while count and len(self._decoder.decode(self._ids[: count - 1], skip_special_tokens=True)) >= len(self.text):
            count -= 1
        return count


class Request:
    """One question. The scheduler writes to it, one reader takes pieces from it.

    Args:
        ids: the prompt, placeholders in the place of visual tokens.
        picture: what stands there.
        sampling: settings of the answer.
        decoder: the tokenizer.
        room: tokens the context has left for an answer.
        earlier: where an earlier turn of the same conversation left its keys and values.
        wants_logprobs: whether they are computed.

    Attributes:
        prefix, suffix: its places while it runs; `shared` ids of the prompt are the prefix.
        new_tokens: of prefix and suffix, that have to be computed for it.
    """

    def __init__(
        self,
        ids: list[int],
        picture: Picture | None,
        sampling: Sampling,
        decoder: Decoder | None,
        room: int,
        earlier: Slot | None = None,
        wants_logprobs: bool = False,
    ) -> None:
        self.wants_logprobs = wants_logprobs
        self.ids, self.picture, self.sampling, self.earlier = ids, picture, sampling, earlier
        self.most = min(sampling.max_new_tokens, room)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.error: Exception | None = None
        self.done = False
        self.cancelled = False
        self.prefix: Slot | None = None
        self.suffix: Slot | None = None
        self.shared = 0
        self.new_tokens = len(ids)
        self._text = Text(decoder, sampling.stop)
        self._random = random.Random(sampling.seed)  # None: from the system's entropy
        self._drawn: float | None = None

    @classmethod
    def failed(cls, error: Exception) -> Request:
        """A request that could not be made."""
        request = cls([], None, Sampling(), None, 0)
        request.finish(error)
        return request

    def draw(self) -> float:
        """A number in [0, 1) for the next token: the same ones for the same seed, on any device, in any batch.

        Until that token comes it stays the same, so a step that is interrupted and repeated draws what it would have.
        """
        if self._drawn is None:
            self._drawn = self._random.random() if self.sampling.temperature else 0.0
        return self._drawn

    def add(self, token: int, logprob: float, ends: bool) -> None:
        """The next token, or with `ends` (EOS) none: the answer is over."""
        self._drawn = None
        if not ends:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            ends = self._text.add(token) or len(self.tokens) >= self.most
        if ends:
            self.finish()

    def finish(self, error: Exception | None = None) -> None:
        """Nothing follows."""
        self._text.finish()
        self.error, self.done = error, True

    @property
    def place(self) -> Slot:
        """The place of its own tokens; it has one while it runs."""
        assert self.suffix is not None
        return self.suffix

    @property
    def computed(self) -> int:
        """Positions of its own place that are computed when its last token is not: what the next step starts from."""
        return len(self.ids) - self.shared + len(self.tokens) - 1

    def release(self) -> None:
        """Lets others have the places it computed in, unless someone keeps them."""
        self.place.ids = [*self.ids, *self.tokens][self.shared :][: self.place.length]
        for slot in (self.prefix, self.suffix):
            if slot is not None:
                slot.release()

    @property
    def news(self) -> bool:
        """Whether there is a piece to take, or the end was reached."""
        return self.done or self._text.waiting

    def take(self) -> str:
        """The next piece of the answer, possibly empty."""
        return self._text.take()

    def answer(self) -> Answer:
        """The whole answer. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        count = self._text.tokens()
        return Answer(self._text.text, self.tokens[:count], self.logprobs[:count])
