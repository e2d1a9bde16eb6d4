"""Fusion: encoder features -> visual tokens, the embeddings the language model reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sphinx_fast.model.config import SphinxVisionConfig
from sphinx_fast.vision.tower import VisionFeatures


class Projection(nn.Module):
    """LayerNorm(Linear(x)): features of some width -> model width D (paper section 3.1: one per kind of feature)."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.linear(features))


class Fusion(nn.Module):
    """Project, line up and tag: per view [start, Q query tokens, class token, P patch tokens, end]."""

    def __init__(self, config: SphinxVisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.patch_projection = Projection(config.patch_channels, hidden_size)
        self.query_projection = (
            Projection(config.qformer_config.hidden_size, hidden_size) if config.qformer_config else None
        )
        self.view_start = nn.Parameter(torch.zeros(1, 1, hidden_size)) if config.view_tags else None
        self.view_end = nn.Parameter(torch.zeros(1, 1, hidden_size)) if config.view_tags else None

    def view_tokens(self, features: VisionFeatures) -> Tensor:
        """Projected tokens of every view without tags, queries first: [B*V, Q + 1 + P, D]."""
        tokens = self.patch_projection(features.patches)
        if self.query_projection is None or features.queries is None:
            return tokens
        return torch.cat([self.query_projection(features.queries), tokens], dim=1)

    def forward(self, features: VisionFeatures) -> Tensor:
        """Features of N = B*V views -> visual tokens [N, tokens_per_view, D]."""
        tokens = self.view_tokens(features)
        if self.view_start is None or self.view_end is None:
            return tokens
        count = tokens.shape[0]
        return torch.cat([self.view_start.expand(count, -1, -1), tokens, self.view_end.expand(count, -1, -1)], dim=1)
