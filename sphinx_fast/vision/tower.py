"""The tower: all views of all pictures through four encoders, one batch each.

`pixel_values` [B*V, 3, s, s] is CLIP-normalised and picture-major, global view first, crops row-major. What each
encoder is fed follows the released code to the rounding (through fp16 where it went through fp16).

Weights that do not train run as plain arithmetic (`frozen`) and write into buffers that all encoders share. Weights
that train run as the modules of transformers, and so does what `frozen` does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, Dinov2Model, PreTrainedModel

from sphinx_fast.model.config import CONVNEXT_STRIDE, SphinxVisionConfig
from sphinx_fast.ops import EncoderViews
from sphinx_fast.vision.clip import clip_features
from sphinx_fast.vision.convnext import ConvNextModel, convnext_features, repeat_to_grid
from sphinx_fast.vision.dinov2 import dinov2_features, renormalize
from sphinx_fast.vision.frozen import clip_into, convnext_into, dinov2_into, qformer_into
from sphinx_fast.vision.graphs import MAX_PICTURES, TowerGraphs
from sphinx_fast.vision.prepare import NotPlainError
from sphinx_fast.vision.qformer import QFormerEncoder

Branch = Callable[[], None]


@dataclass
class VisionFeatures:
    """What the tower saw in N = B*V views.

    Attributes:
        parts: one tensor per patch encoder, channels in the order CLIP | ConvNeXt | DINOv2, each [N, 1 + p, C_i]: the
            class token, then the encoder's own map row-major. p is P, or fewer where a map is smaller than the grid
            (ConvNeXt's 8 x 8 of the variants with views of 224 px). Strides may be any, but for the channels'.
        queries: [N, Q, Cq] of the Q-Former, or None.
    """

    parts: Sequence[Tensor]
    queries: Tensor | None

    def to(self, dtype: torch.dtype) -> VisionFeatures:
        """The same features in a dtype."""
        queries = None if self.queries is None else self.queries.to(dtype)
        return VisionFeatures([part.to(dtype) for part in self.parts], queries)

    @property
    def patches(self) -> Tensor:
        """The reference's layout [N, 1 + P, C], made anew: small maps repeated to the grid, channels concatenated."""
        positions = max(part.shape[1] for part in self.parts) - 1
        whole = [repeat_to_grid(part, positions) for part in self.parts]
        return whole[0] if len(whole) == 1 else torch.cat(whole, dim=-1)


class Reads(NamedTuple):
    """One flag for each of `EncoderViews`."""

    clip: bool
    dinov2: bool
    convnext: bool


def split_crops(square: Tensor, ratio: int) -> Tensor:
    """[B, 3, r*s, r*s] -> crops row-major, picture-major: [B*r*r, 3, s, s]."""
    batch, channels, side, _ = square.shape
    size = side // ratio
    crops = square.reshape(batch, channels, ratio, size, ratio, size).permute(0, 2, 4, 1, 3, 5)
    return crops.reshape(batch * ratio * ratio, channels, size, size)


def join_crops(crops: Tensor, ratio: int) -> Tensor:
    """The inverse of `split_crops`: [B*r*r, 3, s, s] -> [B, 3, r*s, r*s]."""
    _, channels, size, _ = crops.shape
    square = crops.reshape(-1, ratio, ratio, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return square.reshape(-1, channels, ratio * size, ratio * size)


def bicubic_through_half(x: Tensor, size: int) -> Tensor:
    """torch's bicubic (a = -0.75, no antialias) on the fp16-rounded tensor; the result is fp16."""
    return F.interpolate(x.half(), size=(size, size), mode="bicubic")


class VisionTower(PreTrainedModel):
    """Four frozen encoders. Absent ones (the light variants have neither CLIP nor Q-Former) are None."""

    config_class = SphinxVisionConfig
    config: SphinxVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SphinxVisionConfig) -> None:
        super().__init__(config)
        self.clip = CLIPVisionModel._from_config(config.clip_config) if config.clip_config else None
        self.convnext = ConvNextModel._from_config(config.convnext_config) if config.convnext_config else None
        self.dinov2 = Dinov2Model._from_config(config.dinov2_config) if config.dinov2_config else None
        self.qformer = (
            QFormerEncoder(config.qformer_vision_config, config.qformer_config, config.num_query_tokens)
            if config.qformer_config
            else None
        )
        self._graphs: TowerGraphs | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QFormerEncoder):
            nn.init.normal_(module.query_tokens, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor | EncoderViews) -> VisionFeatures:
        """[B*V, 3, view_size, view_size], or what `ops.encoder_views` made, -> features of every view.

        Raises ValueError on another shape. With gradients to carry, or under autocast, the modules run, else what
        `frozen` has of them.
        """
        views = self.encoder_inputs(pixel_values)
        if self._carries_gradients(views) or torch.is_autocast_enabled(views.clip.device.type):
            return self._as_modules(views)
        if self._graphs is not None and self._may_replay(views):
            return self._filling_the_grid(self._graphs(self, views))
        features = self.empty_features(len(views.clip), views.clip.device)
        for branch in self.branches(views, features):
            branch()
        return self._filling_the_grid(features)

    def _carries_gradients(self, views: EncoderViews) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(view.requires_grad for view in views) or any(weight.requires_grad for weight in self.parameters())

    def use_graphs(self, use: bool = True, max_pictures: int = MAX_PICTURES) -> VisionTower:
        """Run as CUDA graphs (`graphs`) from now on, or no longer; without a GPU, and in training, nothing changes.

        `max_pictures`, a power of two, is the largest batch that is one graph. Returns the tower.
        """
        self._graphs = TowerGraphs(max_pictures) if use else None
        return self

    def _may_replay(self, views: EncoderViews) -> bool:
        """Whether a recording computes what the encoders would: no dropout, nobody traces or records around us."""
        return (
            views.clip.is_cuda
            and len(views.clip) > 0
            and not self.training
            and not any(encoder.training for encoder in self.children())
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
        )

    def _apply(self, fn: Any, recurse: bool = True) -> VisionTower:
        if self._graphs is not None:  # a move or a cast: let go of the memory that recordings hold
            self._graphs.clear()
        return super()._apply(fn, recurse)

    def encoder_inputs(self, pixel_values: Tensor | EncoderViews) -> EncoderViews:
        """What each encoder reads, in the tower's dtype; of an encoder that is not there, something unused."""
        config, dtype = self.config, self.dtype
        if isinstance(pixel_values, EncoderViews):
            sizes = (config.view_size, config.dinov2_size, config.convnext_size)
            names = EncoderViews._fields
            for name, size, view, read in zip(names, sizes, pixel_values, self.reads(), strict=True):
                if read and tuple(view.shape) != (len(pixel_values.clip), 3, size, size):
                    raise ValueError(f"{name}: expected [views, 3, {size}, {size}], got {list(view.shape)}")
            return EncoderViews(*(view.to(dtype) for view in pixel_values))
        size = config.view_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: expected [views, 3, {size}, {size}], got {list(pixel_values.shape)}; "
                "was this picture cut for another variant?"
            )
        return EncoderViews(
            clip=pixel_values.to(dtype) if self.reads().clip else pixel_values,
            dinov2=self._dinov2_pixels(pixel_values) if self.reads().dinov2 else pixel_values,
            convnext=self._convnext_pixels(pixel_values) if self.reads().convnext else pixel_values,
        )

    def reads(self) -> Reads:
        """Which of the encoders' inputs anybody reads."""
        clip = self.clip is not None or self.qformer is not None
        return Reads(clip, self.dinov2 is not None, self.convnext is not None)

    def empty_features(self, count: int, device: torch.device) -> VisionFeatures:
        """Memory for the features of `count` views.

        Encoders whose map fills the grid own neighbouring channels of one buffer [count, 1 + P, C], in channel order; a
        smaller map has a buffer of its own. So nothing is concatenated, and a projection of a slice is one GEMM.
        """
        config = self.config
        side = config.convnext_size // CONVNEXT_STRIDE
        maps = [  # of each patch encoder: positions and channels
            (positions, encoder.config.hidden_size)
            for encoder, positions in (
                (self.clip, config.grid_size**2), (self.convnext, side * side), (self.dinov2, config.grid_size**2)
            )
            if encoder is not None
        ]  # fmt: skip
        like: dict[str, Any] = {"dtype": self.dtype, "device": device}
        full = [channels for positions, channels in maps if positions == config.grid_size**2]
        slices = iter(torch.empty(count, config.num_patch_tokens, sum(full), **like).split(full, dim=-1))
        parts = [
            next(slices) if positions == config.grid_size**2 else torch.empty(count, 1 + positions, channels, **like)
            for positions, channels in maps
        ]
        if self.qformer is None:
            return VisionFeatures(parts, None)
        return VisionFeatures(parts, torch.empty(count, *self.qformer.query_tokens.shape[1:], **like))

    def branches(self, views: EncoderViews, features: VisionFeatures) -> list[Branch]:
        """The encoders as calls without order among them; each writes its place in `features`."""
        outputs = iter(features.parts)
        branches: list[Branch] = []
        if self.clip is not None:
            branches.append(_branch(clip_into, clip_features, self.clip, views.clip, next(outputs)))
        if self.convnext is not None:
            branches.append(_branch(convnext_into, convnext_features, self.convnext, views.convnext, next(outputs)))
        if self.dinov2 is not None:
            branches.append(_branch(dinov2_into, dinov2_features, self.dinov2, views.dinov2, next(outputs)))
        if self.qformer is not None and features.queries is not None:
            branches.append(_branch(qformer_into, run_module, self.qformer, views.clip, features.queries))
        return branches

    def _as_modules(self, views: EncoderViews) -> VisionFeatures:
        """The modules in a row, each output a tensor of its own: gradients flow."""
        parts = []
        if self.clip is not None:
            parts.append(clip_features(self.clip, views.clip))
        if self.convnext is not None:
            parts.append(convnext_features(self.convnext, views.convnext))
        if self.dinov2 is not None:
            parts.append(dinov2_features(self.dinov2, views.dinov2))
        queries = self.qformer(views.clip) if self.qformer is not None else None
        return self._filling_the_grid(VisionFeatures(parts, queries))

    def _filling_the_grid(self, features: VisionFeatures) -> VisionFeatures:
        """A small map needs another encoder's beside it to show how large the grid is: without one it is repeated."""
        if all(part.shape[1] < self.config.num_patch_tokens for part in features.parts):
            features.parts = [repeat_to_grid(part, self.config.grid_size**2) for part in features.parts]
        return features

    def _convnext_pixels(self, pixel_values: Tensor) -> Tensor:
        """224 px views: nearest to 256 of the fp16 tensor. Light variants: the view; a sole one through fp16."""
        size = self.config.convnext_size
        if size != self.config.view_size:
            return F.interpolate(pixel_values.half(), size=(size, size)).to(self.dtype)
        if self.config.num_views == 1:
            pixel_values = pixel_values.half()
        return pixel_values.to(self.dtype)

    def _dinov2_pixels(self, pixel_values: Tensor) -> Tensor:
        """The views re-normalised; light variants first resize the whole picture, since the filter crosses crops."""
        size, views = self.config.dinov2_size, self.config.num_views
        if size == self.config.view_size:
            return renormalize(pixel_values.to(self.dtype))
        if views == 1:
            return renormalize(bicubic_through_half(pixel_values, size).to(self.dtype))
        if pixel_values.shape[0] % views:
            raise ValueError(f"pixel_values: {pixel_values.shape[0]} views are not {views} for every picture")
        ratio = self.config.picture_size // self.config.view_size
        grouped = pixel_values.unflatten(0, (-1, views))
        square = join_crops(grouped[:, 1:].flatten(0, 1), ratio)
        crops = split_crops(bicubic_through_half(square, size * ratio), ratio).unflatten(0, (-1, views - 1))
        global_view = bicubic_through_half(square, size).unsqueeze(1)
        return renormalize(torch.cat([global_view, crops], dim=1).flatten(0, 1).to(self.dtype))


def run_module(module: Any, pixels: Tensor) -> Tensor:
    return module(pixels)


def _branch(frozen: Any, plain: Any, model: Any, pixels: Tensor, out: Tensor) -> Branch:
    """`frozen` where it knows all that the model holds, else the model itself."""

    def run() -> None:
        try:
            frozen(model, pixels, out)
        except NotPlainError:
            out.copy_(plain(model, pixels))

    return run
