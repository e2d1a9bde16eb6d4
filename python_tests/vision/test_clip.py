"""CLIP: all tokens of the last block after the post layer norm, as open_clip computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from sphinx_fast.vision.clip import clip_features
from sphinx_fast.weights.public import load_clip

WIDTH, LAYERS, HEADS, SIZE, PATCH = 128, 2, 2, 32, 8


def pixels() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def randomized(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_agrees_with_open_clip(tmp_path: Path, act: str) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from open_clip.transformer import QuickGELU, VisionTransformer

    activation = QuickGELU if act == "quick_gelu" else nn.GELU
    theirs = randomized(
        VisionTransformer(
            SIZE, PATCH, WIDTH, LAYERS, HEADS, 4.0, output_dim=16, output_tokens=True, act_layer=activation
        )
    )
    torch.save({f"visual.{key}": tensor for key, tensor in theirs.state_dict().items()}, tmp_path / "clip.pt")
    theirs.proj = None
    class_token, patches = theirs(pixels())
    expected = torch.cat([class_token[:, None], patches], dim=1)
    ours = load_clip(tmp_path / "clip.pt", hidden_act=act)
    torch.testing.assert_close(clip_features(ours, pixels()), expected, rtol=1e-5, atol=1e-5)


def tiny(act: str = "gelu") -> CLIPVisionModel:
    fields = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return randomized(CLIPVisionModel(CLIPVisionConfig(**fields, image_size=SIZE, patch_size=PATCH, hidden_act=act)))


@torch.no_grad()
def test_features_are_normed_tokens_without_the_projection() -> None:
    model = tiny()
    tokens = clip_features(model, pixels())
    assert tokens.shape == (2, 1 + (SIZE // PATCH) ** 2, WIDTH)
    last = model(pixel_values=pixels()).last_hidden_state
    trunk: Any = getattr(model, "vision_model", model)
    norm = trunk.post_layernorm
    by_hand = (last - last.mean(-1, keepdim=True)) / (last.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(tokens, by_hand * norm.weight + norm.bias, rtol=1e-4, atol=1e-5)
    pooled = model(pixel_values=pixels()).pooler_output  # transformers norms the class token only
    torch.testing.assert_close(tokens[:, 0], pooled)


@torch.no_grad()
def test_the_activation_is_the_configuration_s() -> None:
    gelu, quick = tiny("gelu"), tiny("quick_gelu")
    quick.load_state_dict(gelu.state_dict())
    difference = (clip_features(gelu, pixels()) - clip_features(quick, pixels())).abs().max()
    assert 1e-3 < difference < 1
