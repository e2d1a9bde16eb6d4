"""Fusion: encoder features -> visual tokens, the embeddings the language model reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sphinx_fast import ops
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

    def is_plain(self) -> bool:
        """Whether the arithmetic is that of the two layers as they were made: not adapted, quantised, cut up for
        several devices, loaded on use, hooked or autocast."""
        linear, norm = self.linear, self.norm
        return (
            type(linear) is nn.Linear
            and type(norm) is nn.LayerNorm
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (self, linear, norm))
            and all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for p in self.parameters())
            and linear.weight.dtype in ops.FLOAT_DTYPES
            and not torch.is_autocast_enabled(linear.weight.device.type)
        )

    def tensors(self) -> ops.Projection:
        return ops.Projection(self.linear.weight, self.linear.bias, self.norm.weight, self.norm.bias)


class Fusion(nn.Module):
    """Project, line up and tag: per view [start, Q query tokens, class token, P patch tokens, end].

    Runs as the op `sphinx_fast.ops.fusion`; through the layers one by one (`layer_by_layer`) where they are not plain.
    """

    def __init__(self, config: SphinxVisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.patch_projection = Projection(config.patch_channels, hidden_size)
        self.query_projection = (
            Projection(config.qformer_config.hidden_size, hidden_size) if config.qformer_config else None
        )
        self.view_start = nn.Parameter(torch.zeros(1, 1, hidden_size)) if config.view_tags else None
        self.view_end = nn.Parameter(torch.zeros(1, 1, hidden_size)) if config.view_tags else None

    def view_tokens(self, features: VisionFeatures) -> Tensor:
        """Tokens of every view without the tags: [B*V, Q + 1 + P, D]."""
        tokens = self(features)
        return tokens if self.view_start is None else tokens[:, 1:-1]

    def layer_by_layer(self, features: VisionFeatures) -> Tensor:
        """What the op computes, in torch: repeat, concatenate, project, concatenate."""
        tokens = self.patch_projection(features.patches)
        if self.query_projection is not None and features.queries is not None:
            tokens = torch.cat([self.query_projection(features.queries), tokens], dim=1)
        if self.view_start is None or self.view_end is None:
            return tokens
        count = tokens.shape[0]
        return torch.cat([self.view_start.expand(count, -1, -1), tokens, self.view_end.expand(count, -1, -1)], dim=1)

    def fuses(self) -> bool:
        """Whether the op computes this fusion where its weights lie."""
        projections = [one for one in (self.patch_projection, self.query_projection) if one is not None]
        return all(one.is_plain() for one in projections) and ops.covers(self.patch_projection.linear.weight.device)

    def forward(self, features: VisionFeatures, out: Tensor | None = None, first: Tensor | None = None) -> Tensor:
        """Features of N = B*V views -> visual tokens [N, tokens_per_view, D].

        Where it `fuses()` and no gradient is wanted they can be written straight into the rows `first` [N] of `out`
        [rows, D], which is then returned (see `ops.fusion`).
        """
        if not self.fuses():
            if out is not None:
                raise ValueError("out: only where the fusion `fuses()`")
            return self.layer_by_layer(features)
        queries, query = None, None
        if self.query_projection is not None and features.queries is not None:
            queries, query = features.queries, self.query_projection.tensors()
        tags = None if self.view_start is None or self.view_end is None else (self.view_start, self.view_end)
        return ops.fusion(
            features.parts,
            self.patch_projection.tensors(),
            queries=queries,
            query=query,
            tags=tags,
            eps=self.patch_projection.norm.eps,
            out=out,
            first=first,
        )
