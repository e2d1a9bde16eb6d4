"""ConvNeXt: our module against timm's, and the tokens SPHINX makes of its map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sphinx_fast.model.config import ConvNextConfig
from sphinx_fast.vision.convnext import ConvNextModel, convnext_features, repeat_to_grid
from sphinx_fast.weights.public import load_convnext

DEPTHS, SIZES = (2, 1, 3, 1), (8, 12, 16, 24)


def randomized(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def pixels(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def ours(eps: float = 1e-5) -> ConvNextModel:
    return randomized(ConvNextModel(ConvNextConfig(depths=DEPTHS, hidden_sizes=SIZES, layer_norm_eps=eps)))


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@torch.no_grad()
def test_agrees_with_timm(eps: float) -> None:
    """Its state dict loads unchanged; the map after `head.norm` is the same. A large eps shows every norm has it."""
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.convnext import ConvNeXt

    theirs = randomized(ConvNeXt(depths=DEPTHS, dims=SIZES, norm_eps=eps, num_classes=0))
    model = ours(eps)
    model.load_state_dict(theirs.state_dict())
    expected = theirs.head.norm(theirs.forward_features(pixels(64)))
    torch.testing.assert_close(model(pixels(64)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_open_clip_trunk_loads(tmp_path: Path) -> None:
    """A real open_clip image tower around timm's smallest ConvNeXt of this kind."""
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from open_clip.timm_model import TimmModel

    tower = TimmModel("convnext_tiny", embed_dim=8, image_size=64, pool="", proj="linear", pretrained=False).eval()
    torch.save({f"visual.{key}": tensor for key, tensor in tower.state_dict().items()}, tmp_path / "clip.bin")
    model = load_convnext(tmp_path / "clip.bin")
    assert model.config.hidden_sizes == [96, 192, 384, 768] and model.config.layer_norm_eps == 1e-6
    trunk: Any = tower.trunk
    expected = trunk.head.norm(trunk.forward_features(pixels(64)))
    torch.testing.assert_close(model(pixels(64)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_agrees_with_the_formula() -> None:
    """The same network once more in plain functions of torch, float64: x + gamma * mlp(norm(conv(x)))."""
    model = ours().double()
    state = model.state_dict()
    x = pixels(64).double()

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
        weight, bias = (state[f"{name}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(y: Tensor, name: str, **options: Any) -> Tensor:
        return nn.functional.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def linear(y: Tensor, name: str) -> Tensor:
        return torch.einsum("bchw,dc->bdhw", y, state[f"{name}.weight"]) + state[f"{name}.bias"].view(1, -1, 1, 1)

    x = norm(conv(x, "stem.0", stride=4), "stem.1")
    for stage, depth in enumerate(DEPTHS):
        if stage:
            x = conv(norm(x, f"stages.{stage}.downsample.0"), f"stages.{stage}.downsample.1", stride=2)
        for block in range(depth):
            at = f"stages.{stage}.blocks.{block}"
            y = linear(norm(conv(x, f"{at}.conv_dw", padding=3, groups=x.shape[1]), f"{at}.norm"), f"{at}.mlp.fc1")
            y = linear(y * 0.5 * (1 + torch.erf(y / 2**0.5)), f"{at}.mlp.fc2")
            x = x + state[f"{at}.gamma"].view(1, -1, 1, 1) * y
    torch.testing.assert_close(model(pixels(64).double()), norm(x, "head.norm"), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_tokens_are_the_mean_and_the_repeated_map_row_major() -> None:
    model = ours()
    grid_map = model(pixels(64))  # 2 x 2
    tokens = repeat_to_grid(convnext_features(model, pixels(64)), 16)
    assert tokens.shape == (2, 17, SIZES[-1])
    for row in range(4):
        for column in range(4):
            assert torch.equal(tokens[:, 1 + 4 * row + column], grid_map[:, :, row // 2, column // 2])
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))
    native = convnext_features(model, pixels(64))
    assert torch.equal(native[:, 1:], grid_map.flatten(2).transpose(1, 2))


def test_layer_scale_starts_where_the_config_says() -> None:
    model = ConvNextModel(ConvNextConfig(depths=DEPTHS, hidden_sizes=SIZES, layer_scale_init=0.25))
    gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == sum(DEPTHS) and all((gamma == 0.25).all() for gamma in gammas)
