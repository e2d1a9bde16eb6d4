"""Dense pre-training: targets, frames and that every encoder learns."""

from itertools import pairwise

import pytest
import torch

from sphinx_fast.model import preset
from sphinx_fast.train.mini.encoders import (
    ENCODERS,
    LABELS,
    build_heads,
    dense_loss,
    encoder_features,
    relative_boxes,
    schedule,
    sine_positions,
    soft_bins,
    start_positions,
    start_weights,
)
from sphinx_fast.train.mini.pool import WHOLE_CLASSES
from sphinx_fast.vision import VisionTower


def test_soft_bins_mean_is_the_value():
    values = torch.tensor([0.2, 0.503, 0.8])
    means = (soft_bins(values) * torch.linspace(0, 1, 101)).sum(-1)
    torch.testing.assert_close(means, values, atol=1e-3, rtol=0)


def test_relative_boxes_are_around_the_patch():
    boxes = torch.zeros(1, 4, 6)
    boxes[..., :4] = torch.tensor([0.25, 0.25, 0.75, 0.75])
    relative = relative_boxes(boxes, 2)[0]
    torch.testing.assert_close(relative[0, :4], torch.tensor([0.5, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(relative[1, :4], torch.tensor([0.0, 0.5, 0.5, 1.0]))  # row 0, column 1


def test_sine_positions_tell_all_patches_apart():
    table = sine_positions(6, 64)
    assert table.shape == (37, 64) and not table[0].any()
    distances = torch.cdist(table[1:], table[1:]) + 10 * torch.eye(36)
    assert distances.min() > 1.0


def test_schedule_warms_up_and_falls():
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[99] < 0.03 and all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_learns_a_batch(name):
    torch.manual_seed(0)
    tower = VisionTower._from_config(preset("sphinx-mini").vision_config)
    start_weights(getattr(tower, name))
    start_positions(tower, name)
    heads, features = build_heads(tower, name), encoder_features(tower, name)
    labels = torch.randint(0, 2, (4, 36, len(LABELS)))
    batch = {
        "labels": labels,
        "boxes": torch.rand(4, 36, 6),
        "wholes": torch.stack([torch.randint(0, n, (4,)) for n in WHOLE_CLASSES], dim=-1),
    }
    views = torch.randn(4, 3, 96, 96)
    optimizer = torch.optim.AdamW([*getattr(tower, name).parameters(), *heads.parameters()], lr=2e-3)
    first = None
    for _ in range(12):
        loss, losses = dense_loss(name, features(views), heads, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert "whole" in losses and loss.item() < 0.8 * first
