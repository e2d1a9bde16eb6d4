"""A SPHINX put together from public parts, the start of stage-1 training: encoders and language model from the
checkpoints their makers publish, the fusion between them new.

    model = assemble(clip="clip-vit-large-patch14", convnext="open_clip_pytorch_model.bin", dinov2="dinov2_vitg14.pth",
                     blip2="blip2-opt-2.7b", language_model="llama-2-13b-hf", preset="sphinx-1k")

Every file is read through `foreign`; names and shapes are checked before a module is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2Config,
    Blip2QFormerModel,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from sphinx_fast.model.config import CLIP_L14, DINOV2_G14, ConvNextConfig, SphinxConfig, SphinxVisionConfig
from sphinx_fast.model.presets import preset as named_config
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.vision.convnext import ConvNextModel
from sphinx_fast.vision.fusion import Fusion
from sphinx_fast.vision.qformer import QFormerEncoder
from sphinx_fast.weights.checkpoint import Checkpoint, PathLike
from sphinx_fast.weights.encoders import (
    Named,
    clip_from_hub,
    clip_from_open_clip,
    clip_widths,
    convnext_from_timm,
    convnext_widths,
    dinov2_from_hf,
    dinov2_from_hub,
    dinov2_widths,
    qformer_from_blip2,
)
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.layout import disk_shapes


@dataclass
class Part:
    """One encoder, read but not built: its configuration and {name as we save it: (tensor, key in its own file)}."""

    source: Checkpoint
    config: PreTrainedConfig
    tensors: dict[str, tuple[Tensor, str]]

    @classmethod
    def of(cls, source: Checkpoint, config: PreTrainedConfig, named: Named) -> Part:
        tensors = {}
        for name, tensor in named:
            tensors[name] = (tensor, source.last)
        return cls(source, config, tensors)

    def build(self, model_class: type[PreTrainedModel], dtype: torch.dtype, config: Any = None, below: str = "") -> Any:
        """The module with its weights, those `below` a prefix. WeightsError when they are not the configuration's."""
        config = self.config if config is None else config
        with torch.device("meta"):
            expected = disk_shapes(model_class(copy.deepcopy(config)))
        tensors = {name.removeprefix(below): at for name, at in self.tensors.items() if name.startswith(below)}
        for name, (tensor, key) in tensors.items():
            if name not in expected:
                raise WeightsError(f"{self.source.file_of(key)}: unknown key {key}")
            if tuple(tensor.shape) != expected[name]:
                raise WeightsError(
                    f"{self.source.file_of(key)}: {key} gives {name} the shape {list(tensor.shape)}, expected "
                    f"{list(expected[name])}"
                )
        for name in expected:
            if name not in tensors:
                raise WeightsError(f"{self.source.path}: nothing in this checkpoint gives {below}{name}")
        state = {name: tensor for name, (tensor, _) in tensors.items()}
        return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _reading(path: PathLike, read: Callable[[Checkpoint], Part]) -> Part:
    """`read` of the checkpoint, every complaint prefixed with the file it is about."""
    source = Checkpoint(path)
    try:
        return read(source)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        line = _one_line(error)
        if line.startswith(str(source.path)):
            raise
        where = source.file_of(source.last) if isinstance(error, WeightsError) else source.path
        raise WeightsError(f"{where}: {line}") from error


def _hub_config(cls: type[PreTrainedConfig], source: Checkpoint, kinds: tuple[str, ...]) -> Any:
    if source.model_type not in kinds:
        raise WeightsError(f"{source.path}: model_type is {source.model_type!r}, expected {' or '.join(kinds)}")
    try:
        config = cls.from_pretrained(source.path, local_files_only=True)
    except Exception as error:  # the field validators raise classes of their own
        raise WeightsError(f"{source.path / 'config.json'}: {_one_line(error)}") from error
    config.architectures = None
    return config


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_clip(path: PathLike, hidden_act: str | None = None) -> Part:
    """CLIP's vision side: a transformers folder (CLIPModel, CLIPVisionModel), or an open_clip/OpenAI state dict.

    A state dict does not say which activation it was trained with: `hidden_act` does ("gelu" or "quick_gelu"). Left
    out, it is what the folder's configuration says; for a bare file quick_gelu if it is OpenAI's own, otherwise gelu.
    """

    def read(source: Checkpoint) -> Part:
        if source.model_type:
            config = _hub_config(CLIPVisionConfig, source, ("clip", "clip_vision_model"))
            named = clip_from_hub(source)
        else:
            named = clip_from_open_clip(source)
            model = source.config.get("model_cfg", {})
            fields = {**CLIP_L14, **clip_widths(source)}
            quick = bool(model.get("quick_gelu", "input_resolution" in source))
            fields["hidden_act"] = "quick_gelu" if quick else "gelu"
            if width := model.get("vision_cfg", {}).get("head_width"):
                fields["num_attention_heads"] = fields["hidden_size"] // width
            config = CLIPVisionConfig(**fields)
        if hidden_act is not None:
            config.hidden_act = hidden_act
        return Part.of(source, config, named)

    return _reading(path, read)


def read_convnext(path: PathLike, layer_norm_eps: float | None = None) -> Part:
    """A ConvNeXt trunk: timm's state dict, or the `visual.trunk.*` of an open_clip model; a file or its folder.

    `layer_norm_eps` is not in the weights: 1e-5 for the XXL width, as timm builds it, otherwise 1e-6.
    """

    def read(source: Checkpoint) -> Part:
        fields = convnext_widths(source)
        if layer_norm_eps is not None:
            fields["layer_norm_eps"] = layer_norm_eps
        return Part.of(source, ConvNextConfig(**fields), convnext_from_timm(source))

    return _reading(path, read)


def read_dinov2(path: PathLike, grid_size: int = 16) -> Part:
    """DINOv2 without registers: a transformers folder or its own state dict; its position table baked to the grid."""

    def read(source: Checkpoint) -> Part:
        if source.model_type:
            config = _hub_config(Dinov2Config, source, ("dinov2",))
            named = dinov2_from_hf(source, grid_size)
        else:
            config = Dinov2Config(**{**DINOV2_G14, **dinov2_widths(source)})
            named = dinov2_from_hub(source, grid_size)
        config.image_size = grid_size * config.patch_size
        return Part.of(source, config, named)

    return _reading(path, read)


def read_blip2(path: PathLike) -> Part:
    """BLIP-2's vision tower, queries and Q-Former: the transformers folder of any Blip2 model; its LLM is left out."""

    def read(source: Checkpoint) -> Part:
        config = _hub_config(Blip2Config, source, ("blip-2", "blip_2"))
        config.qformer_config.use_qformer_text_input = False
        return Part.of(source, config, qformer_from_blip2(source))

    return _reading(path, read)


def load_clip(path: PathLike, hidden_act: str | None = None, dtype: torch.dtype = torch.float32) -> CLIPVisionModel:
    """`read_clip`, built. SPHINX's features of it: `vision.clip.clip_features`."""
    return read_clip(path, hidden_act).build(CLIPVisionModel, dtype)


def load_convnext(
    path: PathLike, layer_norm_eps: float | None = None, dtype: torch.dtype = torch.float32
) -> ConvNextModel:
    """`read_convnext`, built."""
    return read_convnext(path, layer_norm_eps).build(ConvNextModel, dtype)


def load_dinov2(path: PathLike, grid_size: int = 16, dtype: torch.dtype = torch.float32) -> Dinov2Model:
    """`read_dinov2`, built."""
    return read_dinov2(path, grid_size).build(Dinov2Model, dtype)


def load_blip2(path: PathLike, dtype: torch.dtype = torch.float32) -> QFormerEncoder:
    """`read_blip2`, built."""
    return _build_qformer(read_blip2(path), dtype)


def _build_qformer(part: Part, dtype: torch.dtype) -> QFormerEncoder:
    config: Any = part.config
    shape = (1, config.num_query_tokens, config.qformer_config.hidden_size)
    queries = part.tensors.get("query_tokens", (torch.empty(0), ""))[0]
    if tuple(queries.shape) != shape:
        file = part.source.file_of("query_tokens")
        raise WeightsError(f"{file}: query_tokens has shape {list(queries.shape)}, expected {list(shape)}")
    with torch.device("meta"):
        module = QFormerEncoder(config.vision_config, config.qformer_config, config.num_query_tokens)
    module.vision_model = part.build(Blip2VisionModel, dtype, config.vision_config, "vision_model.")
    module.qformer = part.build(Blip2QFormerModel, dtype, config.qformer_config, "qformer.")
    module.query_tokens = nn.Parameter(queries.to(dtype).clone())
    return module


def load_language_model(folder: PathLike, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Any causal language model's transformers folder. Raises WeightsError when it is none, or weights are missing."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder / 'config.json'}: no such file")
    source = Checkpoint(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        state = {key: source[key] for key in source}
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # a foreign configuration can fail in any way a model can
        raise WeightsError(f"{folder}: {_one_line(error)}") from error
    model, info = loaded
    for name in sorted(info["missing_keys"]):
        raise WeightsError(f"{folder}: nothing in this checkpoint gives {name}")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise WeightsError(f"{folder}: the output head has a bias, which SPHINX's has not")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def assemble(
    *,
    language_model: PathLike,
    clip: PathLike | None = None,
    convnext: PathLike | None = None,
    dinov2: PathLike | None = None,
    blip2: PathLike | None = None,
    preset: str = "sphinx-1k",
    vision: dict[str, Any] | None = None,
    clip_act: str | None = None,
    convnext_eps: float | None = None,
    image_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SphinxForConditionalGeneration:
    """A SPHINX of public parts, its fusion newly initialised (seed torch to repeat it). Nothing is frozen.

    Args:
        language_model: transformers folder of any causal language model.
        clip, convnext, dinov2, blip2: checkpoints as `read_*` take them; an encoder not given is left out.
        preset: variant whose views are cut (picture, view, grid and encoder input sizes, tags).
        vision: `SphinxVisionConfig` fields that replace the preset's, encoder configurations excepted.
        clip_act, convnext_eps: what a bare state dict cannot say, see `read_clip` and `read_convnext`.
        image_token_id: id of a visual position; the first past the language model's vocabulary by default.
        dtype: of all weights.

    Raises:
        WeightsError: one line naming the file, and the key where there is one.
    """
    geometry = named_config(preset).vision_config
    names = ("picture_size", "view_size", "grid_size", "convnext_size", "dinov2_size", "view_tags")
    fields = {**{name: getattr(geometry, name) for name in names}, **(vision or {})}
    parts: dict[str, Part] = {}
    if clip is not None:
        parts["clip"] = read_clip(clip, clip_act)
    if convnext is not None:
        parts["convnext"] = read_convnext(convnext, convnext_eps)
    if dinov2 is not None:
        parts["dinov2"] = read_dinov2(dinov2, int(fields["grid_size"]))
    if blip2 is not None:
        parts["qformer"] = read_blip2(blip2)
    vision_config = _vision_config(fields, parts)

    llm: Any = load_language_model(language_model, dtype)
    vocabulary = llm.get_input_embeddings().weight.shape[0]
    config = SphinxConfig(
        vision_config=vision_config,
        text_config=llm.config,
        image_token_id=vocabulary if image_token_id is None else image_token_id,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = SphinxForConditionalGeneration(config)
    tower = model.model.vision_tower
    for name, part in parts.items():
        if name == "qformer":
            tower.qformer = _build_qformer(part, dtype)
        else:
            setattr(tower, name, part.build(type(getattr(tower, name)), dtype))
    if type(llm.base_model) is not type(model.model.language_model):
        raise WeightsError(f"{language_model}: {type(llm).__name__} does not wrap the model AutoModel builds")
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.generation_config = llm.generation_config
    model.model.fusion = Fusion(vision_config, config.text_config.hidden_size)
    model.model.fusion.apply(model._init_weights).to(dtype)
    return model.eval()


def _vision_config(fields: dict[str, Any], parts: dict[str, Part]) -> SphinxVisionConfig:
    """The encoders' configurations and the views', fitted together."""
    sub = {f"{name}_config": part.config for name, part in parts.items() if name != "qformer"}
    if "qformer" in parts:
        blip2: Any = parts["qformer"].config
        sub |= {"qformer_config": blip2.qformer_config, "qformer_vision_config": blip2.vision_config}
        sub["num_query_tokens"] = blip2.num_query_tokens
    if len(parts) == ("qformer" in parts):
        raise WeightsError("give at least one of clip, convnext and dinov2")
    try:
        return SphinxVisionConfig(**{**fields, **sub})
    except ValueError as error:
        for name, part in parts.items():
            if str(error).startswith(name):
                raise WeightsError(f"{part.source.path}: does not fit the views: {error}") from error
        raise
