"""Registering a room's functions as torch ops, so that torch.compile and fake tensors know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("sphinx_fast", "DEF")


def register(schema: str, fake: Callable[..., Any] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define `sphinx_fast::<schema>` with the decorated function for CPU and CUDA tensors.

    `fake` computes the outputs' metadata; None for an op that only writes its arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(", 1)[0]
        _library.define(schema)
        for key in ("CPU", "CUDA"):
            _library.impl(name, function, key)
        torch.library.register_fake(f"sphinx_fast::{name}", fake or (lambda *args: None), lib=_library)
        return function

    return decorate


def refuse_lazy(tensor: Tensor, name: str) -> None:
    """ValueError for what the borrowed memory would not show: conjugate or negative bits, a wish for gradients.

    Not asked while torch.compile traces: it cannot see these bits, and hands plain memory to what it has compiled.
    """
    if torch.compiler.is_compiling():
        return
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a tensor without requires_grad; detach it first")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name}: expected plain memory, got a lazily conjugated or negated tensor; resolve it first")
