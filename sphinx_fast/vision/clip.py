"""CLIP ViT: the encoder trained against text. transformers' module, SPHINX's choice of output."""

from __future__ import annotations

from torch import Tensor
from transformers import CLIPVisionModel


def clip_features(model: CLIPVisionModel, pixel_values: Tensor) -> Tensor:
    """CLIP-normalised pixels [B, 3, s, s] -> tokens [B, 1 + P, C]: class token, then patches row-major.

    All tokens of the last block pass the post layer norm, and the projection is left out. transformers'
    `last_hidden_state` stops before that norm.
    """
    trunk = getattr(model, "vision_model", model)  # transformers < 5.20 nests the trunk once more
    return trunk.post_layernorm(trunk(pixel_values=pixel_values).last_hidden_state)
