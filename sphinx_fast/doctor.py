"""`sphinx-fast doctor`: what is installed, what is compiled, which kernels run, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

OPTIONAL = {
    "peft": "LoRA fine-tuning",
    "accelerate": "device_map and multi-GPU training",
    "flash_attn": "flash attention on NVIDIA GPUs",
    "torchao": "int8 and int4 quantisation",
    "bitsandbytes": "NF4 quantisation",
    "torchvision": "the torchvision image backend of other models",
}


def report() -> str:
    """A few lines of text; never raises because something is missing."""
    lines = [f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in ("sphinx-fast", "torch", "transformers", "tokenizers", "safetensors", "pillow", "numpy"):
        lines.append(f"{name:<13} {_version(name)}")
    lines += _extension_lines()
    lines += _device_lines()
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    if missing:
        lines.append("not installed " + ", ".join(missing))
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _extension_lines() -> list[str]:
    from sphinx_fast.ops import build_info, extension

    info = build_info()
    if not info["compiled"]:
        return [f"extension     not usable: {info['why_not']}", f"  to do       {info['hint']}"]
    lines = [f"extension     {info['path']}, {info['compiler']}"]
    loops = extension().isas()[-1]  # the instruction set found
    if info["cuda"] is not None:
        cuda = f"{info['cuda_archs']}, nvcc {info['cuda']}"
        return [*lines, f"kernels       attention, fusion, views on CPU ({loops}) and CUDA ({cuda})"]
    lines.append(f"kernels       attention, fusion, views on CPU ({loops}); {info['why_not']}")
    if torch.cuda.is_available():
        lines.append(f"  to do       {info['hint']}")
    return lines


def _device_lines() -> list[str]:
    if not torch.cuda.is_available():
        reason = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no GPU"
        return [f"gpu           none ({reason}): everything runs on {torch.get_num_threads()} CPU threads"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"gpu {index}         {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
    return lines
