"""BLIP-2's EVA vision tower and Q-Former: a handful of queries that summarise a view."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel


class QFormerEncoder(nn.Module):
    """CLIP-normalised pixels [B, 3, s, s] -> query features [B, Q, C]. BLIP-2 (Li et al. 2023) without its LLM."""

    def __init__(self, vision_config: Blip2VisionConfig, config: Blip2QFormerConfig, num_query_tokens: int) -> None:
        super().__init__()
        self.vision_model = Blip2VisionModel._from_config(vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state
        queries = self.query_tokens.expand(patches.shape[0], -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
