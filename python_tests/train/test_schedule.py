"""The learning rate: the paper's numbers step by step."""

from __future__ import annotations

import math

import pytest

from sphinx_fast.train.schedule import Schedule
from sphinx_fast.train.settings import Stage1, Stage2

ONE, TWO = (stage(model="m", out="o").optimizer for stage in (Stage1, Stage2))


def test_stage_one_is_the_papers() -> None:
    """2,000 steps up to 5e-5, half a cosine down to 5e-6 at 180,000."""
    rate = Schedule.of(ONE, 180_000, 1.0)
    assert rate(0) == pytest.approx(5e-5 / 2000) and rate(999) == pytest.approx(2.5e-5)
    assert rate(1999) == rate(2000) == pytest.approx(5e-5)
    assert rate(2000 + 178_000 // 2) == pytest.approx((5e-5 + 5e-6) / 2)
    assert rate(180_000) == rate(200_000) == pytest.approx(5e-6)
    assert all(rate(step) > rate(step + 1) for step in range(2000, 180_000, 977))


def test_stage_two_is_the_papers() -> None:
    """0.03 epoch up to 2e-5, down to nothing; an epoch need not be whole steps."""
    rate = Schedule.of(TWO, 5196, 665_000 / 128)
    assert rate.warmup == 156 and rate(155) == rate(156) == pytest.approx(2e-5)
    assert rate(5196) == 0 < rate(5195) < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 1999, 2000, 2001])
def test_short_runs(steps: int) -> None:
    """Steps that are all warm-up, or a run of one: every rate is one."""
    rates = [Schedule.of(ONE, steps, 1.0)(step) for step in range(steps + 1)]
    assert all(math.isfinite(rate) and 0 < rate <= 5e-5 for rate in rates)


def test_without_warm_up() -> None:
    assert Schedule(1.0, 0.0, 0, 10)(0) == 1.0 and Schedule(1.0, 0.0, 0, 10)(5) == pytest.approx(0.5)
