"""`Sphinx`: a folder becomes something to ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor

from sphinx_fast.infer.chat import Conversation
from sphinx_fast.infer.engine import Engine
from sphinx_fast.infer.picture_cache import DEFAULT_BYTES, PictureCache
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
        picture_cache: PictureCache | int = DEFAULT_BYTES,
    ) -> None:
        self.engine = Engine(model, processor, picture_cache)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        picture_cache: PictureCache | int = DEFAULT_BYTES,
        **kwargs: Any,
    ) -> Sphinx:
        """Load a folder (or hub id) that `sphinx-fast convert` or training wrote.

        Args:
            folder: None loads the embedded sphinx-mini.
            device: where to compute; the GPU if there is one.
            dtype: of weights and arithmetic; as stored where the device computes that natively, else fp32.
            variant: see the picture through another preset's views, e.g. "sphinx-2k" for a SPHINX-1k.
            picture_cache: bytes of visual tokens to keep on the device for later questions about a picture (default
                1 GiB, 72 pictures of SPHINX-1k in bf16; 0: none), or a `PictureCache` that several models share.
            kwargs: for transformers' `from_pretrained`, e.g. `device_map="auto"`, or `attn_implementation="sdpa"` where
                the language model should not decode through our kernel.

        Raises:
            ValueError: the folder is missing, is a released one, or holds another model; an argument is out of range.
        """
        name = EMBEDDED_MODEL if folder is None else folder
        check_folder(name)
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
        return cls(model, processor, picture_cache=picture_cache)

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

    def ask(self, image: Any, question: str, **sampling: Any) -> str:
        """The answer to one question.

        Args:
            image: picture or None.
            question: free text, or a prompt of `sphinx_fast.tasks.prompts`.
            sampling: fields of `Sampling`: max_new_tokens, temperature (0: greedy), top_p, top_k, seed, stop.

        Raises:
            ValueError: the picture cannot be read, or the prompt leaves no room for an answer.
        """
        return "".join(self.stream(image, question, **sampling))

    def stream(self, image: Any, question: str, **sampling: Any) -> Iterator[str]:
        """The same answer in pieces as it is made: `"".join(sphinx.stream(...)) == sphinx.ask(...)`."""
        settings = Sampling(**sampling)
        visual_tokens = self.engine.encode(image)
        return self.engine.stream(conversation_prompt([(question, None)]), visual_tokens, settings)

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
