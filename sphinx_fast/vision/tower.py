"""The tower: all views of all pictures through four encoders, one batch each.

`pixel_values` [B*V, 3, s, s] is CLIP-normalised and picture-major, global view first, crops row-major. What each
encoder is fed follows the released code to the rounding (through fp16 where it went through fp16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, Dinov2Model, PreTrainedModel

from sphinx_fast.model.config import SphinxVisionConfig
from sphinx_fast.vision.clip import clip_features
from sphinx_fast.vision.convnext import ConvNextModel, convnext_features
from sphinx_fast.vision.dinov2 import dinov2_features, renormalize
from sphinx_fast.vision.qformer import QFormerEncoder


@dataclass
class VisionFeatures:
    """What the tower saw: `patches` [B*V, 1 + P, C] (CLIP | ConvNeXt | DINOv2) and `queries` [B*V, Q, Cq] or None."""

    patches: Tensor
    queries: Tensor | None


def split_crops(square: Tensor, ratio: int) -> Tensor:
    """[B, 3, r*s, r*s] -> crops row-major, picture-major: [B*r*r, 3, s, s]."""
    batch, channels, side, _ = square.shape
    size = side // ratio
    crops = square.reshape(batch, channels, ratio, size, ratio, size).permute(0, 2, 4, 1, 3, 5)
    return crops.reshape(batch * ratio * ratio, channels, size, size)


def join_crops(crops: Tensor, ratio: int) -> Tensor:
    """The inverse of `split_crops`: [B*r*r, 3, s, s] -> [B, 3, r*s, r*s]."""
    _, channels, size, _ = crops.shape
    square = crops.reshape(-1, ratio, ratio, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return square.reshape(-1, channels, ratio * size, ratio * size)


def bicubic_through_half(x: Tensor, size: int) -> Tensor:
    """torch's bicubic (a = -0.75, no antialias) on the fp16-rounded tensor; the result is fp16."""
    return F.interpolate(x.half(), size=(size, size), mode="bicubic")


class VisionTower(PreTrainedModel):
    """Four frozen encoders. Absent ones (the light variants have neither CLIP nor Q-Former) are None."""

    config_class = SphinxVisionConfig
    config: SphinxVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SphinxVisionConfig) -> None:
        super().__init__(config)
        self.clip = CLIPVisionModel._from_config(config.clip_config) if config.clip_config else None
        self.convnext = ConvNextModel._from_config(config.convnext_config) if config.convnext_config else None
        self.dinov2 = Dinov2Model._from_config(config.dinov2_config) if config.dinov2_config else None
        self.qformer = (
            QFormerEncoder(config.qformer_vision_config, config.qformer_config, config.num_query_tokens)
            if config.qformer_config
            else None
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QFormerEncoder):
            nn.init.normal_(module.query_tokens, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor) -> VisionFeatures:
        """[B*V, 3, view_size, view_size] -> features of every view. Raises ValueError on another shape."""
        config = self.config
        size = config.view_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: expected [views, 3, {size}, {size}], got {list(pixel_values.shape)}; "
                "was this picture cut for another variant?"
            )
        dtype = self.dtype
        patches: list[Tensor] = []
        if self.clip is not None:
            patches.append(clip_features(self.clip, pixel_values.to(dtype)))
        if self.convnext is not None:
            patches.append(convnext_features(self.convnext, self._convnext_pixels(pixel_values), config.grid_size))
        if self.dinov2 is not None:
            patches.append(dinov2_features(self.dinov2, self._dinov2_pixels(pixel_values)))
        queries = self.qformer(pixel_values.to(dtype)) if self.qformer is not None else None
        return VisionFeatures(torch.cat(patches, dim=-1), queries)

    def _convnext_pixels(self, pixel_values: Tensor) -> Tensor:
        """224 px views: nearest to 256 of the fp16 tensor. Light variants: the view; a sole one through fp16."""
        size = self.config.convnext_size
        if size != self.config.view_size:
            return F.interpolate(pixel_values.half(), size=(size, size)).to(self.dtype)
        if self.config.num_views == 1:
            pixel_values = pixel_values.half()
        return pixel_values.to(self.dtype)

    def _dinov2_pixels(self, pixel_values: Tensor) -> Tensor:
        """The views re-normalised; light variants first resize the whole picture, since the filter crosses crops."""
        size, views = self.config.dinov2_size, self.config.num_views
        if size == self.config.view_size:
            return renormalize(pixel_values.to(self.dtype))
        if views == 1:
            return renormalize(bicubic_through_half(pixel_values, size).to(self.dtype))
        if pixel_values.shape[0] % views:
            raise ValueError(f"pixel_values: {pixel_values.shape[0]} views are not {views} for every picture")
        ratio = self.config.picture_size // self.config.view_size
        grouped = pixel_values.unflatten(0, (-1, views))
        square = join_crops(grouped[:, 1:].flatten(0, 1), ratio)
        crops = split_crops(bicubic_through_half(square, size * ratio), ratio).unflatten(0, (-1, views - 1))
        global_view = bicubic_through_half(square, size).unsqueeze(1)
        return renormalize(torch.cat([global_view, crops], dim=1).flatten(0, 1).to(self.dtype))
