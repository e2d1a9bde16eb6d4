"""The plain arithmetic of frozen encoders against the modules whose weights it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VISION, assert_tower_close, light_vision, tiny_tower, tiny_views, tower_by_modules
from torch import nn

import sphinx_fast.vision.tower as tower_module
from sphinx_fast.image.geometry import padded_resize
from sphinx_fast.model.config import SphinxVisionConfig
from sphinx_fast.ops import EncoderViews, encoder_views, views
from sphinx_fast.vision import VisionTower

WITHOUT_QFORMER: dict[str, Any] = {"qformer_config": None, "qformer_vision_config": None}


def variant(**changes: dict[str, Any] | Any) -> SphinxVisionConfig:
    """The tiny tower; a dict changes fields of that encoder."""
    fields = {k: {**VISION[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    return SphinxVisionConfig(**{**VISION, **fields})


VARIANTS: dict[str, SphinxVisionConfig] = {
    "tiny": variant(),
    "quick_gelu": variant(clip_config={"hidden_act": "quick_gelu"}),
    "dinov2 with an MLP": variant(dinov2_config={"use_swiglu_ffn": False}),
    "no bias": variant(dinov2_config={"qkv_bias": False}, qformer_vision_config={"qkv_bias": False}),
    "odd heads": variant(
        clip_config={"hidden_size": 15, "num_attention_heads": 3},
        dinov2_config={"hidden_size": 21, "num_attention_heads": 3},
        qformer_vision_config={"hidden_size": 22, "num_attention_heads": 2},
        qformer_config={"hidden_size": 21, "num_attention_heads": 3, "encoder_hidden_size": 22},
    ),
    "cross-attention everywhere": variant(qformer_config={"cross_attention_frequency": 1}),
    "whole map": variant(convnext_size=128),
    "a stage without blocks": variant(convnext_config={"depths": (0, 1, 0, 2)}),
    "no Q-Former": variant(**WITHOUT_QFORMER),
    "CLIP alone": variant(**WITHOUT_QFORMER, convnext_config=None, dinov2_config=None),
    "ConvNeXt alone": variant(**WITHOUT_QFORMER, clip_config=None, dinov2_config=None),
    "light": light_vision(1),
    "light, five views": light_vision(5),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The encoders whose modules ran, as they do."""
    names: list[str] = []

    def note(run: Any) -> Any:
        return lambda model, seen: (names.append(type(model).__name__), run(model, seen))[1]

    for name in ("clip_features", "convnext_features", "dinov2_features", "run_module"):
        monkeypatch.setattr(tower_module, name, note(getattr(tower_module, name)))
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_as_near_to_the_truth_as_the_modules(name: str, dtype: torch.dtype, ran: list[str]) -> None:
    config = VARIANTS[name]
    tower = tiny_tower(config).to(dtype)
    seen = tiny_views(2 * config.num_views, config.view_size)
    assert_tower_close(tower, seen)
    ran.clear()
    with torch.no_grad():
        features = tower(seen)
    assert ran == [], "what this package builds is not left to the modules"
    assert features.patches.dtype == dtype
    assert features.patches.shape == (len(seen), config.num_patch_tokens, config.patch_channels)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@torch.no_grad()
def test_any_number_of_views(count: int) -> None:
    tower = tiny_tower(variant())
    assert_tower_close(tower, tiny_views(count, 32))
    together, alone = tower(tiny_views(7, 32)[:count]), tower(tiny_views(7, 32)[count - 1 : count])
    torch.testing.assert_close(together.patches[-1:], alone.patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_feed_forwards_in_runs_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinx_fast.vision.layers.CPU_ROWS", rows)
    assert_tower_close(tiny_tower(variant()), tiny_views(3, 32))


@torch.no_grad()
def test_encoders_write_into_one_buffer() -> None:
    tower = tiny_tower(variant())
    clip, convnext, dinov2 = tower(tiny_views(5, 32)).parts
    assert clip.untyped_storage().data_ptr() == dinov2.untyped_storage().data_ptr()
    assert clip.stride() == dinov2.stride() == (17 * 40, 40, 1) and dinov2.storage_offset() == 16
    assert convnext.shape == (5, 5, 20), "its own map is 2 x 2, and nothing is repeated"
    clip, convnext, dinov2 = tiny_tower(variant(convnext_size=128))(tiny_views(5, 32)).parts
    assert [part.storage_offset() for part in (clip, convnext, dinov2)] == [0, 16, 36]
    assert all(part.stride() == (17 * 60, 60, 1) for part in (clip, convnext, dinov2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "light", "light, five views"])
@torch.no_grad()
def test_views_cut_for_every_encoder_give_what_plain_views_give(name: str, dtype: torch.dtype) -> None:
    config = VARIANTS[name]
    tower = tiny_tower(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (s, 90, 3), dtype=torch.uint8, generator=generator) for s in (60, 130)]
    sizes: Any = {"picture_size": config.picture_size, "view_size": config.view_size}
    sizes["geometries"] = [padded_resize(*picture.shape[:2], config.picture_size) for picture in pictures]
    plain = views(pictures, **sizes)
    cut = encoder_views(
        pictures, **sizes, convnext_size=config.convnext_size, dinov2_size=config.dinov2_size, dtype=dtype
    )
    from_plain, from_cut = tower(plain), tower(cut)
    assert torch.equal(from_plain.parts[0], from_cut.parts[0])
    torch.testing.assert_close(from_plain.patches, from_cut.patches)
    if from_plain.queries is not None:
        assert torch.equal(from_plain.queries, from_cut.queries)
    assert_tower_close(tower, cut)


@pytest.mark.parametrize(
    ("name", "size"), [("clip", (5, 3, 32, 31)), ("dinov2", (4, 3, 32, 32)), ("convnext", (5, 3, 32, 32))]
)
def test_encoder_views_of_another_shape_are_one_clear_error(name: str, size: tuple[int, ...]) -> None:
    good = EncoderViews(torch.zeros(5, 3, 32, 32), torch.zeros(5, 3, 32, 32), torch.zeros(5, 3, 64, 64))
    with pytest.raises(ValueError, match=rf"{name}: expected \[views, 3, \d+, \d+\], got \["):
        VisionTower(variant())(good._replace(**{name: torch.zeros(size)}))


def test_gradients_flow_and_the_modules_carry_them() -> None:
    tower = tiny_tower(variant())
    with torch.no_grad():
        before = tower(tiny_views(2, 32))  # lays the weights side by side first
    features = tower(tiny_views(2, 32))
    torch.testing.assert_close(features.patches, before.patches, rtol=1e-4, atol=1e-5)
    assert features.queries is not None
    (features.patches.square().sum() + features.queries.square().sum()).backward()
    unused = ("intermediate.", "output.dense", "output.LayerNorm", "mask_token")
    missing = [n for n, p in tower.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert all(any(part in name for part in unused) for name in missing), missing
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.sub_(parameter.grad * 1e-3 if parameter.grad is not None else 0)
    assert_tower_close(tower, tiny_views(2, 32))
    assert not torch.allclose(tower_by_modules(tower, tiny_views(2, 32)).patches, before.patches, atol=1e-3)


def test_pixels_that_want_a_gradient_get_it() -> None:
    tower = tiny_tower(variant()).requires_grad_(False)
    seen = tiny_views(2, 32).requires_grad_()
    tower(seen).patches.sum().backward()
    assert seen.grad is not None and seen.grad.abs().sum() > 0
    assert not tower(seen.detach()).patches.requires_grad


@pytest.mark.parametrize("encoder", ["clip", "dinov2", "qformer"])
@torch.no_grad()
def test_attention_that_is_not_ours_is_left_to_the_modules(encoder: str, ran: list[str]) -> None:
    tower = tiny_tower(variant())
    model = getattr(tower, encoder)
    for part in model.modules():
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation("eager")
    tower(tiny_views(2, 32))
    assert ran == [type(model).__name__]


@torch.no_grad()
def test_dropout_in_training_is_left_to_the_modules() -> None:
    tower = tiny_tower(variant())
    calm = tower(tiny_views(2, 32))
    tower.train()
    shaken = tower(tiny_views(2, 32))
    assert torch.equal(calm.parts[0], shaken.parts[0]), "CLIP has none"
    assert calm.queries is not None and shaken.queries is not None
    assert not torch.allclose(calm.queries, shaken.queries, atol=1e-3)


@torch.no_grad()
def test_autocast_is_left_to_the_modules() -> None:
    tower, seen = tiny_tower(variant()), tiny_views(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, modules = tower(seen), tower_by_modules(tower, seen)
    assert torch.equal(ours.patches, modules.patches)


@torch.no_grad()
def test_a_hook_inside_an_encoder_is_called() -> None:
    tower = tiny_tower(variant())
    assert tower.clip is not None and tower.convnext is not None and tower.dinov2 is not None
    calls: list[str] = []
    for name, module in (
        ("clip", next(m for m in tower.clip.modules() if isinstance(m, nn.Linear))),
        ("convnext", tower.convnext.stages[2].blocks[0]),
        ("dinov2", next(m for m in tower.dinov2.modules() if isinstance(m, nn.LayerNorm))),
    ):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    tower(tiny_views(2, 32))
    assert sorted(calls) == ["clip", "convnext", "dinov2"]
    assert_tower_close(tower, tiny_views(2, 32))


@torch.no_grad()
def test_compiled_agrees(ran: list[str]) -> None:
    """One graph, no break. The back end here traces, functionalises and runs; the GPU tests let inductor write code."""
    one: dict[str, Any] = {"num_hidden_layers": 1}
    tower = tiny_tower(variant(clip_config=one, dinov2_config=one, qformer_vision_config=one, qformer_config=one))
    compiled = torch.compile(tower.forward, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(tiny_views(2, 32)), tower(tiny_views(2, 32))
    torch.testing.assert_close(ours.patches, eager.patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.queries, eager.queries, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(0.9)
    ours, eager = compiled(tiny_views(2, 32)), tower(tiny_views(2, 32))
    torch.testing.assert_close(ours.patches, eager.patches, rtol=1e-4, atol=1e-5)
    assert ran == []
