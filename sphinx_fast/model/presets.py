"""The named variants: the released models, and sphinx-mini, our own."""

from __future__ import annotations

from typing import Any

from sphinx_fast.model.config import SphinxConfig

_LLAMA_13B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TINY_LLAMA: dict[str, Any] = {
    **_LLAMA_13B,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
_FULL_ENCODERS: dict[str, Any] = {
    "clip_config": {},
    "convnext_config": {},
    "dinov2_config": {},
    "qformer_vision_config": {},
    "qformer_config": {},
}
_LIGHT_ENCODERS: dict[str, Any] = {"convnext_config": {}, "dinov2_config": {}}

# sphinx-mini: our own small model. Views of 96 px with a 6 x 6 grid keep five views and four encoders affordable on
# two cores: (2 tags + 4 queries + 1 + 36) x 5 = 215 positions a picture. ConvNeXt sees the view at twice its size,
# which gives it the 6 x 6 map itself.
_MINI_VISION: dict[str, Any] = {
    "picture_size": 192,
    "view_size": 96,
    "grid_size": 6,
    "convnext_size": 192,
    "dinov2_size": 96,
    "num_query_tokens": 4,
    "clip_config": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 96,
        "patch_size": 16,
    },
    "convnext_config": {"depths": (0, 1, 2, 2), "hidden_sizes": (16, 32, 64, 128), "layer_scale_init": 1.0},
    "dinov2_config": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 16,
        "use_swiglu_ffn": False,
        "layer_norm_eps": 1e-6,
    },
    "qformer_vision_config": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 16,
    },
    "qformer_config": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "encoder_hidden_size": 64,
    },
}
_MINI_TEXT: dict[str, Any] = {
    **_LLAMA_13B,
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}

_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sphinx": (_FULL_ENCODERS, _LLAMA_13B),
    "sphinx-1k": ({**_FULL_ENCODERS, "picture_size": 448}, _LLAMA_13B),
    "sphinx-2k": ({**_FULL_ENCODERS, "picture_size": 672}, _LLAMA_13B),
    "sphinx-tiny": ({**_LIGHT_ENCODERS, "picture_size": 512, "view_size": 512, "convnext_size": 512}, _TINY_LLAMA),
    "sphinx-tiny-1k": ({**_LIGHT_ENCODERS, "picture_size": 1024, "view_size": 512, "convnext_size": 512}, _TINY_LLAMA),
    "sphinx-mini": (_MINI_VISION, _MINI_TEXT),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, *, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> SphinxConfig:
    """The configuration of a named variant; `vision` and `text` override single fields.

    >>> preset("sphinx-1k", vision={"view_tags": False}).vision_config.tokens_per_picture
    1445

    Raises:
        ValueError: `name` is not one of `PRESETS`.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    vision_fields, text_fields = _PRESETS[name]
    text_fields = {**text_fields, **(text or {})}
    return SphinxConfig(
        vision_config={**vision_fields, **(vision or {})},
        text_config=text_fields,
        image_token_id=text_fields["vocab_size"],
    )
