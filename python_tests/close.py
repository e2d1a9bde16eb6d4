"""How outputs are judged. One rule for floating point, equality for integers and copies; poisoned and guarded memory.

The rule: the error against float64 is at most twice the error of plain torch in the same dtype, plus rounding of the
result. There are no constants per test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GUARD = 256  # elements on each side of a guarded output


def error_against(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from the float64 result; inf where a value is not finite and the exact one is."""
    difference = (value.double() - exact).abs()
    return math.inf if difference.isnan().any() else float(difference.max()) if difference.numel() else 0.0


def assert_close(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "output") -> None:
    """`actual` (ours) and `plain` (torch, same dtype) against `exact` (float64)."""
    assert exact.dtype == torch.float64, f"{name}: the oracle must be float64, got {exact.dtype}"
    assert actual.dtype == plain.dtype, f"{name}: expected dtype {plain.dtype}, got {actual.dtype}"
    assert actual.shape == plain.shape == exact.shape, f"{name}: {actual.shape}, {plain.shape}, {exact.shape}"
    if not exact.numel():
        return
    rounding = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    ours, theirs = error_against(actual, exact), error_against(plain, exact)
    allowed = 2 * theirs + rounding
    assert ours <= allowed, f"{name}: error {ours:.3e}, allowed {allowed:.3e} (plain torch {theirs:.3e})"


class Guarded:
    """A contiguous output tensor filled with NaN (or `fill`), between two guard bands that nobody may write."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu", fill: float | None = None
    ) -> None:
        count = math.prod(shape)
        self.fill = fill if fill is not None else (math.nan if dtype.is_floating_point else 0xA5)
        self.guard = 0x5A if not dtype.is_floating_point else -12345.0
        self.memory = torch.full((count + 2 * GUARD,), self.guard, dtype=dtype, device=device)
        self.tensor = self.memory[GUARD : GUARD + count].view(*shape).fill_(self.fill)

    def check(self, name: str = "output") -> Tensor:
        """The tensor, after asserting that every element was written (floating point) and no guard was."""
        bands = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        expected = torch.full_like(bands, self.guard)
        assert torch.equal(bands, expected), f"{name}: memory outside the output was written"
        if self.tensor.dtype.is_floating_point:
            missing = int(self.tensor.isnan().sum())
            assert not missing, f"{name}: {missing} of {self.tensor.numel()} elements were not written"
        return self.tensor


def assert_repeatable(function: Callable[[], Tensor], repeats: int = 100) -> None:
    """`repeats` calls give the same bits."""
    first = function().clone()
    for index in range(1, repeats):
        assert torch.equal(function(), first), f"call {index} differs from the first"
