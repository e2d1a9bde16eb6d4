"""Answers of a model to questions about scenes, with what the figures need beside the text.

Through the package's own engine: its greedy answers are those of `generate`, and questions about one picture share its
prefix, so that a further one costs a small part of the first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sphinx_fast.evaluate.items import LENGTHS
from sphinx_fast.infer import Answer, Sphinx
from sphinx_fast.model.config import PAD_COLOR
from sphinx_fast.model.conversation import conversation_prompt
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.tasks.boxes import parse_boxes

CACHE = 256 << 20  # bytes kept of pictures; questions about one come side by side
BATCH = 32  # pictures in a pass of `yes_shares`
Asked = tuple[np.ndarray, str, str]  # picture, task, prompt


@dataclass(frozen=True)
class Said:
    """An answer.

    boxes  confidence of each box in the order of the text; empty: all the same
    yes    p(yes) / (p(yes) + p(no)) at the answer's first token
    """

    text: str
    boxes: tuple[float, ...] = ()
    yes: float = 0.5


def grey(picture: np.ndarray) -> np.ndarray:
    """What a blind model sees: the colour of the padding, everywhere."""
    return np.broadcast_to(np.array(PAD_COLOR, np.uint8), picture.shape).copy()


def box_confidences(decode: Any, tokens: Sequence[int], logprobs: Sequence[float]) -> tuple[float, ...]:
    """Confidence of each box of an answer: exp(mean log-probability of its tokens), name and coordinates.

    A box's tokens are those that begin after the bracket before it and up to its own closing one. The mean, not the
    sum, so that a name of more tokens is not thought less sure of.
    """
    starts = [0, *(len(decode(tokens[: k + 1])) for k in range(len(tokens)))]
    text, begin, found = decode(tokens), 0, list[float]()
    for bracket in re.finditer(r"\[[^\[\]]*\]", text):
        own = [p for at, p in zip(starts, logprobs, strict=False) if begin <= at < bracket.end()]
        found += [math.exp(sum(own) / len(own)) if own else 0.0] * len(parse_boxes(bracket[0]))
        begin = bracket.end()
    return tuple(found)


class Answerer:
    """A model that is asked greedily. A grey picture hides everything, so a question is asked blind only once."""

    def __init__(self, model: SphinxForConditionalGeneration, processor: SphinxProcessor) -> None:
        self.sphinx = Sphinx(model, processor, picture_cache=CACHE)
        self._grey = grey(np.empty((32, 32, 3), np.uint8))
        self._blind: dict[tuple[str, str], Said] = {}

    def seeing(self, asked: Sequence[Asked]) -> list[Said]:
        """Answers to questions about pictures; those about one picture best side by side."""
        answers: list[Answer] = self.sphinx.ask_batch(
            [(picture, prompt) for picture, _, prompt in asked],
            max_new_tokens=[LENGTHS[task] for _, task, _ in asked],
            temperature=0.0,
            return_logprobs=True,
        )
        shares = iter(self.yes_shares([(picture, prompt) for picture, task, prompt in asked if task == "defect"]))
        return [
            Said(
                answer.text.strip(),
                box_confidences(self._decode, answer.tokens, answer.logprobs) if task == "detect_all" else (),
                next(shares) if task == "defect" else 0.5,
            )
            for (_, task, _), answer in zip(asked, answers, strict=True)
        ]

    def blind(self, asked: Iterable[Asked]) -> list[Said]:
        """The same, shown a grey picture."""
        keys = [(task, prompt) for _, task, prompt in asked]
        new = [key for key in dict.fromkeys(keys) if key not in self._blind]
        said = self.seeing([(self._grey, *key) for key in new])
        self._blind.update(zip(new, said, strict=True))
        return [self._blind[key] for key in keys]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.sphinx.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)

    @torch.inference_mode()
    def yes_shares(self, asked: Sequence[tuple[np.ndarray, str]]) -> list[float]:
        """p(yes) / (p(yes) + p(no)) at the first token of the answer to each (picture, prompt)."""
        model, processor, shares = self.sphinx.model, self.sphinx.processor, list[float]()
        for at in range(0, len(asked), BATCH):
            part = asked[at : at + BATCH]
            texts = [conversation_prompt([(prompt, None)]) for _, prompt in part]
            words = [self._first_token(texts[0], word) for word in (" yes", " no")]
            inputs = processor(images=[p for p, _ in part], text=texts, padding=True, return_tensors="pt")
            inputs = inputs.to(model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            logits = model(**inputs, logits_to_keep=1).logits[:, -1, words].float()
            shares += logits.softmax(-1)[:, 0].tolist()
        return shares

    def _first_token(self, prompt: str, word: str) -> int:
        """The token that an answer begins with."""
        ids = self.sphinx.processor.prompt_ids
        before, after = ids(prompt), ids(prompt + word)
        if after[: len(before)] != before or len(after) == len(before):
            raise ValueError(
                f"the tokenizer does not begin an answer{word} after {prompt[-12:]!r} with a token of its own"
            )
        return after[len(before)]


def answers(
    model: SphinxForConditionalGeneration,
    processor: SphinxProcessor,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to one question per picture."""
    pairs = list(zip(pictures, prompts, strict=True))
    said = Sphinx(model, processor, picture_cache=CACHE).ask_batch(
        pairs, max_new_tokens=max_new_tokens, temperature=0.0
    )
    return [text.strip() for text in said]
