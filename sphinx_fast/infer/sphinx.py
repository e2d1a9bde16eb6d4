"""`Sphinx`: a loaded model to ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sphinx_fast.infer.batch import Batch
from sphinx_fast.infer.chat import Conversation
from sphinx_fast.infer.engine import MAX_ROWS, Engine
from sphinx_fast.infer.loading import load
from sphinx_fast.infer.picture_cache import PictureCache
from sphinx_fast.infer.request import Answer, Picture, Request
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.model.conversation import conversation_prompt
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.weights.quantize import Quantization


class Sphinx:
    """A loaded model to ask. See `from_pretrained`.

    Every method takes a picture as a path, bytes, PIL image, uint8 [h, w, 3] array or tensor, or None for a question
    without a picture.
    """

    def __init__(
        self,
        model: SphinxForConditionalGeneration,
        processor: SphinxProcessor,
        *,
        picture_cache: PictureCache | int | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.engine = Engine(model, processor, picture_cache, max_rows)
        self.quantization: Quantization | None = None  # which layers are quantised and which are not

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        quantize: str | None = None,
        picture_cache: PictureCache | int | None = None,
        max_rows: int = MAX_ROWS,
        **kwargs: Any,
    ) -> Sphinx:
        """Load a folder (or hub id) that `sphinx-fast convert` or training wrote.

        The memory needed is computed and logged (logger `sphinx_fast`) before the first weight is read.

        Args:
            folder: None loads the embedded sphinx-mini.
            device: where to compute; the GPU if there is one.
            dtype: of weights and arithmetic; as stored where the device computes that natively, else fp32.
            variant: see the picture through another preset's views, e.g. "sphinx-2k" for a SPHINX-1k.
            quantize: "int8", "int4" (torchao) or "nf4" (bitsandbytes, GPU): the language model's linear layers while
                they are read; `quantization` says which. int4 computes in bfloat16 where no dtype is given.
            picture_cache: bytes to keep on the device of pictures for later questions about them: visual tokens, and
                the language model's keys and values over them (default 1 GiB, or four pictures if that is more; 0:
                none), or a `PictureCache` that several models share.
            max_rows: questions that are answered at once; others wait.
            kwargs: for transformers' `from_pretrained`, e.g. `device_map="auto"`.

        Raises:
            ValueError: the folder is missing, is a released one, or holds another model; an argument is out of range;
                the weights are more than the GPU has; a quantisation is not for this device, model or installation.
        """
        if picture_cache is not None:
            picture_cache = PictureCache.of(picture_cache)
        loaded = load(folder, device=device, dtype=dtype, variant=variant, quantize=quantize, **kwargs)
        sphinx = cls(loaded.model, loaded.processor, picture_cache=picture_cache, max_rows=max_rows)
        sphinx.quantization = loaded.quantization
        return sphinx

    @property
    def model(self) -> SphinxForConditionalGeneration:
        """The transformers model inside."""
        return self.engine.model

    @property
    def processor(self) -> SphinxProcessor:
        """The processor inside."""
        return self.engine.processor

    @property
    def picture_cache(self) -> PictureCache:
        """What is kept of the pictures asked about: `stats()`, `clear()`."""
        return self.engine.picture_cache

    # `**sampling` below are fields of `Sampling`: max_new_tokens, temperature (0: greedy), top_p, top_k, seed, stop.
    # Where there are several questions, a list gives each its own value.
    def ask(self, image: Any, question: str, *, return_logprobs: bool = False, **sampling: Any) -> Any:
        """The answer to one question, str.

        Args:
            image: picture or None.
            question: free text, or a prompt of `sphinx_fast.tasks.prompts`.
            return_logprobs: give an `Answer` instead: the text, its tokens and their log-probabilities.
            sampling: fields of `Sampling`.

        Raises:
            ValueError: the picture cannot be read, or the prompt leaves no room for an answer.
        """
        return self._answers(self._batch([(image, question)], sampling, return_logprobs, None), return_logprobs)[0]

    def ask_many(
        self, image: Any, questions: Sequence[str], *, return_logprobs: bool = False, **sampling: Any
    ) -> list[Any]:
        """The answers to many questions about one picture, in their order: it is encoded and read once for all.

        Args and errors as in `ask`.
        """
        return self._answers(self._about_one(image, questions, sampling, return_logprobs), return_logprobs)

    def ask_batch(
        self,
        pairs: Iterable[tuple[Any, str]],
        *,
        return_exceptions: bool = False,
        return_logprobs: bool = False,
        **sampling: Any,
    ) -> list[Any]:
        """The answers to (image, question) pairs, in their order. Pictures are read as their turn comes.

        Pairs about one picture cost least side by side.

        Args:
            return_exceptions: what goes wrong with a pair stands in its place as an exception, and the others are
                answered.

        Raises:
            ValueError: a pair cannot be answered; the message names its index.
        """
        batch = self._batch(list(pairs), sampling, return_logprobs, "pair")
        return self._answers(batch, return_logprobs, return_exceptions)

    def stream(self, image: Any, question: str, **sampling: Any) -> Iterator[str]:
        """The answer of `ask` in pieces as it is made; they join to it. Closing the iterator ends it."""
        return self._batch([(image, question)], sampling, False, None).texts()

    def stream_many(self, image: Any, questions: Sequence[str], **sampling: Any) -> Batch:
        """The answers of `ask_many` as they are made: iterate over (index of the question, piece).

        `.cancel(index)` gives up one question, `.close()` all.
        """
        return self._about_one(image, questions, sampling, False)

    def stream_batch(self, pairs: Iterable[tuple[Any, str]], **sampling: Any) -> Batch:
        """The answers of `ask_batch` as they are made: iterate over (index of the pair, piece). See `stream_many`."""
        return self._batch(list(pairs), sampling, False, "pair")

    def _batch(self, pairs: list[tuple[Any, str]], sampling: dict[str, Any], logprobs: bool, name: str | None) -> Batch:
        def asked(image: Any, question: str, settings: Sampling) -> Request:
            picture = image if isinstance(image, Picture) else self.engine.see(image)
            prompt = conversation_prompt([(question, None)])
            return self.engine.request(prompt, picture, settings, wants_logprobs=logprobs)

        each = Sampling.of_each(sampling, len(pairs))
        calls = (partial(asked, *pair, settings) for pair, settings in zip(pairs, each, strict=True))
        return Batch(self.engine, calls, name)

    def _about_one(self, image: Any, questions: Sequence[str], sampling: dict[str, Any], logprobs: bool) -> Batch:
        if isinstance(questions, str):
            raise TypeError("questions: expected several texts, got one; `ask` is for one question")
        picture = self.engine.see(image) if questions else None
        return self._batch([(picture, question) for question in questions], sampling, logprobs, "question")

    @staticmethod
    def _answers(batch: Batch, logprobs: bool, return_exceptions: bool = False) -> list[Any]:
        found = batch.answers(return_exceptions)
        return [one.text if isinstance(one, Answer) and not logprobs else one for one in found]

    def chat(self, image: Any = None) -> Conversation:
        """A conversation about one picture."""
        return Conversation(self.engine, image)
