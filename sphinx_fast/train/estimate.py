"""What a run will need, before anything is loaded: parameters, memory of each process, steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.train.settings import LoraSettings, Settings
from sphinx_fast.weights.layout import on_disk_shapes
from sphinx_fast.weights.quantize import human_bytes, plan

_MASTER = 4  # bytes of a weight that learns, of its gradient, and of each of its two moments
_PER_TOKEN = 34  # activations a Llama block keeps, in widths of 16 bits (Korthikanti et al. 2022, attention recomputed)


@dataclass(frozen=True)
class Estimate:
    """Counts of parameters, and bytes on one process.

    learning, frozen   parameters by part of the model
    weights            fp32 of what learns and of what is frozen beside it; the encoders, and a language model under
                       adapters, in the computation's dtype or quantised
    gradients, moments fp32, of what learns
    activations        of one packed row
    """

    learning: dict[str, int]
    frozen: dict[str, int]
    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations

    def __str__(self) -> str:
        def listed(parts: dict[str, int]) -> str:
            return ", ".join(f"{name} {count:,}" for name, count in parts.items() if count) or "nothing"

        return (
            f"learns      {listed(self.learning)}\n"
            f"frozen      {listed(self.frozen)}\n"
            f"memory      {human_bytes(self.total)} a process: weights {human_bytes(self.weights)}, "
            f"gradients {human_bytes(self.gradients)}, moments {human_bytes(self.moments)}, "
            f"activations of a row about {human_bytes(self.activations)}"
        )


def estimate(config: SphinxConfig, settings: Settings, *, world: int, dtype: torch.dtype) -> Estimate:
    """Of `settings` on `world` processes that compute in `dtype`."""
    parts = {"encoders": 0, "fusion": 0, "language_model": 0}
    adapters = 0
    for name, shape in on_disk_shapes(config).items():
        count = math.prod(shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = {"vision_tower": "encoders", "fusion": "fusion"}.get(name.split(".")[1], "language_model")
        parts[part] += count
        if settings.lora is not None and part == "language_model":
            adapters += _adapter(name, shape, settings.lora)
    learning = {part: parts[part] if part in settings.train else 0 for part in parts}
    if settings.lora is not None and "language_model" in settings.train:
        learning["language_model"] = adapters
    frozen = {part: count if not learning[part] else 0 for part, count in parts.items()}
    if settings.lora is not None:
        frozen["language_model"] = parts["language_model"]
    over = world if settings.scale.shard and settings.lora is None else 1
    learned = sum(learning.values())
    size = {"encoders": dtype.itemsize, "fusion": _MASTER, "language_model": _MASTER}
    saved = 0
    if settings.lora is not None:
        size["language_model"] = dtype.itemsize
        if settings.quantize is not None:
            saved = plan(config, settings.quantize, settings.device or "cuda", dtype).saved_bytes(dtype)
    beside = sum(frozen[part] * size[part] for part in parts if part != "encoders") - saved
    return Estimate(
        learning=learning,
        frozen=frozen,
        weights=(learned * _MASTER + beside) // over + frozen["encoders"] * size["encoders"],
        gradients=learned * _MASTER // over,
        moments=2 * learned * _MASTER // over,
        activations=_activations(config, settings, dtype),
    )


def _adapter(name: str, shape: tuple[int, ...], lora: LoraSettings) -> int:
    """Weights of the adapter beside a matrix, 0 where there is none."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    adapted = len(shape) == 2 and module in lora.targets
    return lora.rank * sum(shape) if adapted else 0


def _activations(config: SphinxConfig, settings: Settings, dtype: torch.dtype) -> int:
    """Of one row of max_length through the language model: whole, or block borders and one block at a time."""
    text = config.text_config
    width = settings.max_length * text.hidden_size * dtype.itemsize
    block = _PER_TOKEN * width // 2
    if settings.scale.checkpoint:
        return text.num_hidden_layers * width + block
    return text.num_hidden_layers * block
