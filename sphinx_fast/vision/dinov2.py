"""DINOv2 ViT: the self-supervised encoder. transformers' module, SPHINX's pixels and position table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from sphinx_fast.model.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD


def renormalize(pixel_values: Tensor) -> Tensor:
    """CLIP-normalised pixels -> ImageNet-normalised: (x * clip_std + clip_mean - in_mean) / in_std, in x's dtype.

    Every operation rounds in that dtype, as in the released code.
    """

    def channel(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=pixel_values.dtype, device=pixel_values.device).view(1, 3, 1, 1)

    return (pixel_values * channel(CLIP_STD) + channel(CLIP_MEAN) - channel(IMAGENET_MEAN)) / channel(IMAGENET_STD)


def dinov2_features(model: Dinov2Model, pixel_values: Tensor) -> Tensor:
    """ImageNet-normalised pixels [B, 3, s, s] -> tokens [B, 1 + P, C] after the final norm."""
    return model(pixel_values=pixel_values).last_hidden_state


def bake_position_table(table: Tensor, grid_size: int) -> Tensor:
    """A position table [1, 1 + n*n, C] resampled to [1, 1 + grid_size**2, C], as DINOv2's own code does at run time.

    Bicubic in fp32 with `scale_factor = (grid_size + 0.1) / n` and no antialias. That factor, not the output size, sets
    the sampling positions, so that `size=(16, 16)` (what transformers uses) gives other numbers.
    """
    cls_position, patches = table[:, :1], table[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ValueError(f"position table of {patches.shape[1]} patches is not square")
    if side == grid_size:
        return table
    patches = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (grid_size + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    if patches.shape[-1] != grid_size:
        raise ValueError(f"a {side} x {side} position table cannot be resampled to {grid_size} x {grid_size}")
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid_size * grid_size, -1)
    return torch.cat([cls_position, patches.to(table.dtype)], dim=1)
