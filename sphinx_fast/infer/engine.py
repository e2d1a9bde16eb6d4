"""The engine: pictures and prompts become requests, which one scheduler runs together on one model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphinx_fast.infer.picture_cache import DEFAULT_BYTES, ModelIdentity, PictureCache, PictureEntry, PictureKey
from sphinx_fast.infer.request import Picture, Request
from sphinx_fast.infer.runner import Runner
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.infer.scheduler import Scheduler
from sphinx_fast.model.conversation import conversation_prompt
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.vision.graphs import CudaRecorder, turns_of
from sphinx_fast.weights.memory import picture_need

MAX_ROWS = 32  # requests at once
MAX_PROMPT_TOKENS = 8192  # in one pass: five pictures of sphinx-1k; more would only take memory for activations
_ENCODED_AT_ONCE = 8  # pictures


class Engine:
    """A model and its processor, ready to answer. Safe to use from many threads.

    Args:
        picture_cache: bytes to keep of pictures (0: none), or a cache to share; None: `default_cache_bytes`.
        max_rows: requests that run at once.
    """

    def __init__(
        self,
        model: SphinxForConditionalGeneration,
        processor: SphinxProcessor,
        picture_cache: PictureCache | int | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.processor = processor
        self.picture_cache = PictureCache.of(default_cache_bytes(model) if picture_cache is None else picture_cache)
        self._identity = ModelIdentity()
        eos = model.generation_config.eos_token_id
        eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self.runner = Runner(model.eval(), device, self._head(), eos_ids, self._encode, self.picture_cache, max_rows)
        self.scheduler = Scheduler(self.runner, max_rows, MAX_PROMPT_TOKENS)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins with nothing running and nothing kept."""
        return type(self), (self.model, self.processor, self.picture_cache, self.scheduler.max_rows)

    @property
    def model(self) -> SphinxForConditionalGeneration:
        """The model inside."""
        return self.runner.model

    @property
    def device(self) -> torch.device:
        """Where inputs go; with offloaded weights (device meta) the first place that holds any."""
        return self.runner.device

    @property
    def context(self) -> int:
        """Positions the language model can attend to, visual ones included."""
        config = self.model.config.text_config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return min(config.max_position_embeddings, window or config.max_position_embeddings)

    def _head(self) -> list[int]:
        """Ids that every conversation begins with, behind the picture."""
        ids = [self.processor.prompt_ids(conversation_prompt([(word, None)])) for word in ("a", "1")]
        bos = len(self.processor.prompt_ids(""))
        return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False))][bos:]

    # --- pictures -----------------------------------------------------------------------------------------------------
    def see(self, image: Any) -> Picture | None:
        """Reads a picture. None stays None.

        Raises:
            ValueError: it cannot be read.
        """
        if image is None:
            return None
        pixels = self.processor.image_processor.load(image)
        return self._seen(pixels, self.processor.image_processor.mode)

    def see_square(self, square: Tensor) -> Picture:
        """A picture that was padded, resized and normalised by whoever has it: float [3, picture_size, picture_size].

        Its views are cut in fp32 on the CPU, so they are those of the picture itself bit for bit.

        Raises:
            ValueError: it is of another shape or dtype.
        """
        size = self.processor.image_processor.picture_size
        if not square.is_floating_point() or tuple(square.shape) != (3, size, size):
            raise ValueError(
                f"the tensor: expected a normalised float [3, {size}, {size}], got {square.dtype} {list(square.shape)}"
            )
        mode = ("square", size, self.processor.image_processor.view_size)
        return self._seen(square.detach().to("cpu", torch.float32), mode)

    def _seen(self, pixels: np.ndarray | Tensor, mode: Hashable | None) -> Picture:
        model = None if mode is None else self._identity.current(*self._encoders)
        if model is None:  # views are random, or the encoders train
            tokens = self._visual_tokens([pixels])[0]
            return Picture(pixels, tokens.shape[0], object(), kept=False, visual_tokens=tokens)
        views = self.processor.image_processor.count_views(pixels)
        return Picture(pixels, views, PictureKey.of(pixels, mode, model), kept=bool(self.picture_cache.max_bytes))

    def encode(self, image: Any) -> Tensor | None:
        """A picture -> its visual tokens [V, tokens_per_view, D], shared and not to be written to; None stays None."""
        picture = self.see(image)
        if picture is None:
            return None
        self._encode([picture])
        return picture.visual_tokens

    @torch.inference_mode()
    def _visual_tokens(self, pixels: Sequence[Any]) -> Sequence[Tensor]:
        """What the encoders make of some pictures, each [V, tokens_per_view, D]."""
        views, counts = self.processor.image_processor.cut(pixels)
        return self.model.model.visual_tokens(views.to(self.device)).split(counts)

    def _encode(self, pictures: Sequence[Picture]) -> None:
        """Gives pictures their visual tokens: those of the cache, or what the encoders make of all others together."""
        new: dict[Any, Picture] = {}
        for picture in pictures:
            if picture.visual_tokens is None and picture.key not in new:
                found = self.picture_cache.get(picture.key) if picture.kept else None
                if isinstance(found, PictureEntry):
                    picture.visual_tokens = found.visual_tokens
                else:
                    new[picture.key] = picture
        unseen = list(new.values())
        for turn in turns_of(len(unseen), 1, _ENCODED_AT_ONCE):
            tokens = self._visual_tokens([picture.pixels for picture in unseen[turn]])
            for picture, own in zip(unseen[turn], tokens, strict=True):
                self._keep(picture, own)
        for picture in pictures:
            if picture.visual_tokens is None:
                picture.visual_tokens = new[picture.key].visual_tokens

    def _keep(self, picture: Picture, tokens: Tensor) -> None:
        entry = PictureEntry(tokens)
        picture.visual_tokens, picture.pixels = entry.visual_tokens, None
        if picture.kept and isinstance(picture.key, PictureKey):
            self._identity.after(picture.key.model, *self._encoders)
            self.picture_cache.put(picture.key, entry)

    @property
    def _encoders(self) -> tuple[nn.Module, nn.Module]:
        """All that visual tokens depend on."""
        return self.model.model.vision_tower, self.model.model.fusion

    def use_graphs(self, use: bool = True) -> Engine:
        """On a GPU that holds the whole language model, replay decoding steps as CUDA graphs, or no longer.

        Recorded by bucket of rows when first needed. Elsewhere nothing changes.
        """
        model = self.runner.model
        whole = all(parameter.device == self.device for parameter in model.parameters())
        self.runner.steps.record(CudaRecorder if use and whole and self.device.type == "cuda" else None)
        return self

    # --- requests -----------------------------------------------------------------------------------------------------
    def request(
        self,
        prompt: str,
        picture: Picture | None,
        sampling: Sampling,
        earlier: Request | None = None,
        wants_logprobs: bool = False,
    ) -> Request:
        """A prompt as a request. `earlier` is one whose prompt and answer this one may go on from.

        Raises:
            ValueError: the prompt leaves no room for an answer.
        """
        ids = self.processor.prompt_ids(prompt, views=[] if picture is None else [picture.views])
        room = self.context - len(ids)
        if room <= 0:
            raise ValueError(
                f"the prompt takes {len(ids)} positions and leaves no room for an answer: "
                f"the context has {self.context}"
            )
        place = None if earlier is None else earlier.suffix
        return Request(ids, picture, sampling, self.processor.tokenizer, room, place, wants_logprobs)

    def serve(self, requests: Iterable[Request], pieces: bool = False) -> Iterator[Request]:
        """Requests -> each as it is done; with `pieces` also whenever it has one. See `Scheduler.serve`."""
        return self.scheduler.serve(requests, pieces)

    def cancel(self, request: Request) -> None:
        """Give up a request; what it has said so far is its answer."""
        self.scheduler.cancel(request)


def default_cache_bytes(model: SphinxForConditionalGeneration) -> int:
    """1 GiB, or four pictures if that is more: visual tokens, and keys and values of every layer over them."""
    return max(DEFAULT_BYTES, 4 * sum(picture_need(model.config, model.dtype)))
