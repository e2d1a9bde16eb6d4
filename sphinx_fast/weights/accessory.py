"""Released SPHINX folders -> weights under our names -> a folder transformers can load.

Everything is checked against the configuration before the first byte is read or written; tensors are memory-mapped and
written shard by shard, so memory stays at one output shard; the folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.weights.files import new_folder
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.layout import on_disk_shapes
from sphinx_fast.weights.released import PREFIX, ReleasedFolder, Weight

SHARD_BYTES = 2 << 30


class Import(NamedTuple):
    """A released checkpoint under our names: what it is, and its weights, checked and unread."""

    path: Path
    config: SphinxConfig
    processor: SphinxProcessor
    weights: list[Weight]


def open_released(
    folders: Sequence[str | Path],
    variant: str | None = None,
    *,
    args: dict[str, Any] | None = None,
    tokenizer_path: str | Path | None = None,
) -> Import:
    """Open released folders as one checkpoint. A weight is the last one's that holds it, the settings are the last's.

    So a whole checkpoint can be followed by one of what was trained since; each holds at least the language model.

    Args:
        folders: released folders (`consolidated.*.pth`, config.json, meta.json, tokenizer.model).
        variant: llama_type, in place of the one in meta.json.
        args: of the language model, in place of config.json.
        tokenizer_path: SentencePiece file, in place of tokenizer.model.

    Raises:
        WeightsError: with one line naming the file and key.
    """
    last = ReleasedFolder.open(folders[-1], variant)
    opened = [*(ReleasedFolder.open(folder, last.variant) for folder in folders[:-1]), last]
    last.encoders = next((one.encoders for one in reversed(opened) if one.encoders), {})
    last.args = last.args if args is None else args
    file = last.path / "tokenizer.model" if tokenizer_path is None else Path(tokenizer_path)
    if not file.is_file():
        raise WeightsError(f"{file}: {'expected a SentencePiece file' if file.is_dir() else 'no such file'}")
    try:
        config = last.sphinx_config()
        tokenizer = SphinxTokenizer.from_sentencepiece(file)
    except WeightsError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{last.path}: {error}") from error
    pieces = int(tokenizer.convert_tokens_to_ids("<image>"))  # type: ignore[arg-type]
    if pieces > config.text_config.vocab_size:
        raise WeightsError(f"{file}: {pieces} pieces, but the checkpoint embeds only {config.text_config.vocab_size}")
    config.image_token_id = pieces
    config.architectures = ["SphinxForConditionalGeneration"]
    return Import(last.path, config, SphinxProcessor.from_config(config, tokenizer), _checked(opened, config))


def _checked(folders: Sequence[ReleasedFolder], config: SphinxConfig) -> list[Weight]:
    """All weights, after comparing names and shapes with what the configuration needs."""
    expected = on_disk_shapes(config)
    weights: dict[str, Weight] = {}
    for released in folders:
        file = released.shards[0][0]
        for weight in released.weights(config):
            if weight.name not in expected:
                raise WeightsError(f"{file}: unknown key {PREFIX}{weight.source}")
            if weight.shape != expected[weight.name]:
                raise WeightsError(
                    f"{file}: {PREFIX}{weight.source} has shape {list(weight.shape)}, expected "
                    f"{list(expected[weight.name])} of {len(released.shards)} shard(s)"
                )
            weights[weight.name] = weight
    for name in expected:
        if name not in weights:
            raise WeightsError(f"{folders[-1].shards[0][0]}: nothing in this checkpoint gives {name}")
    return list(weights.values())


def convert(
    folder: str | Path,
    target: str | Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> SphinxConfig:
    """Write a released folder as safetensors, configuration and processor that transformers loads.

    Args:
        folder: released folder (`consolidated.*.pth`, config.json, meta.json, tokenizer.model).
        target: folder to create; it must not exist.
        variant: llama_type when meta.json does not name it.
        dtype: of the written floating-point weights; as stored by default.
        progress: show a bar of the bytes written.

    Raises:
        WeightsError: with one line naming the file and key; nothing is written then.
    """
    target = Path(target)
    if target.exists():
        raise WeightsError(f"{target}: exists already")
    _, config, processor, weights = open_released([folder], variant)
    if dtype is not None:
        config.dtype = config.text_config.dtype = dtype

    with new_folder(target) as partial:
        _write_weights(weights, partial, dtype, progress)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(partial)
    return config


def _write_weights(weights: list[Weight], folder: Path, dtype: torch.dtype | None, progress: bool) -> None:
    """Safetensors shards of at most SHARD_BYTES (or one weight) and their index."""

    def stored(weight: Weight) -> torch.dtype:
        return dtype if dtype is not None and weight.dtype.is_floating_point else weight.dtype

    def size(weight: Weight) -> int:
        return torch.Size(weight.shape).numel() * stored(weight).itemsize

    shards: list[list[Weight]] = [[]]
    for weight in weights:
        if shards[-1] and sum(map(size, shards[-1])) + size(weight) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(weight)
    index: dict[str, str] = {}
    total = sum(map(size, weights))
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar:
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for weight in shard:
                tensors[weight.name] = weight.load().to(stored(weight)).contiguous().clone()
                index[weight.name] = file
                bar.update(size(weight))
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        table = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
