"""How the next token is chosen: temperature, then top-k, then top-p, as the released code orders them."""

from __future__ import annotations

from dataclasses import dataclass

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
        seed: of the sampling; None draws a fresh one.
        stop: texts that end the answer and are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = (STOP,)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {self.top_k}")

    def generator(self, device: torch.device) -> torch.Generator:
        """A seeded source of random numbers for one answer."""
        source = torch.Generator(device=device)
        if self.seed is None:
            source.seed()
        else:
            source.manual_seed(self.seed)
        return source

    def choose(self, logits: Tensor, source: torch.Generator) -> Tensor:
        """Logits [B, vocab] -> the next token of each row [B]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities, tokens = (logits.float() / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        if self.top_k:
            probabilities[:, self.top_k :] = 0
        # A token stays while the mass before it is below top_p, so the first always does.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before > self.top_p, 0)
        picked = torch.multinomial(probabilities, 1, generator=source)
        return tokens.gather(-1, picked).squeeze(-1)
