"""The only door for foreign weight files (.pth, .pt, .bin, .safetensors): tensors come out, nothing else runs.

Tensors are memory-mapped, so opening a 20 GB shard costs no memory; a tensor is read when it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class WeightsError(ValueError):
    """A weight file or folder that cannot be used; the message is one line naming the file and the key."""


class LazySafetensors(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when asked for it."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._keys = list(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def __iter__(self) -> Any:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def open_weights(path: str | Path) -> Mapping[str, Tensor]:
    """A weight file as {key: tensor}, mapped, not read. One level of {"model"|"state_dict": ...} is unwrapped.

    Raises:
        WeightsError: missing, damaged, or holding anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return LazySafetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{path}: damaged or not a weight file ({_first_line(error)})") from error
    except Exception as error:  # torch reports refused objects with its unpickler's own error class
        raise WeightsError(f"{path}: refused, it holds more than tensors ({_first_line(error)})") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a table of tensors, got {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {key} is {type(value).__name__}, not a tensor")
    return content


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in a file; {} for a missing one where that is fine. Raises WeightsError naming the file."""
    if missing_ok and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return content


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
