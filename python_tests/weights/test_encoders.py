"""Names of the encoders' weights: every key is renamed, left out on purpose, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sphinx_fast.weights.encoders import (
    clip_from_hub,
    clip_from_open_clip,
    clip_widths,
    convnext_from_timm,
    convnext_widths,
    dinov2_from_hf,
    dinov2_from_hub,
    dinov2_widths,
    prefixed,
    qformer_from_blip2,
)
from sphinx_fast.weights.foreign import WeightsError

ONE = torch.ones(1)


def renamed(function: Any, *keys: str, **options: Any) -> list[str]:
    return [name for name, _ in function({key: ONE for key in keys}, **options)]


def test_clip_packed_attention_becomes_query_key_value_in_order() -> None:
    packed = torch.arange(12.0).view(6, 2)
    named = dict(clip_from_open_clip({"visual.transformer.resblocks.3.attn.in_proj_weight": packed}))
    assert list(named) == [f"encoder.layers.3.self_attn.{part}_proj.weight" for part in "qkv"]
    assert torch.equal(torch.cat(list(named.values())), packed)


def test_clip_text_side_is_left_out_and_the_rest_refused() -> None:
    text = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.bias"]
    text += ["transformer.resblocks.0.ln_1.weight", "visual.proj", "input_resolution", "vocab_size"]
    assert renamed(clip_from_open_clip, *text) == []
    assert renamed(clip_from_open_clip, "visual.ln_pre.bias") == ["pre_layrnorm.bias"]
    for key in ("visual.bogus", "visual.transformer.resblocks.0.bogus.weight", "bogus.weight", "visual.ln_mid.bias"):
        with pytest.raises(WeightsError, match=f"unknown CLIP key {key}"):
            renamed(clip_from_open_clip, key)


def test_clip_of_transformers_old_and_new() -> None:
    keys = ["vision_model.post_layernorm.bias", "post_layernorm.bias", "text_model.x", "logit_scale"]
    keys += ["visual_projection.weight", "vision_model.embeddings.position_ids"]
    assert renamed(clip_from_hub, *keys) == ["post_layernorm.bias"] * 2


def test_convnext_trunk_and_heads() -> None:
    assert renamed(convnext_from_timm, "stem.0.weight", "head.norm.bias", "head.fc.weight") == [
        "stem.0.weight",
        "head.norm.bias",
    ]
    around = ["visual.trunk.stages.0.blocks.1.gamma", "visual.head.proj.weight", "text.x", "logit_scale"]
    assert renamed(convnext_from_timm, *around) == ["stages.0.blocks.1.gamma"]
    with pytest.raises(WeightsError, match="unknown ConvNeXt key norm_pre"):
        renamed(convnext_from_timm, "norm_pre.weight")


def test_dinov2_names_and_its_table() -> None:
    keys = ["cls_token", "norm.weight", "blocks.7.mlp.w12.bias", "blocks.0.ls2.gamma"]
    assert renamed(dinov2_from_hub, *keys, grid_size=2) == [
        "embeddings.cls_token",
        "layernorm.weight",
        "encoder.layer.7.mlp.weights_in.bias",
        "encoder.layer.0.layer_scale2.lambda1",
    ]
    table = torch.randn(1, 10, 4)
    ours = dict(dinov2_from_hub({"pos_embed": table}, 2))["embeddings.position_embeddings"]
    theirs = dict(dinov2_from_hf({"dinov2.embeddings.position_embeddings": table, "classifier.bias": ONE}, 2))
    assert ours.shape == (1, 5, 4) and torch.equal(ours, theirs["embeddings.position_embeddings"])
    for key in ("register_tokens", "blocks.0.bogus.weight", "blocks.0.1.norm1.weight"):
        with pytest.raises(WeightsError, match=f"unknown DINOv2 key {key}"):
            renamed(dinov2_from_hub, key, grid_size=2)


def test_qformer_keeps_the_queries_half_only() -> None:
    keys = ["query_tokens", "qformer.encoder.layer.0.output_query.dense.bias", "vision_model.post_layernorm.bias"]
    extra = ["qformer.encoder.layer.0.output.dense.bias", "qformer.encoder.layer.0.intermediate.dense.bias"]
    extra += ["language_model.lm_head.weight", "itm_head.weight", "embeddings.word_embeddings.weight"]
    assert renamed(qformer_from_blip2, *keys, *extra) == keys
    with pytest.raises(WeightsError, match="unknown Q-Former key bogus"):
        renamed(qformer_from_blip2, "bogus")


def test_released_widths_are_read_off_the_shapes() -> None:
    """The shapes of ViT-L/14, ConvNeXt-XXL and ViT-g/14, without their memory."""
    with torch.device("meta"):
        clip = {
            "visual.conv1.weight": torch.empty(1024, 3, 14, 14),
            "visual.positional_embedding": torch.empty(257, 1024),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.empty(4096, 1024),
            "visual.transformer.resblocks.23.ln_1.bias": torch.empty(1024),
        }
        convnext = {"stem.0.weight": torch.empty(384, 3, 4, 4)}
        for stage, (depth, width) in enumerate(zip((3, 4, 30, 3), (384, 768, 1536, 3072), strict=True)):
            convnext[f"stages.{stage}.downsample.1.weight"] = torch.empty(width, 1, 2, 2)
            convnext |= {f"stages.{stage}.blocks.{block}.gamma": torch.empty(width) for block in range(depth)}
        dinov2 = {
            "pos_embed": torch.empty(1, 1370, 1536),
            "patch_embed.proj.weight": torch.empty(1536, 3, 14, 14),
            "blocks.0.mlp.w12.weight": torch.empty(8192, 1536),
            "blocks.39.norm1.bias": torch.empty(1536),
        }
    assert clip_widths(clip) == {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    }
    trunk = {f"visual.trunk.{key}": tensor for key, tensor in convnext.items()}
    assert convnext_widths(convnext) == convnext_widths(trunk) == {
        "hidden_sizes": [384, 768, 1536, 3072],
        "depths": [3, 4, 30, 3],
        "layer_norm_eps": 1e-5,
    }  # fmt: skip
    assert dinov2_widths(dinov2) == {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "patch_size": 14,
        "mlp_ratio": 4,
        "use_swiglu_ffn": True,
    }


def test_widths_of_a_file_without_the_key_name_it() -> None:
    for widths, key in ((clip_widths, "conv1"), (convnext_widths, "stem.0"), (dinov2_widths, "pos_embed")):
        with pytest.raises(WeightsError, match=rf"{key}\S* is missing"):
            widths({})
    with pytest.raises(WeightsError, match=r"pos_embed has shape \[1\], expected 3 dimensions"):
        dinov2_widths({"pos_embed": ONE})


def test_prefixed() -> None:
    assert prefixed({"clip.a": ONE, "b": ONE, "clipper": ONE}, "clip.") == {"a": ONE}
