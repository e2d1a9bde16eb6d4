"""Sampling: greedy, temperature, top-k, top-p against their definitions, and seeds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sphinx_fast.infer import Sampling
from sphinx_fast.infer.sampling import choose

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0, 2.9]])


def drawn(settings: Sampling, count: int = 4000) -> torch.Tensor:
    """Relative frequency of each token."""
    source = random.Random(settings.seed)
    tokens = choose(LOGITS.expand(count, -1), [settings] * count, [source.random() for _ in range(count)])
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


def test_rows_of_a_batch_do_not_change_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 300, generator=generator) * 3
    draws = torch.rand(40, generator=generator).tolist()
    settings = [Sampling(temperature=0.3 * (row % 4), top_k=row % 3 * 7, top_p=1 - row / 100) for row in range(40)]
    together = choose(logits, settings, draws)
    alone = [choose(logits[row : row + 1], settings[row : row + 1], draws[row : row + 1])[0] for row in range(40)]
    assert together.tolist() == alone
    greedy = [row for row, one in enumerate(settings) if one.temperature == 0]
    assert torch.equal(together[greedy], logits[greedy].argmax(-1))


def test_the_ends_of_the_draw_stay_within_what_was_kept() -> None:
    kept = Sampling(temperature=1.0, top_p=1.0, top_k=3)
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 4
    low, high = (choose(logits, [kept] * 200, [draw] * 200) for draw in (0.0, 1.0 - 2**-53))
    assert torch.equal(low, logits.argmax(-1))
    assert torch.equal(high, logits.topk(3).indices[:, 2])


def test_a_list_gives_each_request_its_own_value() -> None:
    first, second = Sampling.of_each({"max_new_tokens": [3, 4], "temperature": 0.5, "stop": ["a", "b"]}, 2)
    assert (first.max_new_tokens, second.max_new_tokens, first.temperature, second.temperature) == (3, 4, 0.5, 0.5)
    assert first.stop == second.stop == ("a", "b")  # texts for all
    first, second = Sampling.of_each({"stop": [["a"], ("b", "c")], "seed": [1, None]}, 2)
    assert (first.stop, second.stop, first.seed, second.seed) == (("a",), ("b", "c"), 1, None)
    assert Sampling.of_each({"stop": "x"}, 1)[0].stop == ("x",)
    with pytest.raises(ValueError, match="top_k: expected one value for each of 3 requests, got 2"):
        Sampling.of_each({"top_k": [1, 2]}, 3)
    with pytest.raises(TypeError, match="max_tokens: no such setting; there are max_new_tokens, temperature"):
        Sampling.of_each({"max_tokens": 3}, 1)
    assert Sampling.of_each({"top_k": []}, 0) == []


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
