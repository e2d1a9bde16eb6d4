"""How the next token is chosen: temperature, then top-k, then top-p, as the released code orders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sphinx_fast.model.conversation import STOP


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer.

    Args:
        max_new_tokens: at most this many tokens; fewer where the context ends first.
        temperature: 0 takes the most probable token, larger values flatten the distribution.
        top_p: sample from the smallest set of tokens whose probability reaches this (1: all).
        top_k: sample from this many tokens (0: all).
        seed: of the sampling; None draws a fresh one. A seed gives the same answer in any batch.
        stop: texts that end the answer and are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = (STOP,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {self.top_k}")

    @classmethod
    def of_each(cls, settings: dict[str, Any], count: int) -> list[Sampling]:
        """Settings of `count` requests: a list has one value for each, anything else is for all.

        `stop` is a text or several for all; as a list of lists or tuples, those of each request.

        Raises:
            ValueError: a list of another length, or an impossible value.
            TypeError: a setting that does not exist.
        """
        if unknown := sorted(set(settings) - {field.name for field in fields(cls)}):
            raise TypeError(f"{unknown[0]}: no such setting; there are {', '.join(f.name for f in fields(cls))}")
        each: dict[str, list[Any]] = {}
        for name, value in settings.items():
            listed = isinstance(value, list)
            if name == "stop":
                listed = listed and all(isinstance(texts, (list, tuple)) for texts in value) and bool(value)
            if listed and len(value) != count:
                raise ValueError(f"{name}: expected one value for each of {count} requests, got {len(value)}")
            each[name] = value if listed else [value] * count
        return [cls(**{name: values[index] for name, values in each.items()}) for index in range(count)]


def choose(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """Logits [R, vocab] -> the next token of each row [R], by its own settings.

    `draws` has a number in [0, 1) for each row: the token is where the kept probabilities, the largest first, add up to
    that share of their sum. So a row's token depends on nothing but its logits, settings and number.
    """
    best = logits.argmax(dim=-1)
    if not any(one.temperature for one in settings):
        return best

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    temperature = column([one.temperature or 1.0 for one in settings])
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if any(one.top_k for one in settings):
        top_k = column([one.top_k or logits.shape[-1] for one in settings])
        probabilities.masked_fill_(torch.arange(logits.shape[-1], device=logits.device) >= top_k, 0)
    # A token stays while the mass before it is below top_p, so the first always does.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before > column([one.top_p for one in settings]), 0)
    sums = probabilities.cumsum(dim=-1)
    picked = torch.searchsorted(sums, column(draws) * sums[:, -1:], right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not lead past what was kept
    picked = tokens.gather(-1, picked.minimum(last)).squeeze(-1)
    return torch.where(column([one.temperature for one in settings]).squeeze(1) == 0, best, picked)
