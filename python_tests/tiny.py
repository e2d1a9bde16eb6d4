"""Tiny SPHINX models and folders that tests share: seconds to build, every part of the real architecture."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from close import assert_close
from torch import Tensor

from sphinx_fast import SphinxConfig, SphinxForConditionalGeneration, SphinxVisionConfig
from sphinx_fast.ops import EncoderViews
from sphinx_fast.vision import VisionFeatures, VisionTower
from sphinx_fast.weights.accessory import convert

GOLDEN = Path(__file__).parent / "golden"

VISION: dict[str, Any] = {
    "picture_size": 64,
    "view_size": 32,
    "grid_size": 4,
    "convnext_size": 64,
    "dinov2_size": 32,
    "num_query_tokens": 3,
    "clip_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "convnext_config": {"depths": (1, 1, 1, 1), "hidden_sizes": (4, 8, 12, 20), "layer_scale_init": 1.0},
    "dinov2_config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
    },
    "qformer_vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "qformer_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "encoder_hidden_size": 16,
    },
}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> SphinxConfig:
    """Five views of 32 pixels, four encoders, 22 positions a view; `vision` and `text` override fields."""
    return SphinxConfig(
        vision_config={**VISION, **(vision or {})}, text_config={**TEXT, **(text or {})}, image_token_id=400
    )


def light_vision(views: int) -> SphinxVisionConfig:
    """The light variants in small: views of 128, ConvNeXt at the view's size, DINOv2 at 7/16 of it as there."""
    return SphinxVisionConfig(
        picture_size=128 if views == 1 else 256,
        view_size=128,
        grid_size=4,
        convnext_size=128,
        dinov2_size=56,
        convnext_config=VISION["convnext_config"],
        dinov2_config={**VISION["dinov2_config"], "image_size": 56, "patch_size": 14},
    )


def tiny_tower(config: SphinxVisionConfig) -> VisionTower:
    """A seeded random tower in fp32 whose every weight counts."""
    torch.manual_seed(0)
    tower = VisionTower(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tower


def tiny_views(count: int, size: int) -> Tensor:
    """Seeded random views [count, 3, size, size]; the first ones are the same for any count."""
    generators = (torch.Generator().manual_seed(1 + index) for index in range(count))
    return torch.stack([torch.randn(3, size, size, generator=generator) for generator in generators])


@torch.no_grad()
def tower_by_modules(tower: VisionTower, seen: Tensor | EncoderViews) -> VisionFeatures:
    """What the encoders' own modules make of `seen`."""
    return tower._as_modules(tower.encoder_inputs(seen))


def assert_tower_close(tower: VisionTower, seen: Tensor | EncoderViews) -> None:
    """What the tower makes of `seen` is as near to the modules in float64 as the modules themselves are."""
    with torch.no_grad():
        ours = tower(seen)
    inputs = tower.encoder_inputs(seen)
    theirs = tower_by_modules(tower, inputs)
    exact = tower_by_modules(copy.deepcopy(tower).double(), EncoderViews(*(view.double() for view in inputs)))
    assert_close(ours.patches, theirs.patches, exact.patches, "patches")
    assert (ours.queries is None) == (theirs.queries is None)
    if ours.queries is not None and theirs.queries is not None and exact.queries is not None:
        assert_close(ours.queries, theirs.queries, exact.queries, "queries")


def tiny_model(config: SphinxConfig | None = None, seed: int = 0) -> SphinxForConditionalGeneration:
    """A seeded random model in fp32. Weights are wide enough that pictures change the logits."""
    torch.manual_seed(seed)
    model = SphinxForConditionalGeneration(config or tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif "bias" in name:
                parameter.normal_(std=0.05)
    return model


@functools.cache
def converted(name: str) -> Path:
    """A golden folder converted once per test process."""
    target = Path(tempfile.mkdtemp(prefix="sphinx-fast-test-")) / name
    convert(GOLDEN / name, target, progress=False)
    return target


def reshard(folder: Path, shards: int) -> None:
    """Split a one-shard folder as tensor parallelism does: the inverse of what the importer joins."""
    source = folder / "consolidated.00-of-01.model.pth"
    weights = torch.load(source, weights_only=True)["model"]
    source.unlink()
    rows = ("wq", "wk", "wv", "w1", "w3", "output")
    columns = ("wo", "w2", "tok_embeddings")
    for shard in range(shards):
        part = {}
        for key, tensor in weights.items():
            stem = key.split(".")[-2] if "." in key else key
            is_llm = ".attention.w" in key or ".feed_forward.w" in key or stem in ("output", "tok_embeddings")
            is_llm = is_llm and not any(encoder in key for encoder in ("clip.", "convnext", "dinov2", "qformer."))
            if is_llm and stem in rows:
                tensor = tensor.chunk(shards, 0)[shard].clone()
            elif is_llm and stem in columns:
                tensor = tensor.chunk(shards, 1)[shard].clone()
            part[key] = tensor
        torch.save({"model": part}, folder / f"consolidated.{shard:02d}-of-{shards:02d}.model.pth")
