"""The order of rows: a permutation each epoch, the same for ever, in the shares that were asked for."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from sphinx_fast.train.order import Mixture, mixed, permuted


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 64, 100, 257, 1000])
def test_a_permutation(count: int) -> None:
    for key in (0, 1, 2**63):
        assert sorted(permuted(k, count, key) for k in range(count)) == list(range(count))


def test_it_never_changes() -> None:
    """A resumed run of another year reads the same rows."""
    assert [permuted(k, 10, 3) for k in range(10)] == GOLDEN_TEN
    assert mixed(1, 2, 3) == GOLDEN_MIXED
    assert [Mixture([5, 3], [1.0, 2.0], seed=7)[k] for k in (0, 5, 11, 12, 4000)] == GOLDEN_ROWS


GOLDEN_TEN = [5, 6, 9, 1, 2, 7, 8, 0, 3, 4]
GOLDEN_MIXED = 16914669369030367833
GOLDEN_ROWS = [(1, 1), (0, 0), (1, 0), (1, 1), (1, 0)]


def test_positions_outside() -> None:
    for position in (-1, 5):
        with pytest.raises(IndexError):
            permuted(position, 5, 0)


def test_neighbours_are_not_neighbours() -> None:
    rows = [permuted(k, 10_000, 9) for k in range(10_000)]
    steps = Counter(b - a for a, b in pairwise(rows))
    assert steps.most_common(1)[0][1] < 8
    halves = sum(row < 5000 for row in rows[:5000])
    assert abs(halves - 2500) < 5 * 35.4  # five standard deviations of a fair draw


def test_natural_frequency_every_row_once() -> None:
    mixture = Mixture([30, 10, 1], seed=4)
    for epoch in range(3):
        rows = [mixture[epoch * 41 + k] for k in range(41)]
        assert sorted(rows) == [(source, row) for source, n in enumerate([30, 10, 1]) for row in range(n)]
    assert [mixture[k] for k in range(41)] != [mixture[41 + k] for k in range(41)]


def test_ratios() -> None:
    mixture = Mixture([20, 10], [0.5, 2.0], seed=1)
    assert len(mixture) == 30
    first, second = ([mixture[epoch * 30 + k] for k in range(30)] for epoch in range(2))
    assert Counter(source for source, _ in first) == {0: 10, 1: 20}
    assert sorted(row for source, row in first if source == 1) == sorted(2 * list(range(10)))
    halves = [{row for source, row in rows if source == 0} for rows in (first, second)]
    assert halves[0] | halves[1] == set(range(20)), "what one epoch leaves out the next one reads"
    assert not halves[0] & halves[1]


def test_an_empty_set_gives_nothing() -> None:
    mixture = Mixture([0, 4])
    assert {mixture[k][0] for k in range(4)} == {1}
