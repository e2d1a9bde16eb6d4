"""The judge itself: it must let good results pass and catch bad ones."""

import math

import pytest
import torch
from close import Guarded, assert_close, assert_repeatable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounded_result_passes_and_a_wrong_one_fails(dtype: torch.dtype) -> None:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = exact.to(dtype)
    assert_close(plain, plain, exact)
    wrong = plain.clone()
    wrong[3, 5] += 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(wrong, plain, exact)
    wrong[3, 5] = math.nan
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(wrong, plain, exact)


def test_other_dtype_shape_or_oracle_fails() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(exact.half(), exact.float(), exact)
    with pytest.raises(AssertionError, match="float64"):
        assert_close(exact.float(), exact.float(), exact.float())
    with pytest.raises(AssertionError):
        assert_close(exact.float()[:1], exact.float(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_guards_and_unwritten_elements_are_noticed(dtype: torch.dtype) -> None:
    output = Guarded((2, 3), dtype)
    if dtype.is_floating_point:
        output.tensor[0] = 1
        with pytest.raises(AssertionError, match="3 of 6"):
            output.check()
    output.tensor.zero_()
    assert output.check().shape == (2, 3)
    for position in (255, -256):
        output = Guarded((2, 3), dtype, fill=0)
        output.memory[position] = 1
        with pytest.raises(AssertionError, match="outside"):
            output.check()


def test_a_wavering_function_is_noticed() -> None:
    values = iter(torch.tensor([1.0] * 50 + [2.0] * 50))
    with pytest.raises(AssertionError, match="call 50"):
        assert_repeatable(lambda: next(values))
