"""Dense pre-training: targets, frames and that every encoder learns."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sphinx_fast.data.scene_targets import CLASSES
from sphinx_fast.data.scenes import TEXTS
from sphinx_fast.model import preset
from sphinx_fast.train.mini.encoders import (
    ENCODERS,
    LABELS,
    LETTERS,
    SPELLINGS,
    DenseHeads,
    build_heads,
    dense_loss,
    encoder_features,
    pool_batch,
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


def test_spellings_are_the_texts():
    assert len(SPELLINGS) == 1 + CLASSES["text"] and not SPELLINGS[0].any()
    for text, letters in zip(TEXTS, SPELLINGS[1:].tolist(), strict=True):
        assert "".join(LETTERS[k - 1] for k in letters if k) == text


def test_a_word_that_the_view_cuts_teaches_letters_alone():
    heads = DenseHeads(8, 8)
    labels = torch.zeros(1, 2, len(LABELS), dtype=torch.long)
    labels[..., LABELS.index("thing")], labels[..., LABELS.index("text")] = 2, 5
    labels[..., LABELS.index("letter")] = 1
    boxes = torch.zeros(1, 2, 6)
    boxes[..., :4] = torch.tensor([0.1, 0.1, 0.9, 0.4])
    whole = heads.patch_losses(torch.randn(1, 2, 8), labels, boxes)
    assert whole["text"] > 0 and whole["letters"] > 0
    boxes[..., 2] = 1.4
    cut = heads.patch_losses(torch.randn(1, 2, 8), labels, boxes)
    assert cut["text"] == 0 and cut["letters"] == 0 and cut["letter"] > 0


def test_full_crops_are_seen_more_often():
    labels = np.zeros((64, 5, 36, len(LABELS)), np.int16)
    labels[:, 3, :, 0] = 1  # one full crop of four
    labels[:, :, :, 1] = np.arange(5)[None, :, None]  # its number
    pool = {
        "squares": np.zeros((64, 192, 192, 3), np.uint8),
        "labels": labels,
        "boxes": np.zeros((64, 5, 36, 6), np.float16),
        "wholes": np.zeros((64, 5, 1), np.int16),
        "captions": np.zeros((64, 5, 1), np.int16),
    }
    batch = pool_batch(pool, np.arange(64), np.random.default_rng(0), 96)
    crops = batch["labels"][64:, 0, 1]
    assert crops.min() >= 1 and (crops == 3).float().mean() > 0.75
    assert len(batch["views"]) == 128 and (batch["labels"][:64, 0, 1] == 0).all()
