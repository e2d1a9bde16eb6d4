"""DINOv2: its pixels, its position table, and its output against timm's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sphinx_fast.model.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from sphinx_fast.vision.dinov2 import bake_position_table, dinov2_features, renormalize
from sphinx_fast.weights.public import load_dinov2


def table(side: int, channels: int = 5) -> Tensor:
    return torch.randn(1, 1 + side * side, channels, generator=torch.Generator().manual_seed(side))


def resampling_matrix(side: int, grid: int) -> Tensor:
    """[grid, side] in float64: Keys' cubic (a = -0.75) where the scale factor (grid + 0.1) / side samples."""
    a = -0.75
    matrix = torch.zeros(grid, side, dtype=torch.float64)
    for i in range(grid):
        center = (i + 0.5) * side / (grid + 0.1) - 0.5
        first = int(torch.tensor(center).floor())
        for tap in range(first - 1, first + 3):
            t = abs(center - tap)
            near = ((a + 2) * t - (a + 3)) * t * t + 1
            far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
            matrix[i, min(max(tap, 0), side - 1)] += near if t <= 1 else far
    return matrix


@pytest.mark.parametrize(("side", "grid"), [(37, 16), (7, 4), (4, 7), (16, 8)])
def test_baked_table_follows_the_formula(side: int, grid: int) -> None:
    source = table(side)
    baked = bake_position_table(source, grid)
    matrix = resampling_matrix(side, grid)
    square = source[0, 1:].double().view(side, side, -1)
    expected = torch.einsum("ia,jb,abc->ijc", matrix, matrix, square).reshape(grid * grid, -1)
    torch.testing.assert_close(baked[0, 1:].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(baked[:, :1], source[:, :1])


def test_baked_table_is_not_what_an_output_size_gives() -> None:
    source = table(37)
    square = source[:, 1:].view(1, 37, 37, -1).permute(0, 3, 1, 2)
    by_size = nn.functional.interpolate(square, size=(16, 16), mode="bicubic").flatten(2).transpose(1, 2)
    assert (bake_position_table(source, 16)[:, 1:] - by_size).abs().max() > 1e-2


def test_table_of_the_right_grid_and_other_dtypes() -> None:
    assert torch.equal(bake_position_table(table(4), 4), table(4))
    half = bake_position_table(table(7).bfloat16(), 4)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, bake_position_table(table(7).bfloat16().float(), 4).bfloat16())
    with pytest.raises(ValueError, match="not square"):
        bake_position_table(torch.zeros(1, 12, 5), 4)


def test_renormalize_undoes_clip_and_applies_imagenet() -> None:
    rgb = torch.rand(2, 3, 4, 4, dtype=torch.float64)

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (rgb - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    expected = normalized(IMAGENET_MEAN, IMAGENET_STD)
    clip = normalized(CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(renormalize(clip.float()).double(), expected, rtol=1e-5, atol=1e-5)
    assert renormalize(clip.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("swiglu", [True, False])
@torch.no_grad()
def test_agrees_with_timm(tmp_path: Path, swiglu: bool) -> None:
    """timm's DINOv2 has DINOv2's names, but for the packed feed-forward's two."""
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.layers import GluMlp
    from timm.models.vision_transformer import VisionTransformer

    fields: dict[str, Any] = {"mlp_layer": partial(GluMlp, gate_last=False), "act_layer": nn.SiLU, "mlp_ratio": 5.375}
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, init_values=1.0, num_classes=0,
        **(fields if swiglu else {}),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if not key.startswith(("head", "fc_norm"))}
    if swiglu:
        state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for key, t in state.items()}
    torch.save({**state, "mask_token": torch.zeros(1, 128)}, tmp_path / "dinov2.pth")
    ours = load_dinov2(tmp_path / "dinov2.pth", grid_size=4)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    torch.testing.assert_close(dinov2_features(ours, pixels), theirs.forward_features(pixels), rtol=1e-5, atol=2e-5)
