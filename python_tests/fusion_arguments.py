"""Arguments of the room fusion that are right, for tests that change one thing in them."""

from __future__ import annotations

from typing import Any

import torch
from fusion_cases import Case, draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sphinx_fast.ops import extension

# Two views of start, 2 queries, 1 + 16 patches, end; one encoder fine, one coarse of ratio 2; D = 12.
GOOD = draw(Case(2, 4, (1, 2), (5, 3), 12, 2, True))
FINE, COARSE = GOOD.features
OUT = torch.zeros(42, 12)
ROWS, NORM = torch.zeros(3, 8), torch.ones(8)


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


def negative(tensor: Tensor) -> Tensor:
    return torch._neg_view(tensor)


# --- the compiled functions' ------------------------------------------------------------------------------------------
def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def vectors(count: int = 3) -> list[Tensor]:
    return [zeros(12) for _ in range(count)]


FORWARD: dict[str, Any] = {
    "fine": zeros(34, 12), "coarse": zeros(10, 12), "queries": zeros(4, 12), "out": OUT, "views": 2, "query_count": 2,
    "grid": 4, "repeat": 2, "column": 0, "patch": vectors(), "query": vectors(), "start": zeros(12), "end": zeros(12),
    "eps": 1e-5, "first": torch.tensor([0, 21]), "kept": zeros(2, 19, 12), "stats": zeros(2, 19, 2), "isa": None,
    "threads": 1,
}  # fmt: skip
BACKWARD: dict[str, Any] = {
    "grad": zeros(2, 21, 12), "kept": zeros(2, 19, 12), "stats": zeros(2, 19, 2), "query_count": 2, "grid": 4,
    "repeat": 2, "tags": True, "patch_weight": zeros(12), "query_weight": zeros(12), "fine": zeros(34, 12),
    "coarse": zeros(10, 12), "queries": zeros(4, 12), "patch_sums": zeros(3, 3, 12), "query_sums": zeros(3, 3, 12),
    "isa": None, "threads": 1,
}  # fmt: skip
LAYER_NORM: dict[str, Any] = {
    "x": zeros(2, 5, 8), "weight": zeros(8), "bias": zeros(8), "eps": 1e-5, "out": zeros(2, 5, 8), "isa": None,
    "threads": 1,
}  # fmt: skip


def run(name: str, given: dict[str, Any]) -> None:
    positional = {"fusion": ("fine", "coarse", "queries", "out"), "fusion_backward": ("grad", "kept", "stats")}
    first = positional.get(name, ("x", "weight", "bias", "eps", "out"))
    rest = {key: value for key, value in given.items() if key not in first}
    getattr(extension(), name)(*(given[key] for key in first), **rest)
