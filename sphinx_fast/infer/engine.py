"""The engine: a picture is encoded once, a prompt prefilled once, then one token after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sphinx_fast.infer.picture_cache import DEFAULT_BYTES, ModelIdentity, PictureCache, PictureEntry, PictureKey
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.model.conversation import cut_at_stop, held_back
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration

_REPLACEMENT = "\ufffd"


class Engine:
    """A model and its processor, ready to answer.

    Args:
        picture_cache: bytes of visual tokens to keep (0: none), or a cache to share.
    """

    def __init__(
        self,
        model: SphinxForConditionalGeneration,
        processor: SphinxProcessor,
        picture_cache: PictureCache | int = DEFAULT_BYTES,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.picture_cache = PictureCache.of(picture_cache)
        self._identity = ModelIdentity()
        eos = model.generation_config.eos_token_id
        self.eos_ids = {eos} if isinstance(eos, int) else set(eos or ())

    @property
    def device(self) -> torch.device:
        """Where inputs go; with offloaded weights (device meta) the first place that holds any."""
        return next((p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu"))

    @property
    def context(self) -> int:
        """Positions the language model was made for, visual ones included."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def _encoders(self) -> tuple[nn.Module, nn.Module]:
        """All that visual tokens depend on."""
        return self.model.model.vision_tower, self.model.model.fusion

    @torch.inference_mode()
    def encode(self, image: Any) -> Tensor | None:
        """A picture -> its visual tokens [V, tokens_per_view, D], shared and not to be written to; None stays None."""
        if image is None:
            return None
        image_processor = self.processor.image_processor
        picture = image_processor.load(image)
        key = self.picture_key(picture)
        if key is not None and (found := self.picture_cache.get(key)) is not None:
            return found.visual_tokens
        visual_tokens = self.model.model.visual_tokens(image_processor.cut([picture])[0].to(self.device))
        if key is not None:
            self._identity.after(key.model, *self._encoders)
            entry = PictureEntry(visual_tokens)
            self.picture_cache.put(key, entry)
            visual_tokens = entry.visual_tokens
        return visual_tokens

    def picture_key(self, picture: np.ndarray | Tensor) -> PictureKey | None:
        """Where a loaded picture's tokens are kept; None: the cache is off, views are random, or the model trains."""
        mode = self.processor.image_processor.mode
        if mode is None or not self.picture_cache.max_bytes:
            return None
        model = self._identity.current(*self._encoders)
        return None if model is None else PictureKey.of(picture, mode, model)

    def prompt_ids(self, prompt: str, visual_tokens: Tensor | None) -> Tensor:
        """A prompt -> ids [1, T], placeholders after BOS. Raises ValueError when no room is left for an answer."""
        ids = self.processor.prompt_ids(prompt, views=[] if visual_tokens is None else [visual_tokens.shape[0]])
        if len(ids) >= self.context:
            raise ValueError(
                f"the prompt takes {len(ids)} positions and leaves no room for an answer: "
                f"the context has {self.context}"
            )
        return torch.tensor([ids], device=self.device)

    def tokens(self, input_ids: Tensor, visual_tokens: Tensor | None, sampling: Sampling) -> Iterator[int]:
        """Token after token of the answer, EOS excluded, until EOS, `max_new_tokens` or the end of the context."""
        cache = DynamicCache(config=self.model.config.text_config)
        source = sampling.generator(self.device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "visual_tokens": visual_tokens}
        for _ in range(min(sampling.max_new_tokens, self.context - input_ids.shape[1])):
            with torch.inference_mode():
                logits = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                chosen = sampling.choose(logits, source)
            token = int(chosen)
            if token in self.eos_ids:
                return
            yield token
            inputs = {"input_ids": chosen.unsqueeze(0)}

    def stream(self, prompt: str, visual_tokens: Tensor | None, sampling: Sampling) -> Iterator[str]:
        """The answer piece by piece. What may still become a stop text, or half a character, is held back."""
        tokenizer = self.processor.tokenizer
        ids: list[int] = []
        shown = 0
        text = ""
        for token in self.tokens(self.prompt_ids(prompt, visual_tokens), visual_tokens, sampling):
            ids.append(token)
            text, stopped = cut_at_stop(tokenizer.decode(ids, skip_special_tokens=True), sampling.stop)
            if stopped:
                break
            # The last three bytes may be the start of a character whose end is still to come.
            broken = min(len(text) - len(text.rstrip(_REPLACEMENT)), 3)
            ready = len(text) - max(broken, held_back(text, sampling.stop))
            if ready > shown:
                yield text[shown:ready]
                shown = ready
        if len(text) > shown:
            yield text[shown:]
