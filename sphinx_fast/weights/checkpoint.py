"""A checkpoint of anybody's making as one mapping: a weight file, or a folder of shards with its JSON settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sphinx_fast.weights.foreign import WeightsError, open_weights, read_json

PathLike = str | Path

# What a checkpoint folder may call its weights, best first. An index names the shards.
FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a file, or of all files of a folder, unread until asked for, and the folder's JSON settings.

    `last` is the key asked for last: what an error while renaming or checking is about.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = {}
        self.last = ""
        self._tensors: dict[str, tuple[Path, Mapping[str, Tensor], str]] = {}
        for file in self._files():
            tensors = open_weights(file)
            for key in tensors:
                self._tensors[key.removeprefix("module.")] = (file, tensors, key)  # saved from a wrapped model

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        for name in ("config.json", "open_clip_config.json"):
            if (self.path / name).is_file():
                self.config = read_json(self.path / name)
                break
        for name in FOLDER_FILES:
            file = self.path / name
            if not file.is_file():
                continue
            if not name.endswith(".index.json"):
                return [file]
            table = read_json(file).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise WeightsError(f"{file}: no weight_map")
            shards = sorted({str(shard) for shard in table.values()})
            for shard in shards:
                if Path(shard).name != shard:
                    raise WeightsError(f"{file}: {shard!r} is not a file name")
            return [self.path / shard for shard in shards]
        raise WeightsError(f"{self.path}: none of {', '.join(FOLDER_FILES)} is here")

    def __getitem__(self, key: str) -> Tensor:
        _, tensors, name = self._tensors[key]
        self.last = key
        return tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:  # without reading the tensor, as Mapping's own would
        return key in self._tensors

    def file_of(self, key: str) -> Path:
        """The file that holds a key."""
        return self._tensors[key][0] if key in self._tensors else self.path

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture, "" when the path is a bare state dict or another library's folder."""
        return str(self.config.get("model_type", ""))
