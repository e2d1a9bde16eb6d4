"""What each encoder of sphinx-mini learns beside its labels, in the way its big brother was trained.

CLIP and ConvNeXt tell captions apart (OpenCLIP, arXiv 2212.07143), DINOv2 agrees with a slow copy of itself that
sees the view undisturbed (arXiv 2304.07193, both its losses, without multi-crop and KoLeo), the Q-Former's queries are
what a small decoder needs to say the caption (BLIP-2, arXiv 2301.12597, its image-grounded text generation).

Shapes: N views, L words of a caption (0 behind its end), P patches, C channels.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphinx_fast.vision.dinov2 import dinov2_features

WIDTH = 64  # of the parts that only training has


def text_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)


class Contrast(nn.Module):
    """Which caption of the batch belongs to which view: symmetric cross-entropy over cosine similarities.

    Views with the same caption are right for each other.
    """

    def __init__(self, channels: int, vocabulary: int) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(vocabulary, WIDTH), text_layer()
        self.text, self.view = nn.Linear(WIDTH, WIDTH), nn.Linear(channels, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, tokens: Tensor, captions: Tensor, pixels: Tensor) -> Tensor:
        """Tokens [N, 1 + P, C], class token first, captions [N, L]."""
        there = captions > 0
        hidden = self.layer(self.words(captions), src_key_padding_mask=~there)
        mean = (hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        views, texts = F.normalize(self.view(tokens[:, 0]), dim=-1), F.normalize(self.text(mean), dim=-1)
        logits = self.log_scale.exp().clamp(max=50.0) * views @ texts.T
        same = (captions[:, None] == captions[None]).all(-1).float()
        right = same / same.sum(-1, keepdim=True)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    def follow(self) -> None:
        """Nothing follows the encoder."""


class SelfDistillation(nn.Module):
    """Class and patch tokens of a disturbed view say which prototypes a slow copy of the encoder sees in the view."""

    PROTOTYPES, SHARP, SOFT, SLOW = 128, 0.05, 0.1, 0.99

    def __init__(self, encoder: nn.Module, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, self.PROTOTYPES, bias=False)
        self.student: list[nn.Module] = [encoder]  # a list, or its weights would be ours
        self.teacher: Any = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(2, self.PROTOTYPES))  # of class and patch tokens
        self.centre: Tensor

    @staticmethod
    def disturb(pixels: Tensor, patch: int, share: float = 0.15) -> Tensor:
        """Views [N, 3, s, s] darker or lighter, noisy, and a share of their patches hidden."""
        n, _, side, _ = pixels.shape
        grid = side // patch
        hidden = (
            (torch.rand(n, 1, grid, grid, device=pixels.device) < share)
            .repeat_interleave(patch, 2)
            .repeat_interleave(patch, 3)
        )
        lighter = 1 + 0.15 * torch.randn(n, 1, 1, 1, device=pixels.device)
        return (pixels * lighter + 0.1 * torch.randn_like(pixels)).masked_fill(hidden, 0.0)

    def forward(self, tokens: Tensor, captions: Tensor, pixels: Tensor) -> Tensor:
        """Tokens [N, 1 + P, C] of the disturbed views, pixels of the undisturbed ones as the encoder reads them."""
        with torch.no_grad():
            seen = self.teacher_head(F.normalize(dinov2_features(self.teacher, pixels), dim=-1))
            targets = [F.softmax((x - c) / self.SHARP, -1) for x, c in zip(_parts(seen), self.centre, strict=True)]
            means = torch.stack([part.flatten(0, -2).mean(0) for part in _parts(seen)])
            self.centre.lerp_(means, 0.1)
        said = self.head(F.normalize(tokens, dim=-1)) / self.SOFT
        losses = [
            -(target * F.log_softmax(part, -1)).sum(-1).mean()
            for target, part in zip(targets, _parts(said), strict=True)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def follow(self) -> None:
        """After an update: the copy moves a little towards the encoder."""
        for slow, fast in ((self.teacher, self.student[0]), (self.teacher_head, self.head)):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - self.SLOW)


def _parts(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens [N, 1, C] and patch tokens [N, P, C]."""
    return tokens[:, :1], tokens[:, 1:]


class Captioning(nn.Module):
    """The caption, word by word, from the queries alone: they stand before it in a decoder of one layer."""

    def __init__(self, channels: int, queries: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.queries, self.words = nn.Linear(channels, WIDTH), nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(queries + length - 1, WIDTH))
        self.layer, self.head = text_layer(), nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor, captions: Tensor, pixels: Tensor) -> Tensor:
        """Tokens [N, Q, C] of the queries, captions [N, L]."""
        words = captions[:, :-1]
        given = torch.cat([self.queries(tokens), self.words(words)], dim=1) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(given.shape[1], device=given.device)
        said = self.head(self.layer(given, src_mask=mask, is_causal=True)[:, tokens.shape[1] - 1 :])
        return F.cross_entropy(said.flatten(0, 1), captions.flatten(), ignore_index=0)

    def follow(self) -> None:
        """Nothing follows the encoder."""


def pretext_of(tower: Any, name: str, vocabulary: int, length: int) -> Contrast | SelfDistillation | Captioning:
    """What the encoder `name` of a tower learns in its own way from captions of `length` words."""
    config = tower.config
    if name == "dinov2":
        return SelfDistillation(tower.dinov2, config.dinov2_config.hidden_size)
    if name == "qformer":
        return Captioning(config.qformer_config.hidden_size, config.num_query_tokens, vocabulary, length)
    return Contrast(getattr(config, f"{name}_config").hidden_size, vocabulary)
