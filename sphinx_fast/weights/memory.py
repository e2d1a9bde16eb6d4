"""The memory a model needs, known before the first weight is read: from its configuration and its files' headers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.weights.checkpoint import Checkpoint
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.layout import on_disk_shapes
from sphinx_fast.weights.quantize import Plan, default_dtype, human_bytes, plan

logger = logging.getLogger("sphinx_fast")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes, by part.

    Args:
        vision, fusion, language: weights of the encoders, the projections, and the language model with its head.
        keys_values: of one picture's visual prefix, in every layer of the language model.
        visual_tokens: of one picture, as the picture cache keeps them.
        dtype: of weights and arithmetic.
        method: how the language model is quantised, None: not at all.
    """

    vision: int
    fusion: int
    language: int
    keys_values: int
    visual_tokens: int
    dtype: torch.dtype
    method: str | None = None

    @property
    def weights(self) -> int:
        """What loading the model takes."""
        return self.vision + self.fusion + self.language

    @property
    def picture(self) -> int:
        """What a conversation about one picture takes besides, before a word is said."""
        return self.keys_values + self.visual_tokens

    @property
    def total(self) -> int:
        """Weights and one picture. Activations and text come on top."""
        return self.weights + self.picture

    def __str__(self) -> str:
        """`41.2 GB of weights in bfloat16 (vision 6.9 GB, ...), 1.2 GB per picture`."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{human_bytes(self.weights)} of weights in {f'{self.method} and ' if self.method else ''}{dtype} "
            f"(vision {human_bytes(self.vision)}, fusion {human_bytes(self.fusion)}, "
            f"language model {human_bytes(self.language)}), {human_bytes(self.picture)} per picture"
        )


def memory_need(config: SphinxConfig, dtype: torch.dtype, *, planned: Plan | None = None) -> MemoryNeed:
    """What the architecture needs, weights in `dtype` but where `planned` quantises them."""
    weights = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in on_disk_shapes(config).items()}
    return _need(config, weights, dtype, planned)


def folder_need(
    folder: str | Path, config: SphinxConfig, dtype: torch.dtype, *, planned: Plan | None = None
) -> MemoryNeed | None:
    """What a model folder needs. None for a hub id, and for files that cannot be read (loading says why)."""
    if not Path(folder).is_dir():
        return None
    stored = getattr(config, "quantization_config", None) is not None
    weights = {}
    try:
        files = Checkpoint(folder)
        for name in files:
            tensor = files[name]  # mapped, not read
            cast = tensor.is_floating_point() and not stored
            weights[name] = tensor.numel() * (dtype if cast else tensor.dtype).itemsize
    except WeightsError:
        return None
    return _need(config, weights, dtype, planned)


def _need(config: SphinxConfig, weights: Mapping[str, int], dtype: torch.dtype, planned: Plan | None) -> MemoryNeed:
    parts = {"model.vision_tower.": 0, "model.fusion.": 0, "": 0}
    for name, size in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts[next(prefix for prefix in parts if name.startswith(prefix))] += size
    keys_values, visual_tokens = picture_need(config, dtype)
    return MemoryNeed(
        vision=parts["model.vision_tower."],
        fusion=parts["model.fusion."],
        language=parts[""] - (planned.saved_bytes(dtype) if planned else 0),
        keys_values=keys_values,
        visual_tokens=visual_tokens,
        dtype=dtype,
        method=planned.method if planned else None,
    )


def picture_need(config: SphinxConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one picture: keys and values over its visual tokens in every layer, and the visual tokens themselves."""
    text, positions = config.text_config, config.vision_config.tokens_per_picture
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys_values = text.num_hidden_layers * 2 * heads * head_dim
    return positions * keys_values * dtype.itemsize, positions * text.hidden_size * dtype.itemsize


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, all) bytes of a GPU, or of the machine for the CPU; None where that cannot be known."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        table = {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines)}
        return table["MemAvailable"], table["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None  # not a Linux


def announce(
    name: str | Path,
    config: SphinxConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    planned: Plan | None = None,
    spread: bool = False,
    in_folder: bool = True,
) -> MemoryNeed | None:
    """Say what a folder will need, before it is loaded: an INFO line of the logger `sphinx_fast`, a WARNING when it
    will hardly fit.

    Args:
        spread: a device map of the user's says where the weights go; nothing is compared then.
        in_folder: False: the weights come from elsewhere, so those that the configuration needs are counted.

    Raises:
        ValueError: the weights alone are more than the whole GPU. (A machine's own memory can be mapped and swapped:
            there it is a warning.)
    """
    if in_folder:
        need = folder_need(name, config, dtype, planned=planned)
    else:
        need = memory_need(config, dtype, planned=planned)
    if need is None:
        return None
    line = f"{Path(name).name}: {need}"
    memory = None if spread else device_memory(device)
    if memory is None:
        logger.info("%s%s", line, "; spread by device_map" if spread else "")
        return need
    free, total = memory
    logger.info("%s; %s free on %s", line, human_bytes(free), device)
    if device.type == "cuda" and need.weights > total:
        raise ValueError(f"{line}, but {device} has {human_bytes(total)} in all; {advice(need, config, device)}")
    if need.total > free:
        logger.warning("%s, but only %s free on %s; %s", line, human_bytes(free), device, advice(need, config, device))
    return need


def advice(need: MemoryNeed, config: SphinxConfig, device: torch.device) -> str:
    """What to do when a model does not fit: quantise (with what that would take), a smaller dtype, or spread it."""
    ways: list[str] = []
    if need.method is None and getattr(config, "quantization_config", None) is None:
        for method in ("int8", "int4"):
            dtype = default_dtype(method, need.dtype)
            try:
                saved = plan(config, method, device, dtype).saved_bytes(dtype)
            except ValueError:
                continue  # nothing of this language model fits the method
            smaller = need.weights * dtype.itemsize // need.dtype.itemsize - saved
            ways.append(f"--quantize {method} ({human_bytes(smaller)} of weights)")
    if need.dtype == torch.float32:
        ways.append("--dtype bfloat16 (half as much)")
    if device.type == "cuda":
        ways.append('device_map="auto" in Python (spread over GPUs and memory)')
    return f"try {', '.join(ways)}" if ways else "a smaller model is needed"
