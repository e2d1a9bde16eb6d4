"""What a SPHINX is: the configuration of its vision side and of the whole model.

One legend for shapes: B pictures, V views, P patch positions, C channels, D model width, H heads, S prefix length,
T text length.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PAD_COLOR = (122, 116, 104)  # the CLIP mean as bytes: what a picture is padded to a square with

CONVNEXT_STRIDE = 32  # stem 4, then three halvings


class ConvNextConfig(PreTrainedConfig):
    """A ConvNeXt trunk (Liu et al. 2022). Defaults: open_clip's ConvNeXt-XXL."""

    model_type = "sphinx_convnext"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (3, 4, 30, 3),
        hidden_sizes: tuple[int, ...] | list[int] = (384, 768, 1536, 3072),
        layer_norm_eps: float = 1e-5,
        layer_scale_init: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.hidden_sizes = list(hidden_sizes)
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale_init = layer_scale_init
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]


# The released encoders' widths (../docs/model.md). A dict given to SphinxVisionConfig overrides single fields of these.
CLIP_L14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",  # the released loader builds GELU although the weights were trained with QuickGELU
}
DINOV2_G14: dict[str, Any] = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "image_size": 224,  # the position table is baked to the view's grid when weights are imported
    "patch_size": 14,
    "mlp_ratio": 4,
    "use_swiglu_ffn": True,
    "layer_norm_eps": 1e-6,
}
EVA_G14: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "layer_norm_eps": 1e-12,
}


def _sub_config(cls: type[PreTrainedConfig], value: Any, defaults: dict[str, Any]) -> Any:
    """A sub-configuration from what the user gave: None (absent), an instance, or a dict over the defaults."""
    if value is None or isinstance(value, PreTrainedConfig):
        return value
    return cls(**{**defaults, **{k: v for k, v in value.items() if k != "model_type"}})


class SphinxVisionConfig(PreTrainedConfig):
    """The views of a picture and the four encoders that see them.

    Args:
        picture_size: side in pixels of the padded square a picture is resized to.
        view_size: side of one view. `picture_size / view_size` = r gives 1 view (r = 1) or 1 + r*r views: the
            global view, then the crops row-major.
        grid_size: tokens per side of a view; every encoder's map has this many, ConvNeXt's is repeated up to it.
        convnext_size: side of ConvNeXt's input. Larger than the view: nearest-neighbour resize (224 -> 256).
        dinov2_size: side of DINOv2's input. Smaller than the view (the light variants): bicubic through fp16.
        view_tags: wrap each view's tokens in a learned start and end embedding (the released checkpoints do,
            the paper's counts of 289/1,445/2,890 do not).
        clip_config, convnext_config, dinov2_config: the patch encoders, each may be None except that one must be
            there. Channels are concatenated in the order CLIP | ConvNeXt | DINOv2.
        qformer_vision_config, qformer_config: BLIP-2's vision tower and Q-Former, or None (the light variants).
        num_query_tokens: queries, hence tokens, of the Q-Former.
    """

    model_type = "sphinx_vision"
    base_config_key = "vision_config"
    sub_configs = {  # noqa: RUF012 - transformers reads this class attribute
        "clip_config": CLIPVisionConfig,
        "convnext_config": ConvNextConfig,
        "dinov2_config": Dinov2Config,
        "qformer_vision_config": Blip2VisionConfig,
        "qformer_config": Blip2QFormerConfig,
    }

    def __init__(
        self,
        picture_size: int = 224,
        view_size: int = 224,
        grid_size: int = 16,
        convnext_size: int = 256,
        dinov2_size: int = 224,
        view_tags: bool = True,
        num_query_tokens: int = 32,
        clip_config: dict[str, Any] | PreTrainedConfig | None = None,
        convnext_config: dict[str, Any] | PreTrainedConfig | None = None,
        dinov2_config: dict[str, Any] | PreTrainedConfig | None = None,
        qformer_vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        qformer_config: dict[str, Any] | PreTrainedConfig | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.picture_size = picture_size
        self.view_size = view_size
        self.grid_size = grid_size
        self.convnext_size = convnext_size
        self.dinov2_size = dinov2_size
        self.view_tags = view_tags
        self.num_query_tokens = num_query_tokens
        self.clip_config = _sub_config(CLIPVisionConfig, clip_config, CLIP_L14)
        self.convnext_config = _sub_config(ConvNextConfig, convnext_config, {})
        self.dinov2_config = _sub_config(Dinov2Config, dinov2_config, DINOV2_G14)
        self.qformer_vision_config = _sub_config(Blip2VisionConfig, qformer_vision_config, EVA_G14)
        self.qformer_config = _sub_config(Blip2QFormerConfig, qformer_config, QFORMER)
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.view_size <= 0 or self.picture_size <= 0 or self.picture_size % self.view_size:
            raise ValueError(f"picture_size {self.picture_size} is not a multiple of view_size {self.view_size}")
        if (self.qformer_config is None) != (self.qformer_vision_config is None):
            raise ValueError("qformer_config and qformer_vision_config come together or not at all")
        if self.has_any_encoder and not self.patch_channels:
            raise ValueError("a vision tower needs at least one patch encoder: CLIP, ConvNeXt or DINOv2")
        for name, config, size in (
            ("clip_config", self.clip_config, self.view_size),
            ("dinov2_config", self.dinov2_config, self.dinov2_size),
        ):
            if config is not None and (config.image_size != size or size != config.patch_size * self.grid_size):
                raise ValueError(
                    f"{name}: image_size {config.image_size} and patch_size {config.patch_size} do not give a "
                    f"{self.grid_size} x {self.grid_size} grid of an input of {size} pixels"
                )
        if self.qformer_vision_config is not None and self.qformer_vision_config.image_size != self.view_size:
            raise ValueError(
                f"qformer_vision_config: image_size {self.qformer_vision_config.image_size} is not view_size "
                f"{self.view_size}"
            )
        if self.convnext_config is not None:
            side = self.convnext_size // CONVNEXT_STRIDE
            if self.convnext_size % CONVNEXT_STRIDE or side == 0 or self.grid_size % side:
                raise ValueError(
                    f"convnext_size {self.convnext_size} gives a map of {side} x {side}, which does not repeat evenly "
                    f"to {self.grid_size} x {self.grid_size}"
                )

    @property
    def has_any_encoder(self) -> bool:
        """False only for the bare default that transformers builds when it compares configurations."""
        return any(getattr(self, name) is not None for name in self.sub_configs)

    @property
    def num_views(self) -> int:
        """Views of one picture: 1, 5 or 10 in the released variants."""
        ratio = self.picture_size // self.view_size
        return 1 if ratio == 1 else 1 + ratio * ratio

    @property
    def patch_channels(self) -> int:
        """Channels after concatenation, CLIP | ConvNeXt | DINOv2: 5,632 or, for the light variants, 4,608."""
        encoders = (self.clip_config, self.convnext_config, self.dinov2_config)
        return sum(config.hidden_size for config in encoders if config is not None)

    @property
    def num_patch_tokens(self) -> int:
        """One class token and the grid: 257."""
        return 1 + self.grid_size * self.grid_size

    @property
    def tokens_per_view(self) -> int:
        """Positions one view takes in the language model: 289 without tags, 291 with."""
        queries = self.num_query_tokens if self.qformer_config is not None else 0
        return queries + self.num_patch_tokens + (2 if self.view_tags else 0)

    @property
    def tokens_per_picture(self) -> int:
        """The visual prefix: 289/291, 1,445/1,455, 2,890/2,910 (light: 259, 1,295)."""
        return self.tokens_per_view * self.num_views


class SphinxConfig(PreTrainedConfig):
    """A whole SPHINX: the vision side and any causal language model by its own configuration.

    Args:
        vision_config: `SphinxVisionConfig` or its dict.
        text_config: configuration of the language model, by default Llama; a dict names its `model_type`.
        image_token_id: id that stands for one visual position in `input_ids`. It need not be in the language
            model's vocabulary (and is not, for the released checkpoints): its embedding is never read.
        tie_word_embeddings: share the input and output embedding, as `text_config` says.
    """

    model_type = "sphinx"
    sub_configs = {"vision_config": SphinxVisionConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | SphinxVisionConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        image_token_id: int = 32000,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if vision_config is None:
            vision_config = SphinxVisionConfig(convnext_config={}, dinov2_config={}, clip_config={})
        elif isinstance(vision_config, dict):
            vision_config = SphinxVisionConfig(**{k: v for k, v in vision_config.items() if k != "model_type"})
        if not isinstance(text_config, PreTrainedConfig):
            fields = dict(text_config or {})
            text_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        self.vision_config = vision_config
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.initializer_range = initializer_range
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]
