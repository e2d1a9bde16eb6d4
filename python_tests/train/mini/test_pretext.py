"""What the encoders learn beside labels: each loss can be lowered by what it asks for, and by nothing else."""

import torch

from sphinx_fast.model import preset
from sphinx_fast.train.mini.pretext import Captioning, Contrast, SelfDistillation, pretext_of
from sphinx_fast.vision import VisionTower
from sphinx_fast.vision.dinov2 import dinov2_features, renormalize

CAPTIONS = torch.tensor([[5, 6, 0], [7, 0, 0], [5, 6, 0], [8, 9, 9]])


def learned(module, tokens, captions, steps=150):
    """The loss before and after."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    first = None
    for _ in range(steps):
        loss = module(tokens, captions, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    return first, loss.item()


def test_contrast_tells_captions_apart_and_equal_ones_are_both_right():
    torch.manual_seed(0)
    tokens = torch.randn(4, 1, 24)
    tokens[2] = tokens[0]
    first, last = learned(Contrast(24, 10), tokens, CAPTIONS)
    assert last < 0.5 * first
    assert abs(last - 0.5 * torch.log(torch.tensor(2.0)).item()) < 0.05, "two of four rows have two right answers"


def test_contrast_cannot_be_won_by_views_that_look_alike():
    torch.manual_seed(0)
    _, last = learned(Contrast(24, 10), torch.ones(4, 1, 24), CAPTIONS)
    assert last > 0.9


def test_captioning_says_the_caption_of_the_queries_alone():
    torch.manual_seed(0)
    queries = torch.randn(4, 2, 24)
    decoder = Captioning(24, 2, 10, CAPTIONS.shape[1])
    first, last = learned(decoder, queries, CAPTIONS)
    assert last < 0.3 * first
    other = CAPTIONS.clone()
    other[3, 1:] = 4  # words that are still to be said are not seen
    hidden = []
    hook = decoder.layer.register_forward_hook(lambda module, given, made: hidden.append(made))
    decoder(queries, CAPTIONS, queries)
    decoder(queries, other, queries)
    hook.remove()
    torch.testing.assert_close(hidden[0][3, :3], hidden[1][3, :3])
    assert not torch.equal(hidden[0][3, 3:], hidden[1][3, 3:])


def test_self_distillation_follows_slowly_and_prefers_agreement():
    torch.manual_seed(0)
    tower = VisionTower._from_config(preset("sphinx-mini").vision_config)
    own = SelfDistillation(tower.dinov2, 64)
    pixels = renormalize(torch.randn(3, 3, 96, 96))
    tokens = dinov2_features(tower.dinov2, pixels)
    same = own(tokens, CAPTIONS, pixels)
    assert same < own(tokens.flip(0), CAPTIONS, pixels)
    before = own.teacher.embeddings.cls_token.clone()
    with torch.no_grad():
        tower.dinov2.embeddings.cls_token += 1.0
    own.follow()
    torch.testing.assert_close(own.teacher.embeddings.cls_token, before + 0.01)
    assert not any(p.requires_grad for p in own.teacher.parameters())
    assert {id(p) for p in own.parameters()}.isdisjoint(id(p) for p in tower.dinov2.parameters())


def test_disturbed_views_hide_patches_and_keep_the_rest_alike():
    torch.manual_seed(0)
    pixels = 3 + torch.rand(50, 3, 96, 96)
    seen = SelfDistillation.disturb(pixels, 16)
    hidden = (seen == 0).all(1).unfold(1, 16, 16).unfold(2, 16, 16).flatten(3)
    assert (hidden.all(-1) == hidden.any(-1)).all(), "whole patches"
    assert 0.1 < hidden.any(-1).float().mean() < 0.2
    brightness = (seen.sum((1, 2, 3)) / (seen != 0).sum((1, 2, 3)) / 3.5 - 1).abs()
    assert brightness.max() < 0.6


def test_every_encoder_has_its_way():
    tower = VisionTower._from_config(preset("sphinx-mini").vision_config)
    ways = {name: type(pretext_of(tower, name, 10, 3)) for name in ("clip", "convnext", "dinov2", "qformer")}
    assert ways == {"clip": Contrast, "convnext": Contrast, "dinov2": SelfDistillation, "qformer": Captioning}
