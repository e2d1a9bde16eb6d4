"""Weight-only quantisation of the language model, by libraries that others maintain, while the weights are loaded.

`int8` and `int4` are torchao's, `nf4` is bitsandbytes'. transformers quantises layer by layer as it reads, so the model
is never whole in its own dtype. Touched are the linear layers of the language model and nothing else: the encoders and
the fusion see what every answer rests on and are the smaller part, the output head (1 % of 13B) stays as transformers
leaves it by default. Libraries skip in silence what does not suit them; `inspect` looks at the weights that are there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_accelerate_available, is_bitsandbytes_available, is_torchao_available

from sphinx_fast.model.config import SphinxConfig

logger = logging.getLogger("sphinx_fast")

METHODS = ("int8", "int4", "nf4")
GROUP = 128  # inputs that share a scale and a zero in int4: torchao's default, 4.25 bits a weight
BLOCK = 64  # weights that share a scale in nf4: bitsandbytes' default, 4.5 bits a weight
LANGUAGE = "model.language_model."
HEAD = "lm_head"
KEPT_HEAD, TIED = "the output head stays", "tied to the input embedding"
_INSTALL = 'pip install "sphinx-fast[quantize]"'


@dataclass(frozen=True)
class Plan:
    """What a method will do to a language model, before any weight is read.

    Args:
        method: one of `METHODS`.
        device: "cpu" or "cuda": int4 is packed differently there.
        fits: {name of a linear layer: (outputs, inputs)} that will be quantised.
        misfits: {name of a linear layer: why it cannot be}.
    """

    method: str
    device: str
    fits: dict[str, tuple[int, int]]
    misfits: dict[str, str]

    def saved_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that the model will need less than it does in `dtype`."""
        return sum(
            outputs * inputs * dtype.itemsize - packed_bytes(self.method, self.device, outputs, inputs, dtype)
            for outputs, inputs in self.fits.values()
        )

    def library_config(self, dtype: torch.dtype) -> TorchAoConfig | BitsAndBytesConfig:
        """For transformers' `from_pretrained(quantization_config=)`. Raises ValueError: the library is missing."""
        require(self.method)
        kept = ["model.vision_tower", "model.fusion", HEAD, *self.misfits]
        if self.method == "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=kept,
            )
        return TorchAoConfig(torchao_config(self.method, self.device), modules_to_not_convert=kept)


@dataclass(frozen=True)
class Quantization:
    """What was done, as found in the loaded model.

    Args:
        method: one of `METHODS`.
        changed: names of the quantised layers.
        kept: {name of a layer of the language model left as it was: why}.
        bytes_before: of the weights of all these layers, in the dtype they are computed in.
        bytes_after: what they take now, scales and padding included.
    """

    method: str
    changed: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        """One line: `int4: 24 layers of the language model, 3.1 MB -> 0.9 MB; 5 left as they were: ...`."""
        line = (
            f"{self.method}: {len(self.changed)} linear layers of the language model quantised "
            f"({human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)})"
        )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        parts = [
            f"{names[0]}{f' and {len(names) - 1} like it' if names[1:] else ''} ({reason})"
            for reason, names in reasons.items()
        ]
        return f"{line}; {len(self.kept)} left as they were: {', '.join(parts)}" if parts else line


def check(method: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError: unknown method, or not for this device or dtype."""
    if method not in METHODS:
        raise ValueError(f"quantize: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "nf4" and device.type != "cuda":
        raise ValueError(f"quantize: nf4 is for CUDA GPUs, the device is {device.type}; int8 and int4 run there")
    if method == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError(f"quantize: int4 computes in bfloat16 on a GPU, not in {str(dtype).removeprefix('torch.')}")
    if method == "int4" and dtype != torch.bfloat16:
        logger.warning("quantize: int4 on a CPU is made for bfloat16; any other dtype is many times slower")


def require(method: str) -> None:
    """Raises ValueError with what to install when the method's libraries are not there."""
    if method == "nf4":
        libraries = {"bitsandbytes": is_bitsandbytes_available(), "accelerate": is_accelerate_available()}
    else:
        libraries = {"torchao": is_torchao_available()}
    for library, found in libraries.items():
        if not found:
            raise ValueError(f"quantize: {method} needs {library}, which is missing or too old: {_INSTALL}")


def default_dtype(method: str | None, otherwise: torch.dtype) -> torch.dtype:
    """The dtype to compute in when the user names none: int4's kernels are made for bfloat16."""
    return torch.bfloat16 if method == "int4" else otherwise


def plan(config: SphinxConfig, method: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """Which linear layers of the language model fit the method; no weight is allocated.

    Raises:
        ValueError: unknown method, or not for this device or dtype; the weights are quantised already; no layer fits.
    """
    check(method, torch.device(device), dtype)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("quantize: the weights in this folder are quantised already")
    where = torch.device(device).type
    fits: dict[str, tuple[int, int]] = {}
    misfits: dict[str, str] = {}
    with torch.device("meta"):
        language_model = AutoModel.from_config(config.text_config)
    for name, module in language_model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if reason := misfit(method, where, module.out_features, module.in_features):
            misfits[LANGUAGE + name] = reason
        else:
            fits[LANGUAGE + name] = (module.out_features, module.in_features)
    if not fits:
        first = next((f": {name}: {reason}" for name, reason in misfits.items()), " (it has none)")
        raise ValueError(f"quantize: no linear layer of this language model fits {method}{first}")
    return Plan(method, where, fits, misfits)


def misfit(method: str, device: str, outputs: int, inputs: int) -> str | None:
    """Why a layer of this shape cannot be quantised; None when it can."""
    if method == "int4" and inputs % GROUP:
        return f"width {inputs} is no multiple of the group of {GROUP}"
    if method == "int4" and device == "cpu" and outputs % 16:
        return f"{outputs} outputs are no multiple of 16"
    return None


def packed_bytes(method: str, device: str, outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Bytes of one quantised weight [outputs, inputs] with its scales, zeros and padding."""
    if method == "int8":  # a scale (fp32) and a zero (int8) per output
        return outputs * inputs + outputs * 5
    if method == "nf4":  # an fp32 scale per block, and the 16 values
        return -(-outputs * inputs // 2) + -(-outputs * inputs // BLOCK) * 4 + 64
    if device != "cpu":  # the GPU's tiles: inputs padded to 1,024, outputs to 8
        outputs, inputs = -(-outputs // 8) * 8, -(-inputs // 1024) * 1024
    return outputs * inputs // 2 + outputs * (inputs // GROUP) * 2 * dtype.itemsize


def torchao_config(method: str, device: str) -> Any:
    """torchao's own description. `set_inductor_config` would change torch.compile's settings for the whole process."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if method == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device != "cpu":  # torch's own tinygemm kernel; the default layout needs one more library
        return Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError as error:
        raise ValueError(f"quantize: this torchao has no int4 for the CPU, torchao 0.18 has ({error})") from error
    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def inspect(model: nn.Module, planned: Plan) -> Quantization:
    """Look at the weights of a loaded model: which are quantised, which are not and why. Logged, as a WARNING when a
    layer that the method is meant for was left out."""
    changed, kept = [], {}
    before = after = 0
    for name, module, weight in _matrices(model):
        if is_quantized(weight):
            changed.append(name)
        elif name == HEAD:
            tied = weight is model.get_input_embeddings().weight  # type: ignore[operator]
            kept[name] = TIED if tied else KEPT_HEAD
        elif not name.startswith(LANGUAGE):
            continue
        elif type(module) is not nn.Linear:
            kept[name] = "not a linear layer"
        else:
            kept[name] = planned.misfits.get(name, "the library left it out")
        before += _plain_bytes(weight)
        after += stored_bytes(weight)
    found = Quantization(planned.method, tuple(changed), kept, before, after)
    logger.log(logging.WARNING if set(kept.values()) - {KEPT_HEAD, TIED} else logging.INFO, "%s", found)
    return found


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, weight) of everything that multiplies; several matrices of one module share its name.

    Embeddings look up and do not multiply.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if is_quantized(weight) or weight.dim() > 1:
                yield name if own == "weight" else f"{name}.{own}", module, weight


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is torchao's (a tensor of tensors) or bitsandbytes' (bytes and their state)."""
    return hasattr(weight, "__tensor_flatten__") or getattr(weight, "quant_state", None) is not None


def stored_bytes(weight: Tensor) -> int:
    """Bytes a weight really takes: torchao's `nbytes` says what it would take unquantised."""
    if hasattr(weight, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    state = getattr(weight, "quant_state", None)
    extra = [] if state is None else [state.absmax, state.code, state.offset]
    extra += [state.state2.absmax, state.state2.code] if state is not None and state.nested else []
    return weight.nbytes + sum(tensor.nbytes for tensor in extra if isinstance(tensor, Tensor))


def _plain_bytes(weight: Tensor) -> int:
    """Bytes the weight would take unquantised, in the dtype it computes in."""
    state = getattr(weight, "quant_state", None)
    return weight.nbytes if state is None else torch.Size(state.shape).numel() * state.dtype.itemsize


def human_bytes(count: float) -> str:
    """ "41.2 GB", "5.6 MB": decimal units, as the makers of memory and of models count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.0995 * size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
