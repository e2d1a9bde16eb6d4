"""`Sphinx`: a folder becomes something to ask."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor

from sphinx_fast.infer.batch import Batch
from sphinx_fast.infer.chat import Conversation
from sphinx_fast.infer.engine import MAX_ROWS, Engine
from sphinx_fast.infer.picture_cache import PictureCache
from sphinx_fast.infer.request import Answer, Picture, Request
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.model import attention
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.conversation import conversation_prompt
from sphinx_fast.model.presets import PRESETS, preset
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "assets" / "sphinx-mini"


def check_folder(name: str | Path) -> None:
    """Refuse a local folder that is no SPHINX, with a line that says why. Hub ids pass."""
    path = Path(name)
    if not path.exists():
        if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
            return  # a hub id, named by the user
        raise ValueError(f"{name}: no such folder")
    if not path.is_dir():
        raise ValueError(f"{name}: expected a model folder, got a file")
    if any(path.glob("consolidated.*.pth")):
        raise ValueError(f"{name}: a released checkpoint; convert it first: sphinx-fast convert {name} NEW_FOLDER")
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"{name}: no config.json; this is not a model folder")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{config}: not a JSON object ({error})") from error
    if kind != SphinxConfig.model_type:
        raise ValueError(f"{name}: model_type is {kind!r}, expected {SphinxConfig.model_type!r}")


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """As stored where the device computes that natively, fp32 otherwise (half precision crawls on older CPUs)."""
    if device.type != "cpu" or stored == torch.float32:
        return stored
    native = stored == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_has_bf16()
    return stored if native else torch.float32


def _cpu_has_bf16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def with_variant(config: SphinxConfig, variant: str | None) -> SphinxConfig:
    """The same weights with another preset's views: sphinx, sphinx-1k and sphinx-2k differ in nothing else.

    Raises:
        ValueError: unknown preset, or one whose views this model's encoders cannot see.
    """
    if variant is None:
        return config
    if variant not in PRESETS:
        raise ValueError(f"variant: expected one of {', '.join(PRESETS)}, got {variant!r}")
    wanted, vision = preset(variant).vision_config, config.vision_config
    same = all(
        getattr(wanted, name) == getattr(vision, name)
        for name in ("view_size", "grid_size", "convnext_size", "dinov2_size")
    ) and (wanted.clip_config is None) == (vision.clip_config is None)
    if not same:
        raise ValueError(f"variant: this model's encoders cannot see the views of {variant}")
    vision.picture_size = wanted.picture_size
    return config


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

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        picture_cache: PictureCache | int | None = None,
        max_rows: int = MAX_ROWS,
        **kwargs: Any,
    ) -> Sphinx:
        """Load a folder (or hub id) that `sphinx-fast convert` or training wrote.

        Args:
            folder: None loads the embedded sphinx-mini.
            device: where to compute; the GPU if there is one.
            dtype: of weights and arithmetic; as stored where the device computes that natively, else fp32.
            variant: see the picture through another preset's views, e.g. "sphinx-2k" for a SPHINX-1k.
            picture_cache: bytes to keep on the device of pictures for later questions about them: visual tokens, and
                the language model's keys and values over them (default 1 GiB, or four pictures if that is more; 0:
                none), or a `PictureCache` that several models share.
            max_rows: questions that are answered at once; others wait.
            kwargs: for transformers' `from_pretrained`, e.g. `device_map="auto"`.

        Raises:
            ValueError: the folder is missing, is a released one, or holds another model; an argument is out of range.
        """
        name = EMBEDDED_MODEL if folder is None else folder
        check_folder(name)
        if picture_cache is not None:
            picture_cache = PictureCache.of(picture_cache)
        target = torch.device(device) if device is not None else default_device()
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: no CUDA GPU is available; `sphinx-fast doctor` says more")
        if isinstance(dtype, str):
            dtype = parse_dtype(dtype)
        config = with_variant(SphinxConfig.from_pretrained(name), variant)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        dtype = dtype or default_dtype(stored, target)
        model: Any
        info: dict[str, Any]
        if "device_map" not in kwargs and target.type != "cpu":
            kwargs["device_map"] = target
        kwargs.setdefault("attn_implementation", {"text_config": attention.NAME})
        try:
            model, info = SphinxForConditionalGeneration.from_pretrained(  # type: ignore[misc]
                name, config=config, dtype=dtype, output_loading_info=True, **kwargs
            )
            processor = AutoProcessor.from_pretrained(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{name}: {str(error).strip().splitlines()[0]}") from error
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name}: {len(missing)} weights are missing, the first is {missing[0]}")
        processor.image_processor.picture_size = config.vision_config.picture_size
        return cls(model, processor, picture_cache=picture_cache, max_rows=max_rows)

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


def parse_dtype(name: str) -> torch.dtype:
    """ "float32", "bf16", ... -> torch.dtype. Raises ValueError on another word."""
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
    dtype = getattr(torch, short.get(name, name), None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {name!r}")
    return dtype
