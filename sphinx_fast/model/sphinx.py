"""SPHINX as a transformers model: visual tokens spliced into a causal language model's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.vision import Fusion, VisionTower


@dataclass
class SphinxModelOutput(BaseModelOutputWithPast):
    """As the language model's output, and `image_hidden_states`: visual tokens [B*V, tokens_per_view, D]."""

    image_hidden_states: Tensor | None = None


@dataclass
class SphinxOutput(CausalLMOutputWithPast):
    """As a causal LM's output, and `image_hidden_states`: visual tokens [B*V, tokens_per_view, D]."""

    image_hidden_states: Tensor | None = None


class SphinxPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = SphinxConfig
    config: SphinxConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012 - transformers reads this list
        "CLIPEncoderLayer",
        "Dinov2Layer",
        "Blip2EncoderLayer",
        "Blip2QFormerLayer",
        "Stage",
        "Fusion",
        "LlamaDecoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Fusion):
            for tag in (module.view_start, module.view_end):
                if tag is not None:
                    nn.init.normal_(tag, std=self.config.initializer_range)


class SphinxModel(SphinxPreTrainedModel):
    """`vision_tower` -> `fusion` -> `language_model`: everything but the output head."""

    def __init__(self, config: SphinxConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower._from_config(config.vision_config)
        self.fusion = Fusion(config.vision_config, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The language model (serving engines ask)."""
        return self.language_model

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """Views [B*V, 3, s, s] -> visual tokens [B*V, tokens_per_view, D]."""
        return self.fusion(self.vision_tower(pixel_values))

    def get_image_features(
        self, pixel_values: Tensor, num_image_patches: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Visual tokens per picture: `pooler_output` is a tuple of [views * tokens_per_view, D], one per picture."""
        tokens = self.visual_tokens(pixel_values)
        views = self._views_per_picture(pixel_values, num_image_patches)
        pictures = tuple(part.flatten(0, 1) for part in tokens.split(views))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pictures)  # type: ignore[arg-type]

    def _views_per_picture(self, pixel_values: Tensor, num_image_patches: Tensor | None) -> list[int]:
        total = pixel_values.shape[0]
        if num_image_patches is not None:
            views = [int(count) for count in num_image_patches]
        else:
            views = [self.config.vision_config.num_views] * (total // self.config.vision_config.num_views)
        if sum(views) != total:
            raise ValueError(f"pixel_values holds {total} views, but {sum(views)} are expected of the pictures")
        return views

    def splice(self, input_ids: Tensor, visual_tokens: Tensor | None) -> Tensor:
        """Embeddings [B, T, D] of `input_ids` with the visual tokens, in order, at the placeholders.

        Raises:
            ValueError: the number of placeholders is not the number of visual tokens.
        """
        embeddings, placeholders = self._text_embeddings(input_ids)
        return embeddings if visual_tokens is None else _scatter(embeddings, placeholders, visual_tokens)

    def _text_embeddings(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D], anything at the placeholders, and where these are [B, T]."""
        placeholders = input_ids == self.config.image_token_id
        # The placeholder's id need not be in the vocabulary: look up id 0 there and overwrite it.
        return self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0)), placeholders

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D] with the pictures' visual tokens in place, and those tokens [B*V, tokens_per_view, D].

        Without gradients the fusion writes them where they belong, and the second result is a view of the first when
        nothing lies between them.
        """
        embeddings, placeholders = self._text_embeddings(input_ids)
        rows = self._rows_of_views(embeddings, placeholders, pixel_values.shape[0])
        features = self.vision_tower(pixel_values)
        if rows is None:
            visual_tokens = self.fusion(features)
            return _scatter(embeddings, placeholders, visual_tokens), visual_tokens
        flat = embeddings.flatten(0, 1)
        self.fusion(features, out=flat, first=rows[:, 0].contiguous().to(flat.device))
        first, last = int(rows[0, 0]), int(rows[-1, -1])
        if last - first + 1 == rows.numel():
            return embeddings, flat[first : last + 1].view(*rows.shape, -1)
        return embeddings, flat[rows.to(flat.device)]

    def _rows_of_views(self, embeddings: Tensor, placeholders: Tensor, views: int) -> Tensor | None:
        """Rows [views, tokens_per_view] of the flattened embeddings that the fusion may write to, on the CPU.

        None where it may not: a gradient is wanted, torch.compile traces, or a view's placeholders are not one run. A
        GPU is waited for once, before it is given the encoders.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.fusion.fuses():
            return None
        weight = self.fusion.patch_projection.linear.weight
        if not embeddings.is_contiguous() or (embeddings.dtype, embeddings.device) != (weight.dtype, weight.device):
            return None
        per_view = self.config.vision_config.tokens_per_view
        rows = placeholders.cpu().flatten().nonzero()
        _check_placeholders(rows.shape[0], views * per_view)
        rows = rows.view(views, per_view)
        runs = rows[:, -1] - rows[:, 0] == per_view - 1
        return rows if views and bool(runs.all()) else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_image_patches: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> SphinxModelOutput:
        """Ids [B, T] and views [B*V, 3, s, s] (or `visual_tokens` computed before) -> hidden states [B, T, D].

        Plain causal attention over everything, visual positions included; positions count through the spliced row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None:
            if visual_tokens is not None:
                raise ValueError("give pixel_values or visual_tokens, not both")
            if inputs_embeds is not None:
                raise ValueError("pixel_values need input_ids: the placeholders say where the visual tokens go")
            self._views_per_picture(pixel_values, num_image_patches)
            assert input_ids is not None
            inputs_embeds, visual_tokens = self.embed(input_ids, pixel_values)
        elif input_ids is not None:
            inputs_embeds = self.splice(input_ids, visual_tokens)
        kwargs["return_dict"] = True
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return SphinxModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
            image_hidden_states=visual_tokens,
        )


def _scatter(embeddings: Tensor, placeholders: Tensor, visual_tokens: Tensor) -> Tensor:
    visual_tokens = visual_tokens.reshape(-1, visual_tokens.shape[-1])
    if not torch.compiler.is_compiling():
        _check_placeholders(int(placeholders.sum()), visual_tokens.shape[0])
    return embeddings.masked_scatter(placeholders.unsqueeze(-1), visual_tokens.to(embeddings))


def _check_placeholders(placeholders: int, visual_tokens: int) -> None:
    if placeholders != visual_tokens:
        raise ValueError(
            f"input_ids has {placeholders} visual placeholders, but the pictures give {visual_tokens} visual tokens"
        )


class SphinxForConditionalGeneration(SphinxPreTrainedModel, GenerationMixin):
    """SPHINX with its output head: the class users load, generate with and train."""

    def __init__(self, config: SphinxConfig) -> None:
        super().__init__(config)
        self.model = SphinxModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Where the embedding lies differs between language models: embed_tokens in Llama, wte in GPT-2.
        embedding = self.model.get_input_embeddings()
        names = [name for name, module in self.model.named_modules() if module is embedding]
        self._tied_weights_keys = {"lm_head.weight": f"model.{names[0]}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_image_patches: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> SphinxOutput | tuple[Any, ...]:
        """As `SphinxModel.forward`, then logits [B, T, vocab] (the last `logits_to_keep` rows, 0: all).

        `labels` [B, T] (-100 ignored, placeholders must be) give the mean next-token cross-entropy as `loss`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            num_image_patches=num_image_patches,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_tokens=visual_tokens,
            **{name: value for name, value in kwargs.items() if name not in ("num_items_in_batch", "return_dict")},
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        output = SphinxOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
        return output if kwargs.get("return_dict", True) is not False else output.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        num_image_patches: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The pictures enter with the prompt only; later steps find them in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if is_first_iteration or use_cache is False:
            inputs["pixel_values"] = pixel_values
            inputs["num_image_patches"] = num_image_patches
            inputs["visual_tokens"] = visual_tokens
        return inputs
