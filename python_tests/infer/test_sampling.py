"""Sampling: greedy, temperature, top-k, top-p against their definitions, and seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sphinx_fast.infer import Sampling

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0, 2.9]])


def drawn(settings: Sampling, count: int = 4000) -> torch.Tensor:
    """Relative frequency of each token."""
    source = settings.generator(torch.device("cpu"))
    tokens = settings.choose(LOGITS.expand(count, -1), source)
    return torch.bincount(tokens, minlength=5) / count


def test_temperature_zero_takes_the_largest() -> None:
    assert drawn(Sampling(temperature=0.0)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    frequencies = drawn(Sampling(temperature=temperature, top_p=1.0, seed=0), 20_000)
    torch.testing.assert_close(frequencies, (LOGITS[0] / temperature).softmax(0), atol=0.015, rtol=0)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert (drawn(Sampling(temperature=1.0, top_p=1.0, top_k=2, seed=0)) > 0).tolist() == [0, 1, 0, 0, 1]
    probabilities = LOGITS[0].softmax(0)  # in order: 3.0, 2.9, 2.0, 1.0, -1.0
    three = float(probabilities[[1, 4]].sum()) + 0.01  # more than the first two hold: the third stays
    assert (drawn(Sampling(temperature=1.0, top_p=three, seed=0)) > 0).tolist() == [0, 1, 1, 0, 1]
    assert (drawn(Sampling(temperature=1.0, top_p=1e-6, seed=0)) > 0).tolist() == [0, 1, 0, 0, 0]


def test_a_seed_repeats() -> None:
    first, second = (drawn(Sampling(temperature=1.0, seed=7), 50) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, drawn(Sampling(temperature=1.0, seed=8), 50))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
    ({"temperature": -0.1}, "temperature: expected 0 or more"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0.0}, "top_p: expected above 0"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
