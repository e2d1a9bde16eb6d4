"""Weight mixing (SPHINX, eq. 1): model folders whose language models differ -> one folder with their weighted mean.

    theta = sum_i w_i theta_i,  w_i in [0, 1],  sum_i w_i = 1        (two folders: beta and 1 - beta)

Folders are compared before anything is written. Tensors are mapped, mixed block by block and streamed into files of the
first folder's layout, so memory stays at a few blocks whatever the model's size.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sphinx_fast.weights.alike import (
    INDEX,
    SAME_BYTES,
    SAME_FIELDS,
    check_fields,
    check_processor,
    check_tensors,
    is_quantised,
    names_of,
    settings_of,
)
from sphinx_fast.weights.checkpoint import Checkpoint, PathLike
from sphinx_fast.weights.files import new_folder
from sphinx_fast.weights.foreign import WeightsError, read_json

Parts = Literal["llm", "trained"]
PARTS: dict[str, tuple[str, ...]] = {
    "llm": ("model.language_model.", "lm_head."),
    "trained": ("model.language_model.", "lm_head.", "model.fusion."),
}
BLOCK = 1 << 20  # elements mixed at a time: the few copies in flight stay in the cache


class Shard(NamedTuple):
    """A safetensors file: its header with the length before it, as bytes, and its keys in the order of their data."""

    header: bytes
    keys: list[str]


class Sources:
    """Model folders of one architecture, one processor and one frozen part; compared on opening, read when asked.

    Args:
        folders: two or more, as `save_pretrained` writes them, sharded as they like.
        parts: "llm" mixes the language model and its head; "trained" the fusion (projections, view tags) as well.

    Raises:
        WeightsError: a folder that is none, or one that does not match the first: one line with file and key.
        ValueError: fewer than two folders, or unknown parts.
    """

    def __init__(self, folders: Sequence[PathLike], parts: Parts = "llm") -> None:
        if parts not in PARTS:
            raise ValueError(f"parts: expected one of {', '.join(PARTS)}, got {parts!r}")
        if len(folders) < 2:
            raise ValueError(f"expected at least two folders to mix, got {len(folders)}")
        self.parts = parts
        self.folders = [Path(folder) for folder in folders]
        settings = [settings_of(folder) for folder in self.folders]
        for folder, fields in zip(self.folders[1:], settings[1:], strict=True):
            check_fields("config.json", self.folders[0], settings[0], folder, fields)
            check_processor(self.folders[0], folder)
        self.tensors = [Checkpoint(folder) for folder in self.folders]
        self.shards, *_ = [_shards(tensors) for tensors in self.tensors]
        for tensors in self.tensors[1:]:
            check_tensors(self.tensors[0], tensors)
        self.mixed: set[str] = set()
        self.frozen: list[str] = []
        for key, tensor in self.tensors[0].items():
            wanted = key.startswith(PARTS[parts])
            if wanted and is_quantised(key, tensor.dtype):
                raise WeightsError(f"{self.tensors[0].file_of(key)}: {key} is quantised; mix before quantising")
            if wanted and tensor.is_floating_point():
                self.mixed.add(key)
            else:
                self.frozen.append(key)
        if not self.mixed:
            raise WeightsError(f"{self.folders[0]}: no weights of a language model")

    def nbytes(self, keys: Iterable[str]) -> int:
        """What these tensors take in one folder."""
        return sum(self.tensors[0][key].nbytes for key in keys)

    def check_frozen(self, bar: tqdm[Any] | None = None) -> None:
        """All that is not mixed, integers included, is bit for bit the same in all folders.

        Raises:
            WeightsError: naming the first tensor that differs.
        """
        first, *others = self.tensors
        for key in self.frozen:
            for other in others:
                for a, b in zip(_blocks(first[key]), _blocks(other[key]), strict=True):
                    if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                        raise WeightsError(
                            f"{other.file_of(key)}: {key} differs from {first.path}, but parts={self.parts!r} "
                            "does not mix it"
                        )
            if bar is not None:
                bar.update(first[key].nbytes)

    def blocks(self, key: str, weights: Sequence[float]) -> Iterator[Tensor]:
        """A tensor of the mixture, flat, block by block, in its stored dtype; the first folder's where it is not mixed.

        With k the heaviest source, theta = theta_k + sum_i w_i (theta_i - theta_k), in fp32 (fp64 for fp64), rounded
        once: what all sources agree on stays as it is. A source of weight zero is not read; a single one is copied.

        Raises:
            WeightsError: a value that is not finite.
        """
        active = [(weight, tensors) for weight, tensors in zip(weights, self.tensors, strict=True) if weight]
        if key not in self.mixed:
            active = [(1.0, self.tensors[0])]
        active.sort(key=lambda source: -source[0])
        dtype = active[0][1][key].dtype
        work = torch.float64 if dtype == torch.float64 else torch.float32
        for values in zip(*(_blocks(tensors[key]) for _, tensors in active), strict=True):
            if len(values) == 1:
                yield values[0]
                continue
            heaviest = values[0].to(work)
            total = heaviest.clone()
            for (weight, _), value in zip(active[1:], values[1:], strict=True):
                total.add_(value.to(work) - heaviest, alpha=weight)
            mixed = total.to(dtype)
            if not mixed.isfinite().all():
                for (_, tensors), value in zip(active, values, strict=True):
                    if not value.isfinite().all():
                        raise WeightsError(f"{tensors.file_of(key)}: {key} holds values that are not finite")
                raise WeightsError(f"{key}: the mixture overflows {str(dtype).removeprefix('torch.')}")
            yield mixed


def check_weights(weights: Sequence[float], folders: int) -> list[float]:
    """Weights of `folders` folders, divided by their sum.

    Raises:
        ValueError: not one per folder, not in [0, 1], or not summing to one within 1e-6.
    """
    if len(weights) != folders:
        raise ValueError(f"weights: expected one for each of the {folders} folders, got {len(weights)}")
    for weight in weights:
        if not 0 <= weight <= 1:  # nan is not either
            raise ValueError(f"weights: expected numbers from 0 to 1, got {weight:g}")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"weights: expected a sum of 1, got {total:g}")
    return [float(weight) / total for weight in weights]


def mix(
    sources: Sequence[PathLike],
    weights: Sequence[float],
    target: PathLike,
    *,
    parts: Parts = "llm",
    progress: bool = False,
) -> None:
    """Write the folder sum_i weights[i] * sources[i]: keys, dtypes, shards and processor of the first source.

    `mixing.json` in it names parts, folders and weights.

    Args:
        sources: two or more model folders, equal but for the mixed parts.
        weights: one for each, from 0 to 1, together 1.
        target: folder to create; it must not exist.
        parts: "llm" (the paper's equation) or "trained" (the fusion too); the vision tower is never mixed.
        progress: show a bar of the bytes compared and written.

    Raises:
        WeightsError: sources that do not match or cannot be read.
        ValueError: bad weights or parts.
        FileExistsError: `target` is there already. Nothing is written in any of these cases.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target}: exists already")
    weights = check_weights(weights, len(sources))
    opened = Sources(sources, parts)
    size = opened.nbytes(opened.frozen) + opened.nbytes(opened.tensors[0])
    with tqdm(total=size, unit="B", unit_scale=True, desc="mix", disable=not progress) as bar:
        opened.check_frozen(bar)
        with new_folder(target) as partial:
            for name, shard in opened.shards.items():
                with (partial / name).open("wb") as file:
                    # Keys, dtypes and shapes stay, so does the header; the data follow it in its order, without gaps.
                    file.write(shard.header)
                    for key in shard.keys:
                        for block in opened.blocks(key, weights):
                            file.write(block.view(torch.uint8).numpy().data)
                            bar.update(block.nbytes)
            for name in (INDEX, "config.json", "generation_config.json", *SAME_BYTES, *SAME_FIELDS):
                if (opened.folders[0] / name).is_file():
                    shutil.copyfile(opened.folders[0] / name, partial / name)
            named = zip(names_of(opened.folders), weights, strict=True)
            record = [{"folder": name, "weight": weight} for name, weight in named]
            text = json.dumps({"parts": parts, "sources": record}, indent=2)
            (partial / "mixing.json").write_text(text + "\n", encoding="utf-8")


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Flat views of at most BLOCK elements."""
    return tensor.reshape(-1).split(BLOCK) if tensor.numel() else ()


def _shards(tensors: Checkpoint) -> dict[str, Shard]:
    """{file name: shard} of a folder, after checking that every weight is where its index says, once."""
    shards: dict[str, Shard] = {}
    for file in sorted({tensors.file_of(key) for key in tensors}):
        with file.open("rb") as opened:
            length = opened.read(8)
            header = opened.read(int.from_bytes(length, "little"))
        offsets = {key: entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"}
        shards[file.name] = Shard(length + header, sorted(offsets, key=lambda key: offsets[key]))
    where = sorted((key, name) for name, shard in shards.items() for key in shard.keys)
    index = tensors.path / INDEX
    listed = read_json(index)["weight_map"] if index.is_file() else {key: tensors.file_of(key).name for key in tensors}
    if where != sorted(listed.items()):
        raise WeightsError(f"{tensors.path}: the files hold other weights than their index says")
    return shards
