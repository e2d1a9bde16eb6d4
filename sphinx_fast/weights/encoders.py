"""Names of the encoders' weights, as their makers write them -> as `save_pretrained` of our model writes them.

Each function takes a mapping of one encoder's tensors and yields (our name, tensor), without a prefix. On-disk names
are used, never a module's: transformers renames modules between versions and converts when it loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sphinx_fast.vision.dinov2 import bake_position_table
from sphinx_fast.weights.foreign import WeightsError

Named = Iterator[tuple[str, Tensor]]

# CLIP's text side and its projection lie in the released files, and SPHINX does not use them.
CLIP_UNUSED = re.compile(
    r"positional_embedding|text_projection|logit_scale|logit_bias|token_embedding\.weight|ln_final\.\w+|"
    r"attn_mask|visual\.proj|transformer\..*"
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


def qformer_from_blip2(tensors: Mapping[str, Tensor]) -> Named:
    """Blip2Model's names, in the released files and on the hub alike: ours are the same. Its LLM is left out."""
    ours = ("vision_model.", "qformer.", "query_tokens")
    ignored = ("language_model.", "language_projection.", "embeddings.", "itm_head.", "vision_projection.")
    ignored += ("text_projection.",)
    for key in tensors:
        if key.startswith(ours):
            if not key.endswith("position_ids"):
                yield key, tensors[key]
        elif not key.startswith(ignored):
            raise WeightsError(f"unknown Q-Former key {key}")


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The entries below a prefix, the prefix cut off; values stay lazy where the mapping is."""
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
