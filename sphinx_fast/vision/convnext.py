"""ConvNeXt: the convolutional encoder. Parameter names are timm's, so its state dicts load unchanged."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sphinx_fast.model.config import ConvNextConfig


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a [B, C, h, w] map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear on the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + gamma * mlp(norm(depthwise 7x7 conv(x))) on a [B, C, h, w] map."""

    def __init__(self, channels: int, config: ConvNextConfig) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = Mlp(channels)
        self.gamma = nn.Parameter(torch.full((channels,), config.layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # channels last, where the norm and the MLP work
        y = self.mlp(self.norm(y)) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Halve the map (all stages but the first), then the blocks."""

    def __init__(self, channels_in: int, channels: int, depth: int, config: ConvNextConfig, first: bool) -> None:
        super().__init__()
        self.downsample = (
            nn.Identity()
            if first
            else nn.Sequential(
                LayerNorm2d(channels_in, eps=config.layer_norm_eps),
                nn.Conv2d(channels_in, channels, kernel_size=2, stride=2),
            )
        )
        self.blocks = nn.Sequential(*(Block(channels, config) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNextModel(PreTrainedModel):
    """The trunk and its last norm: pixels [B, 3, s, s] -> map [B, C, s/32, s/32].

    Equivalent to `timm.create_model("convnext_xxlarge", norm_eps=1e-5).forward_features` followed by `head.norm`.
    """

    config_class = ConvNextConfig
    config: ConvNextConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = (
        True  # nothing attends: any choice for the model is fine
    )

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        sizes = config.hidden_sizes
        self.stem = nn.Sequential(
            nn.Conv2d(3, sizes[0], kernel_size=4, stride=4), LayerNorm2d(sizes[0], eps=config.layer_norm_eps)
        )
        self.stages = nn.Sequential(
            *(
                Stage(sizes[max(i - 1, 0)], sizes[i], depth, config, first=i == 0)
                for i, depth in enumerate(config.depths)
            )
        )
        self.head = nn.ModuleDict({"norm": LayerNorm2d(sizes[-1], eps=config.layer_norm_eps)})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Block):
            nn.init.constant_(module.gamma, self.config.layer_scale_init)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head["norm"](self.stages(self.stem(pixel_values)))


def convnext_features(model: ConvNextModel, pixel_values: Tensor) -> Tensor:
    """[B, 3, s, s] -> tokens [B, 1 + p, C] of the map's own p positions: their mean first, then the map row-major."""
    tokens = model(pixel_values).flatten(2).transpose(1, 2)
    return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


def repeat_to_grid(tokens: Tensor, positions: int) -> Tensor:
    """Tokens [B, 1 + p, C] of a square map -> [B, 1 + positions, C], each position repeated evenly on both axes.

    8 x 8 -> 16 x 16 in the released variants with views of 224 px. The first token is the mean either way.
    """
    side, grid = isqrt(tokens.shape[1] - 1), isqrt(positions)
    if side == grid:
        return tokens
    rows = tokens[:, 1:].unflatten(1, (side, 1, side, 1)).expand(-1, -1, grid // side, -1, grid // side, -1)
    return torch.cat([tokens[:, :1], rows.flatten(1, 4)], dim=1)
