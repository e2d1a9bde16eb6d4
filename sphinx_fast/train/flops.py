"""Floating-point operations of a training step: what MFU is a share of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sphinx_fast.train.packing import Row
from sphinx_fast.train.pieces import IGNORED

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, per second, by a part of the device's name


def peak(device: torch.device) -> float | None:
    """Operations a second that a GPU is sold with, None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Flops:
    """Of one model: forward and backward of what learns, forward of what does not.

    language   6 N per token, N the language model's weights without the table of embeddings
    head       6 N per token that is predicted: no other has logits
    attention  12 H D per layer and (query, key) that sees: two products, forward and twice backward
    fusion     6 N per view: each projection times its tokens
    encoders   forward, per view, as torch counts it
    """

    language: float
    head: float
    attention: float
    fusion: float
    encoders: float

    @classmethod
    def of(cls, model: Any) -> Flops:
        """Counted from a model's weights, and from one picture's way through its encoders."""
        text, vision, fusion = model.config.text_config, model.config.vision_config, model.model.fusion
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        patches = vision.num_patch_tokens * _weights(fusion.patch_projection)
        queries = vision.num_query_tokens * _weights(fusion.query_projection) if fusion.query_projection else 0
        return cls(
            language=6.0 * (_weights(model.model.language_model) - model.get_input_embeddings().weight.numel()),
            head=6.0 * model.lm_head.weight.numel(),
            attention=12.0 * text.num_hidden_layers * text.num_attention_heads * head_dim,
            fusion=6.0 * (patches + queries),
            encoders=_encoder_flops(model.model.vision_tower),
        )

    def step(self, rows: Sequence[Row]) -> tuple[float, float]:
        """(all, the language model's with its head) of rows."""
        language, views = 0.0, 0
        for row in rows:
            views += 0 if row.pixel_values is None else len(row.pixel_values)
            language += len(row) * self.language + int((row.targets != IGNORED).sum()) * self.head
            for trunk, *branches in row.lengths:
                pairs = trunk * (trunk + 1) // 2 + sum(n * trunk + n * (n + 1) // 2 for n in branches)
                language += pairs * self.attention
        return language + views * (self.fusion + self.encoders), language


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def _encoder_flops(tower: Any) -> float:
    """Forward of one view."""
    config = tower.config
    views = torch.zeros(config.num_views, 3, config.view_size, config.view_size, device=tower.device)
    with FlopCounterMode(display=False) as counter:
        tower(views)
    return counter.get_total_flops() / config.num_views
