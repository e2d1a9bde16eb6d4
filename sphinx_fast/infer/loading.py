"""A folder becomes a model: what it must be, and where and in which dtype its weights go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor

from sphinx_fast.model import attention
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.presets import PRESETS, preset
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.weights import memory
from sphinx_fast.weights import quantize as quantization
from sphinx_fast.weights.accessory import Import
from sphinx_fast.weights.quantize import Quantization
from sphinx_fast.weights.released import Weight

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
    if is_released(path):
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


def is_released(folder: str | Path) -> bool:
    """Whether a folder holds a released checkpoint."""
    return any(Path(folder).glob("consolidated.*.pth"))


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


SINGLE_VIEW = 0  # as a picture size: the global view alone


def with_picture_size(config: SphinxConfig, size: int | None) -> SphinxConfig:
    """The same weights over pictures of `size` pixels, `SINGLE_VIEW`, or as they are (None).

    Raises:
        ValueError: not a multiple of the view.
    """
    if size is not None:
        view = config.vision_config.view_size
        if size < 0 or size % view:
            raise ValueError(f"picture_size: expected a multiple of the view's {view}, got {size}")
        config.vision_config.picture_size = size or view
    return config


def parse_dtype(name: str) -> torch.dtype:
    """ "float32", "bf16", ... -> torch.dtype. Raises ValueError on another word."""
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
    dtype = getattr(torch, short.get(name, name), None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {name!r}")
    return dtype


class Loaded(NamedTuple):
    """A model, its processor, and what was quantised."""

    model: SphinxForConditionalGeneration
    processor: SphinxProcessor
    quantization: Quantization | None


def load(
    folder: str | Path | None,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    variant: str | None,
    quantize: str | None,
    picture_size: int | None = None,
    **kwargs: Any,
) -> Loaded:
    """What `Sphinx.from_pretrained` loads; its arguments and errors. `picture_size`: other views, by their square."""
    name = EMBEDDED_MODEL if folder is None else folder
    check_folder(name)
    config = with_picture_size(with_variant(SphinxConfig.from_pretrained(name), variant), picture_size)
    model, quantized = _model(name, config, None, device, dtype, quantize, **kwargs)
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, RuntimeError) as error:
        raise _one_line(name, error) from error
    processor.image_processor.picture_size = config.vision_config.picture_size
    return Loaded(model, processor, quantized)


def load_released(
    released: Import,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    quantize: str | None,
) -> Loaded:
    """A released checkpoint as a model, with no folder in between.

    Weights are read from the memory-mapped shards one by one, joined, and brought to the device, so the host holds a
    few of them at a time. Arguments and errors as of `load`.
    """
    model, quantized = _model(released.path, released.config, released.weights, device, dtype, quantize)
    return Loaded(model, released.processor, quantized)


def _model(
    name: str | Path,
    config: SphinxConfig,
    weights: Sequence[Weight] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    quantize: str | None,
    **kwargs: Any,
) -> tuple[SphinxForConditionalGeneration, Quantization | None]:
    """A model on its device, and what was quantised: `weights`, or where that is None those of the folder `name`."""
    target = torch.device(device) if device is not None else default_device()
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA GPU is available; `sphinx-fast doctor` says more")
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype = dtype or quantization.default_dtype(quantize, default_dtype(stored, target))
    planned = quantization.plan(config, quantize, target, dtype) if quantize is not None else None
    if planned is not None:
        kwargs["quantization_config"] = planned.library_config(dtype)
    spread = "device_map" in kwargs
    memory.announce(name, config, dtype, target, planned=planned, spread=spread, in_folder=weights is None)
    if not spread and target.type != "cpu":
        kwargs["device_map"] = target
    kwargs.setdefault("attn_implementation", {"text_config": attention.NAME})
    if weights is not None:
        kwargs["state_dict"] = {weight.name: weight for weight in weights}
    model: Any
    info: dict[str, Any]
    try:
        model, info = SphinxForConditionalGeneration.from_pretrained(  # type: ignore[misc]
            name if weights is None else None, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _one_line(name, error) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model, quantization.inspect(model, planned) if planned is not None else None


def _one_line(name: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{name}: {str(error).strip().splitlines()[0]}")
