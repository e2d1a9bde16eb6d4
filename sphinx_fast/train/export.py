"""The result of a run: a model folder like the one it started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sphinx_fast.infer.loading import load
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.train.settings import LoraSettings, Stage1
from sphinx_fast.weights.files import new_folder

if TYPE_CHECKING:
    from sphinx_fast.train.parts import Parts

HALVES = (torch.float16, torch.bfloat16)


def write(target: Path, parts: Parts) -> Path:
    """Weights in the start folder's dtype, its processor and settings; with LoRA merged, and the adapters beside.

    All processes call this; the first writes. An older result is replaced when the new one is complete. A quantised
    model is not written again: only its adapters and its fusion are, as `adapter/`.
    """
    settings = parts.settings
    state = {}
    for name, tensor in parts.model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all processes take part
        if parts.machine.first:
            state[name] = whole.detach().cpu()
    if not parts.machine.first:
        return target
    if settings.lora is not None:
        folder = target.with_name("adapter")
        _write_adapter(folder, state, settings.lora)
        if settings.quantize is not None:
            return folder
    config = SphinxConfig.from_pretrained(settings.model)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    _as_started(state, settings.model, dtype)
    if settings.lora is not None:
        state = _merged(state, parts.model.model.language_model)
    if config.tie_word_embeddings:  # gathered or rounded apart, the one weight would be saved twice
        state.pop("lm_head.weight", None)
    if settings.picture_size is not None and not isinstance(settings, Stage1):
        config.vision_config.picture_size = settings.picture_size
    part = target.with_name(f".{target.name}.new")
    for left in [part, *target.parent.glob(f".{part.name}.partial-*")]:  # by an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    with new_folder(part) as folder:
        trained = parts.model
        before, trained.config = trained.config, config
        try:
            trained.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        finally:
            trained.config = before
        config.dtype = dtype
        config.save_pretrained(folder)
        _processor(parts.processor, config).save_pretrained(folder)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def _processor(processor: Any, config: SphinxConfig) -> SphinxProcessor:
    """The run's processor, cutting what the model is asked with: not one view only, and not at random."""
    made: SphinxProcessor = SphinxProcessor.from_config(config, processor.tokenizer)
    made.chat_template = processor.chat_template
    return made


def _adapters(language_model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in language_model.named_modules() if isinstance(layer, BaseTunerLayer)]


def _as_started(state: dict[str, Tensor], start: str, dtype: torch.dtype) -> None:
    """What did not learn, as the start folder has it: the run held it in the dtype of its computation, which may round.

    What learned is in fp32 and stays as it is.
    """
    rounded = {name for name, tensor in state.items() if tensor.dtype in HALVES and tensor.dtype != dtype}
    if rounded:
        started = load(start, device="cpu", dtype=dtype, variant=None, quantize=None).model.state_dict()
        state.update({name: started[name.replace(".base_layer.", ".")] for name in rounded})


def _merged(state: dict[str, Tensor], language_model: nn.Module) -> dict[str, Tensor]:
    """The state without adapters, each added in fp32 to the weight it adapts."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if "lora_" not in name}
    for name, layer in _adapters(language_model):
        weight = f"model.language_model.{name}.weight"
        plain[weight] = plain[weight].float() + layer.get_delta_weight("default").detach().float().cpu()
    return plain


def _write_adapter(folder: Path, state: dict[str, Tensor], lora: LoraSettings) -> None:
    """The adapters as PEFT writes them for the language model, and the fusion that was trained with them."""
    shutil.rmtree(folder, ignore_errors=True)
    prefix = "model.language_model."
    adapters = {
        f"base_model.model.{name.removeprefix(prefix).replace('.default', '')}": tensor.contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix) and "lora_" in name
    }
    fusion = {name: tensor.contiguous() for name, tensor in state.items() if name.startswith("model.fusion.")}
    settings = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
    }
    with new_folder(folder) as partial:
        save_file(adapters, partial / "adapter_model.safetensors")
        save_file(fusion, partial / "fusion.safetensors")
        (partial / "adapter_config.json").write_text(json.dumps(settings, indent=1))
