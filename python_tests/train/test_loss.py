"""Head and cross-entropy in chunks against float64, and against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from close import assert_close
from torch import Tensor
from torch.nn import functional as F

from sphinx_fast.train import loss as module
from sphinx_fast.train.loss import SoftLabels, head_cross_entropy


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.3).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,)), torch.rand(rows)


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, labels: Tensor | None = None
) -> Tensor:
    logits = hidden @ weight.T
    target = targets if labels is None else labels.to(logits.dtype)
    losses = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, reduction="none")
    return (losses * coefficients.to(losses.dtype)).sum()


@pytest.mark.parametrize("chunk", [1, 100, 2**24])
@pytest.mark.parametrize("shape", [(1, 8, 11), (7, 16, 400), (64, 32, 1000), (33, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, weight, targets, coefficients = inputs(*shape, dtype)
    value, losses = head_cross_entropy(hidden, weight, targets, coefficients)
    ours = torch.autograd.grad(value, (hidden, weight))
    # As many rows at a time: a library's product of one row adds in another order than its product of many.
    rows = max(1, chunk // weight.shape[0])
    parts = zip(*(tensor.split(rows) for tensor in (hidden, targets, coefficients)), strict=True)
    theirs_value = torch.stack([plain(h, weight, t, c) for h, t, c in parts]).sum()
    theirs = torch.autograd.grad(theirs_value, (hidden, weight))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact_value = plain(*wide, targets, coefficients)
    exact = torch.autograd.grad(exact_value, wide)
    assert_close(value.detach(), theirs_value.detach(), exact_value.detach(), "loss")
    for name, a, b, c in zip(("hidden", "weight"), ours, theirs, exact, strict=True):
        assert_close(a, b, c, name)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    assert torch.allclose((losses * coefficients).sum(), value.detach())


def test_nothing_to_predict() -> None:
    hidden, weight, _, _ = inputs(3, 4, 5)
    value, losses = head_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    value.backward()
    assert value == 0 and losses.shape == (0,)
    assert hidden.grad is not None and weight.grad is not None, "sharded runs need a gradient from everyone"
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, targets, coefficients = inputs(6, 4, 9)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    value, _ = head_cross_entropy(hidden, weight, targets, coefficients)
    assert value.requires_grad == (frozen != "both")
    if frozen != "both":
        value.backward()
    assert (hidden.grad is None) == (frozen != "weight") and (weight.grad is None) == (frozen != "hidden")


def test_gradients_scale_with_what_follows() -> None:
    hidden, weight, targets, coefficients = inputs(6, 4, 9)
    once = torch.autograd.grad(head_cross_entropy(hidden, weight, targets, coefficients)[0], hidden)[0]
    thrice = torch.autograd.grad(3 * head_cross_entropy(hidden, weight, targets, coefficients)[0], hidden)[0]
    assert torch.allclose(3 * once, thrice)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_harm_is_not_hidden(wrong: float) -> None:
    hidden, weight, targets, coefficients = inputs(6, 4, 9)
    with torch.no_grad():
        hidden[3, 1] = wrong
    value, losses = head_cross_entropy(hidden, weight, targets, coefficients)
    assert not value.isfinite()
    assert losses.isfinite().tolist() == [True] * 3 + [False] + [True] * 2


def test_memory_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of [rows, vocabulary] is ever there."""
    monkeypatch.setattr(module, "CHUNK", 4 * 500)
    seen = []
    before = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: seen.append(tuple(self.shape)) or before(self))
    hidden, weight, targets, coefficients = inputs(37, 8, 500)
    head_cross_entropy(hidden, weight, targets, coefficients)[0].backward()
    assert max(shape[0] for shape in seen if shape[-1:] == (500,)) == 4


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_soft_labels(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, weight, targets, coefficients = inputs(40, 8, 30)
    ids = torch.tensor([4, 9, 2, 17, 11])
    soft = SoftLabels(ids, 30, 0.2)
    table = torch.eye(30, dtype=torch.float64)
    table[ids] = 0
    places = torch.linspace(0, 1, 5, dtype=torch.float64)
    table[ids[:, None], ids] = torch.softmax(-((places[:, None] - places) ** 2) / (2 * 0.2**2), -1)
    labels = table[targets]
    value, losses = head_cross_entropy(hidden, weight, targets, coefficients, soft)
    ours = torch.autograd.grad(value, (hidden, weight))
    theirs_value = plain(hidden, weight, targets, coefficients, labels)
    theirs = torch.autograd.grad(theirs_value, (hidden, weight))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact_value = plain(*wide, targets, coefficients, labels)
    exact = torch.autograd.grad(exact_value, wide)
    assert_close(value.detach(), theirs_value.detach(), exact_value.detach(), "loss")
    for name, a, b, c in zip(("hidden", "weight"), ours, theirs, exact, strict=True):
        assert_close(a, b, c, name)
    hard = ~torch.isin(targets, ids)
    direct = F.cross_entropy((hidden @ weight.T)[hard], targets[hard], reduction="none")
    assert torch.allclose(losses[hard], direct.detach())
