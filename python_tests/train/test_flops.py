"""What MFU is a share of: counts by hand, and the products that torch sees a step make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TEXT, tiny_model, tiny_views
from torch.utils.flop_counter import FlopCounterMode

from sphinx_fast.train.flops import PEAKS, Flops, peak
from sphinx_fast.train.learner import Learner, choose_parts, see
from sphinx_fast.train.packing import Row, make_row
from sphinx_fast.train.pieces import IGNORED, Piece


def piece(lengths: Sequence[int], taught: int) -> Piece:
    """Tokens of a text whose last `taught` are predicted."""
    ids = np.arange(3, 3 + sum(lengths))
    targets = np.where(np.arange(len(ids)) < len(ids) - taught, IGNORED, 5)
    return Piece(ids, targets, (targets != IGNORED).astype(np.float32), tuple(lengths))


def products(model: Any, row: Row) -> int:
    """Operations of the matrix products of a step, but those of attention and of the encoders."""
    choose_parts(model, ("language_model", "fusion"), None)
    learner, features = Learner(model), see(model, row.pixel_values)
    asked = int((row.targets != IGNORED).sum())
    with FlopCounterMode(display=False) as counter:
        learner(row, features, torch.ones(asked))[0].backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))


def test_text_is_what_torch_counts() -> None:
    """6 N per token, and the head only where something is predicted; norms are weights, but no products."""
    model, row = tiny_model(), make_row([piece([30], 7), piece([11, 4, 5], 3)])
    flops = Flops.of(model)
    norms = 6 * (2 * TEXT["num_hidden_layers"] + 1) * TEXT["hidden_size"]
    assert products(model, row) == 50 * (flops.language - norms) + 10 * flops.head
    pairs = 30 * 31 // 2 + 11 * 12 // 2 + 4 * 11 + 10 + 5 * 11 + 15  # a branch sees the trunk and itself
    attention = 12 * TEXT["num_hidden_layers"] * TEXT["hidden_size"] * pairs
    said, language = flops.step([row])
    assert said == language == 50 * flops.language + 10 * flops.head + attention
    assert flops.step([row, row]) == (2 * said, 2 * said)


def test_pictures_add_projections_and_encoders() -> None:
    """Forward and backward of the projections, by the convention of 6 N, and forward of the encoders, per view."""
    model, views = tiny_model(), tiny_views(5, 32)
    flops, vision = Flops.of(model), model.config.vision_config
    plain = make_row([piece([120], 4)])
    seen = make_row([piece([120], 4)], views)
    fusion = model.model.fusion
    by_hand = 6 * sum(
        tokens * sum(p.numel() for p in projection.parameters())
        for tokens, projection in (
            (vision.num_patch_tokens, fusion.patch_projection),
            (vision.num_query_tokens, fusion.query_projection),
        )
    )
    assert flops.fusion == by_hand > 0
    (with_views, language), (without, _) = flops.step([seen]), flops.step([plain])
    assert language == without and with_views - without == 5 * (flops.fusion + flops.encoders)
    with FlopCounterMode(display=False) as counter:
        see(model, views)
    assert 5 * flops.encoders == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("X", None)]
)
def test_peaks(name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(torch.device("cuda")) == expected and peak(torch.device("cpu")) is None
    assert PEAKS["H200"] == PEAKS["H100"]
