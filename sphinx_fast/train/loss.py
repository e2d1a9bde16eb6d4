"""The loss of hidden states without their logits: head and cross-entropy in chunks, gradients made on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**24  # logits held at a time: 64 MiB in fp32


class _HeadCrossEntropy(torch.autograd.Function):
    """sum_i coefficients[i] * CE(hidden[i] @ weight.T, targets[i]).

    Logits of a chunk become their own gradient in place while they are there, so nothing of size [N, vocab] is kept
    and nothing is computed twice. Arithmetic on logits is fp32; products run in the hidden states' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, soft: Any
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        rows = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.T).float()
            gradient = logits.sub_(logits.logsumexp(-1, keepdim=True))  # log-probabilities for now
            losses[part] = soft(gradient, targets[part]) if soft else -_picked(gradient, targets[part])[:, 0]
            if not (wants_hidden or wants_weight):
                continue
            gradient.exp_()
            if soft:
                soft.subtract(gradient, targets[part])
            else:
                gradient.scatter_add_(1, targets[part, None], gradient.new_full((len(gradient), 1), -1.0))
            gradient = gradient.mul_(coefficients[part, None]).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = gradient @ weight
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden[part]
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses)
        return (losses * coefficients).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * scale.to(weight_grad.dtype),
            None,
            None,
            None,
        )


def _picked(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(1, targets[:, None])


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, soft: SoftLabels | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a language model's head, weighted and summed.

    loss = sum_i coefficients[i] * (logsumexp_v(z[i, v]) - z[i, targets[i]]),  z = hidden @ weight.T

    Args:
        hidden: [N, D], of the positions that predict something: no others need logits.
        weight: [vocab, D] of the head.
        targets: [N] token ids.
        coefficients: [N] fp32.
        soft: labels that are distributions, for some tokens.

    Returns:
        The sum, with gradients to hidden and weight, and the single losses [N] without.

    The error of a NaN or of an infinite logit is a NaN in the loss; nothing is hidden.
    """
    total, losses = _HeadCrossEntropy.apply(hidden, weight, targets, coefficients, soft)
    return total, losses


class SoftLabels:
    """A label that is one of `ids` spreads over all of them: p(j | i) = softmax_j(-(j - i)^2 / (2 softness^2 n^2)).

    With the n coordinates 0.00 .. 1.00 as ids and n * softness in steps of 0.01, saying 0.38 for 0.37 costs less than
    saying 0.90.
    """

    def __init__(self, ids: Tensor, vocabulary: int, softness: float) -> None:
        places = torch.linspace(0, 1, len(ids), dtype=torch.float64)
        table = torch.softmax(-0.5 * ((places[:, None] - places) / softness) ** 2, dim=-1)
        self.ids, self.table = ids, table.float()
        self.row = torch.full((vocabulary,), -1)
        self.row[ids] = torch.arange(len(ids))

    def to(self, device: torch.device) -> SoftLabels:
        """The same on a device."""
        self.ids, self.table, self.row = (tensor.to(device) for tensor in (self.ids, self.table, self.row))
        return self

    def __call__(self, logs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [n] of log-probabilities [n, vocab] with the labels of `targets` [n]."""
        rows = self.row[targets]
        losses = -_picked(logs, targets)[:, 0]
        soft = rows >= 0
        losses[soft] = -(logs[soft][:, self.ids] * self.table[rows[soft]]).sum(-1)
        return losses

    def subtract(self, probabilities: Tensor, targets: Tensor) -> None:
        """probabilities -= labels, in place: the gradient of the cross-entropy by the logits."""
        rows = self.row[targets]
        hard = (rows < 0).nonzero()[:, 0]
        probabilities[hard, targets[hard]] -= 1.0
        soft = (rows >= 0).nonzero()[:, 0]
        probabilities[soft[:, None], self.ids] -= self.table[rows[soft]]
