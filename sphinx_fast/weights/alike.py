"""Whether model folders may be mixed: the same architecture, processor, keys, shapes and dtypes. No weight is read."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sphinx_fast.model.image_processor import SphinxImageProcessor
from sphinx_fast.weights.checkpoint import Checkpoint, PathLike
from sphinx_fast.weights.foreign import WeightsError, read_json

INDEX = "model.safetensors.index.json"
# What makes token ids and pixels out of text and pictures; with another tokenizer the same weight means something else.
SAME_BYTES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja")
SAME_FIELDS = (
    *("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# Where and by whom a folder was saved, not what is in it.
CIRCUMSTANCES = {
    *("transformers_version", "_name_or_path", "name_or_path", "use_cache"),
    *("is_local", "local_files_only", "model_specific_special_tokens"),
}


def settings_of(folder: Path) -> dict[str, Any]:
    """The fields of config.json, after checking that this is a folder of ours, not quantised."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder (mixing takes folders on this machine)")
    if any(folder.glob("consolidated.*.pth")):
        raise WeightsError(
            f"{folder}: a released checkpoint; convert it first: sphinx-fast convert {folder} NEW_FOLDER"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") != "sphinx":
        raise WeightsError(f"{folder}: model_type is {config.get('model_type')!r}, expected 'sphinx'")
    fields = _fields(config)
    if any("quantization_config" in name.split(".") for name in fields):
        raise WeightsError(f"{folder}: is quantised; mix before quantising")
    if not any((folder / name).is_file() for name in (INDEX, "model.safetensors")):
        raise WeightsError(f"{folder}: no model.safetensors and no {INDEX}")
    return fields


def _fields(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value}, without null fields, circumstances, and the parts' dtypes: loading fills in the whole's."""
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None or name in CIRCUMSTANCES or (name == "dtype" and prefix):
            continue
        if isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def check_fields(name: str, first: Path, ours: dict[str, Any], folder: Path, theirs: dict[str, Any]) -> None:
    """A file's fields in two folders are equal. Raises WeightsError naming the first that is not."""
    for field in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(field), theirs.get(field)
        if a != b:
            raise WeightsError(f"{folder / name}: {field} is {reprlib.repr(b)}, but {reprlib.repr(a)} in {first}")


def check_processor(first: Path, folder: Path) -> None:
    """The same tokenizer, chat template and image processor. Raises WeightsError naming the file."""
    for name in SAME_BYTES:
        a, b = ((one / name).read_bytes() if (one / name).is_file() else None for one in (first, folder))
        if a != b:
            raise WeightsError(f"{folder / name}: differs from {first / name}; models that read alike can be mixed")
    for name in SAME_FIELDS:
        check_fields(name, first, _processor_fields(first / name), folder, _processor_fields(folder / name))


def _processor_fields(file: Path) -> dict[str, Any]:
    """The fields with their defaults: one that is newer than the folder is absent there. Absent and false are one."""
    settings = read_json(file, missing_ok=True)
    if isinstance(settings.get("image_processor"), dict):
        try:
            settings["image_processor"] = SphinxImageProcessor(**settings["image_processor"]).to_dict()
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{file}: {error}") from error
    return {field: value for field, value in _fields(settings).items() if value is not False}


def check_tensors(first: Checkpoint, other: Checkpoint) -> None:
    """The same keys, shapes and dtypes. Raises WeightsError naming the first key that differs."""
    for key in sorted(first.keys() ^ other.keys()):
        absent, present = (other, first) if key in first else (first, other)
        raise WeightsError(f"{absent.path}: has no {key}, which {present.path} has")
    for key in first:
        for what, a, b in (
            ("shape", list(first[key].shape), list(other[key].shape)),
            ("dtype", first[key].dtype, other[key].dtype),
        ):
            if a != b:
                raise WeightsError(f"{other.file_of(key)}: {key} has {what} {b}, but {a} in {first.path}")


def is_quantised(key: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is a packed or scaled weight, which has no mean."""
    if dtype == torch.bool:
        return False
    return dtype.itemsize == 1 or (key.endswith("weight") and not dtype.is_floating_point)


def names_of(folders: Sequence[PathLike]) -> list[str]:
    """What folders are called in records: their last names, with as many before as tell them apart.

    Every result of training is called `model`: these are real/model and syn/model.
    """
    parts = [Path(folder).resolve().parts[1:] for folder in folders]
    depth = next(n for n in range(1, 2 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(part[-depth:]) for part in parts]
