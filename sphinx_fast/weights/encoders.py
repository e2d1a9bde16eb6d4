"""Names of the encoders' weights, as their makers write them -> as `save_pretrained` of our model writes them.

Each function takes a mapping of one encoder's tensors and yields (our name, tensor), without a prefix. On-disk names
are used, never a module's: transformers renames modules between versions and converts when it loads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sphinx_fast.vision.dinov2 import bake_position_table
from sphinx_fast.weights.foreign import WeightsError

Named = Iterator[tuple[str, Tensor]]

# CLIP's text side and its projection lie in the same files, and SPHINX does not use them. OpenAI's own files also
# hold three settings as tensors.
CLIP_UNUSED = re.compile(
    r"positional_embedding|text_projection|logit_scale|logit_bias|token_embedding\.weight|ln_final\.\w+|"
    r"attn_mask|visual\.proj|transformer\..*|text\..*|input_resolution|context_length|vocab_size"
)

_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_from_open_clip(tensors: Mapping[str, Tensor]) -> Named:
    """open_clip's `visual.*` (text leftovers ignored) -> CLIPVisionModel."""
    for key in tensors:
        if CLIP_UNUSED.fullmatch(key):
            continue
        name = key.removeprefix("visual.")
        tensor = tensors[key]
        if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name):
            layer, rest = f"encoder.layers.{match[1]}", match[2]
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = rest.rsplit("_", 1)[1]
                for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{layer}.self_attn.{part}_proj.{kind}", chunk
                continue
            stem, _, kind = rest.rpartition(".")
            if stem in _CLIP_NAMES:
                yield f"{layer}.{_CLIP_NAMES[stem]}.{kind}", tensor
                continue
        elif name in _CLIP_NAMES:
            yield _CLIP_NAMES[name], tensor
            continue
        elif (stem := name.rpartition(".")[0]) in ("ln_pre", "ln_post"):
            yield f"{_CLIP_NAMES[stem]}.{name.rpartition('.')[2]}", tensor
            continue
        raise WeightsError(f"unknown CLIP key {key}")


def clip_from_hub(tensors: Mapping[str, Tensor]) -> Named:
    """transformers' CLIPModel (text side left out) or CLIPVisionModel, of any version -> CLIPVisionModel."""
    unused = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "classifier.")
    for key in tensors:
        if not key.startswith(unused) and not key.endswith("position_ids"):
            yield key.removeprefix("vision_model."), tensors[key]


def convnext_from_timm(tensors: Mapping[str, Tensor]) -> Named:
    """timm's trunk, or open_clip's `visual.trunk.*` around it -> ConvNextModel, whose names are timm's."""
    trunk = any(key.startswith("visual.trunk.") for key in tensors)
    for key in tensors:
        name = key
        if trunk:
            if not key.startswith("visual.trunk."):
                continue  # open_clip's text tower and projection head
            name = key.removeprefix("visual.trunk.")
        if not re.match(r"(stem|stages)\.\d+\.|head\.norm\.", name):
            if name.startswith("head."):
                continue  # timm's classifier
            raise WeightsError(f"unknown ConvNeXt key {key}")
        yield name, tensors[key]


_DINOV2_NAMES = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def dinov2_from_hub(tensors: Mapping[str, Tensor], grid_size: int) -> Named:
    """DINOv2's own names -> Dinov2Model on disk; the position table is baked to the view's grid."""
    for key in tensors:
        tensor = tensors[key]
        if key == "pos_embed":
            yield "embeddings.position_embeddings", bake_position_table(tensor, grid_size)
        elif key in ("cls_token", "mask_token"):
            yield f"embeddings.{key}", tensor
        elif key.startswith("patch_embed.proj."):
            yield key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection"), tensor
        elif key in ("norm.weight", "norm.bias"):
            yield f"layernorm.{key[5:]}", tensor
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            layer, rest = f"encoder.layer.{match[1]}", match[2]
            stem, _, kind = rest.rpartition(".")
            if stem == "attn.qkv":
                for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    yield f"{layer}.attention.attention.{part}.{kind}", chunk
            elif rest in _DINOV2_NAMES:
                yield f"{layer}.{_DINOV2_NAMES[rest]}", tensor
            elif stem in _DINOV2_NAMES:
                yield f"{layer}.{_DINOV2_NAMES[stem]}.{kind}", tensor
            elif stem in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                yield f"{layer}.{rest}", tensor
            else:
                raise WeightsError(f"unknown DINOv2 key {key}")
        else:
            raise WeightsError(f"unknown DINOv2 key {key}")


def dinov2_from_hf(tensors: Mapping[str, Tensor], grid_size: int) -> Named:
    """transformers' Dinov2Model, or one around it -> Dinov2Model; the position table is baked to the view's grid."""
    for key in tensors:
        if key.startswith("classifier."):
            continue
        name = key.removeprefix("dinov2.")
        tensor = tensors[key]
        yield name, bake_position_table(tensor, grid_size) if name == "embeddings.position_embeddings" else tensor


# The feed-forward half that Q-Formers trained on text use for text tokens; queries never pass it.
_QFORMER_TEXT = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")


def qformer_from_blip2(tensors: Mapping[str, Tensor]) -> Named:
    """Blip2Model's names, in the released files and on the hub alike: ours are the same.

    Its LLM is left out, and so are the heads and the text half of the image-text retrieval models.
    """
    ours = ("vision_model.", "qformer.", "query_tokens")
    llm = ("language_model.", "language_projection.")
    heads = ("embeddings.", "qformer.embeddings.", "itm_head.", "vision_projection.", "text_projection.")
    for key in tensors:
        if key.startswith(llm + heads) or _QFORMER_TEXT.match(key):
            continue
        if key.startswith(ours):
            if not key.endswith("position_ids"):
                yield key, tensors[key]
        else:
            raise WeightsError(f"unknown Q-Former key {key}")


def clip_widths(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of CLIPVisionConfig that an open_clip state dict shows; heads are taken to be 64 wide, as OpenAI's are."""
    patch = _shape(tensors, "visual.conv1.weight", 4)
    positions, width = _shape(tensors, "visual.positional_embedding", 2)
    return {
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "patch_size": patch[-1],
        "image_size": patch[-1] * math.isqrt(positions - 1),
    }


def convnext_widths(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ConvNextConfig that a trunk's state dict shows. timm's norms add 1e-6, those of the XXL size 1e-5."""
    prefix = "visual.trunk." if any(key.startswith("visual.trunk.") for key in tensors) else ""
    dot = re.escape(prefix)
    stages = _count(tensors, rf"{dot}stages\.(\d+)\.")
    sizes = [_shape(tensors, f"{prefix}stem.0.weight", 4)[0]]
    sizes += [_shape(tensors, f"{prefix}stages.{stage}.downsample.1.weight", 4)[0] for stage in range(1, stages)]
    return {
        "hidden_sizes": sizes,
        "depths": [_count(tensors, rf"{dot}stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "layer_norm_eps": 1e-5 if sizes[0] == 384 else 1e-6,
    }


def dinov2_widths(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of Dinov2Config that DINOv2's own state dict shows; all its sizes have heads 64 wide."""
    width = _shape(tensors, "pos_embed", 3)[-1]
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    return {
        "hidden_size": width,
        "num_hidden_layers": _count(tensors, r"blocks\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "patch_size": _shape(tensors, "patch_embed.proj.weight", 4)[-1],
        "mlp_ratio": 4 if swiglu else _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0] // width,
        "use_swiglu_ffn": swiglu,
    }


def _shape(tensors: Mapping[str, Tensor], key: str, rank: int) -> tuple[int, ...]:
    if key not in tensors:
        raise WeightsError(f"{key} is missing")
    shape = tuple(tensors[key].shape)
    if len(shape) != rank or 0 in shape:
        raise WeightsError(f"{key} has shape {list(shape)}, expected {rank} dimensions")
    return shape


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number in the first group of `pattern`."""
    return max((int(match[1]) for key in tensors if (match := re.match(pattern, key))), default=-1) + 1


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The entries below a prefix, the prefix cut off; values stay lazy where the mapping is."""
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
