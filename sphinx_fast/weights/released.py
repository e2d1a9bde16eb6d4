"""A released SPHINX folder (LLaMA2-Accessory's format), opened: its settings, and its weights under our names.

Nothing is read but shapes; the tensors are memory-mapped and loaded when they are written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.weights.encoders import (
    clip_from_open_clip,
    convnext_from_timm,
    dinov2_from_hub,
    prefixed,
    qformer_from_blip2,
)
from sphinx_fast.weights.foreign import WeightsError, open_weights, read_json

VARIANTS: dict[str, dict[str, Any]] = {
    "llama_ens": {"picture_size": 224},
    "llama_ens5": {"picture_size": 448},
    "llama_ens10": {"picture_size": 672},
    "llama_ens_light": {"picture_size": 512, "view_size": 512, "convnext_size": 512},
    "llama_ens5_light": {"picture_size": 1024, "view_size": 512, "convnext_size": 512},
}
PREFIX = "llma."

# Where tensor parallelism split a weight of the language model; everything else is replicated in every shard.
SPLIT_DIM = {
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
    "output": 0,
    "tok_embeddings": 1,
}
LLAMA_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.language_model.embed_tokens",
    "norm": "model.language_model.norm",
    "output": "lm_head",
}
FUSION_NAMES = {
    "visual_proj.0": "patch_projection.linear",
    "visual_proj.1": "patch_projection.norm",
    "qformer_proj.0": "query_projection.linear",
    "qformer_proj.1": "query_projection.norm",
    "start_img": "view_start",
    "end_img": "view_end",
}
ENCODER_PREFIXES = ("clip.", "openclip_convnext_xxl.", "dinov2_vitg14.", "qformer.")


@dataclass
class Weight:
    """One weight of the new folder: where it comes from, its shape, and how to get it when it is written."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, source: str, tensor: Tensor) -> Weight:
        return cls(name, source, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def __getitem__(self, _: Any) -> Tensor:
        """`weight[...]` reads it into memory of its own: transformers loads whatever is read so, as slices of files."""
        return self.load().clone(memory_format=torch.contiguous_format)


@dataclass
class ReleasedFolder:
    """A released checkpoint folder, opened: its settings and its memory-mapped shards."""

    path: Path
    variant: str
    args: dict[str, Any]
    encoders: dict[str, Any]
    shards: list[tuple[Path, Mapping[str, Tensor]]]

    @classmethod
    def open(cls, folder: str | Path, variant: str | None = None) -> ReleasedFolder:
        """Find the shards and read the JSON files. Raises WeightsError naming what is missing or wrong."""
        path = Path(folder)
        if not path.is_dir():
            raise WeightsError(f"{path}: no such folder")
        files = _shard_files(path)
        variant = variant or read_json(path / "meta.json", missing_ok=True).get("llama_type")
        if variant is None:
            raise WeightsError(f"{path}: no meta.json with a llama_type; name the variant: {', '.join(VARIANTS)}")
        if variant not in VARIANTS:
            raise WeightsError(f"{path}: llama_type {variant!r} is not one of {', '.join(VARIANTS)}")
        shards: list[tuple[Path, Mapping[str, Tensor]]] = []
        for file in files:
            tensors = open_weights(file)
            shards.append((file, {key.removeprefix(PREFIX): tensors[key] for key in tensors}))
        released = cls(
            path,
            variant,
            read_json(path / "config.json", missing_ok=True),
            read_json(path / "encoders.json", missing_ok=True),
            shards,
        )
        released._check_shards()
        return released

    def _check_shards(self) -> None:
        first_file, first = self.shards[0]
        for file, tensors in self.shards[1:]:
            for key in first.keys() ^ tensors.keys():
                holder = file if key in tensors else first_file
                raise WeightsError(f"{holder}: {PREFIX}{key} is in this shard only")
            for key, tensor in tensors.items():
                if tensor.shape != first[key].shape or tensor.dtype != first[key].dtype:
                    raise WeightsError(
                        f"{file}: {PREFIX}{key} is {tensor.dtype} {list(tensor.shape)}, but {first[key].dtype} "
                        f"{list(first[key].shape)} in {first_file.name}"
                    )
        for key in ("tok_embeddings.weight", "output.weight", "visual_proj.0.weight"):
            if key not in first:
                raise WeightsError(f"{first_file}: {PREFIX}{key} is missing; is this a SPHINX checkpoint?")

    @property
    def first(self) -> Mapping[str, Tensor]:
        """The first shard: it holds all that is replicated."""
        return self.shards[0][1]

    def sphinx_config(self) -> SphinxConfig:
        """The configuration the released loader would build."""
        args = self.args
        dim, heads = int(args.get("dim", 5120)), int(args.get("n_heads", 40))
        hidden = int(2 * (4 * dim) / 3)
        if (multiplier := args.get("ffn_dim_multiplier")) is not None:
            hidden = int(multiplier * hidden)
        multiple = int(args.get("multiple_of", 256))
        text: dict[str, Any] = {
            "model_type": "llama",
            "vocab_size": self.first["tok_embeddings.weight"].shape[0],
            "hidden_size": dim,
            "intermediate_size": multiple * ((hidden + multiple - 1) // multiple),
            "num_hidden_layers": int(args.get("n_layers", 40)),
            "num_attention_heads": heads,
            "num_key_value_heads": int(args.get("n_kv_heads") or heads),
            "max_position_embeddings": max(4096, int(args.get("max_seq_len") or 0)),
            "rms_norm_eps": float(args.get("norm_eps", 1e-5)),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "dtype": str(self.first["tok_embeddings.weight"].dtype).removeprefix("torch."),
        }
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.get("rope_theta", 10000.0))}
        if (scaling := args.get("rope_scaling")) is not None:
            # The released factor multiplies positions; transformers' linear scaling divides them.
            rope |= {"rope_type": "linear", "factor": 1.0 / float(scaling)}
        text["rope_parameters"] = rope
        return SphinxConfig(vision_config=self._vision_fields(), text_config=text, dtype=text["dtype"])

    def _vision_fields(self) -> dict[str, Any]:
        """Widths of the encoders: encoders.json where the folder has one, the released widths otherwise."""
        fields: dict[str, Any] = dict(VARIANTS[self.variant])
        widths = self.encoders
        fields["convnext_config"] = widths.get("convnext", {})
        # The position table is baked to the view's grid when it is written.
        fields["dinov2_config"] = {**widths.get("dinov2", {}), "image_size": 224}
        if not self.variant.endswith("_light"):
            qformer = corrected_qformer(widths.get("qformer", {}))
            fields["clip_config"] = widths.get("clip", {})
            fields["qformer_vision_config"] = qformer.get("vision", {})
            fields["qformer_config"] = qformer.get("qformer", {})
            fields["num_query_tokens"] = qformer.get("num_query_tokens", 32)
        return fields

    def weights(self, config: SphinxConfig) -> Iterator[Weight]:
        """Every weight of the new folder, still unread."""
        yield from self._encoder_weights(config)
        for key in self.first:
            if key.startswith(ENCODER_PREFIXES):
                continue
            stem, _, kind = key.rpartition(".")
            if key in FUSION_NAMES:
                yield Weight.of(f"model.fusion.{FUSION_NAMES[key]}", key, self.first[key])
            elif stem in FUSION_NAMES:
                yield Weight.of(f"model.fusion.{FUSION_NAMES[stem]}.{kind}", key, self.first[key])
            elif key != "rope.freqs":
                yield self._llama_weight(key, config)

    def _encoder_weights(self, config: SphinxConfig) -> Iterator[Weight]:
        vision = config.vision_config
        sources: list[tuple[str, str, bool, Callable[[dict[str, Tensor]], Iterator[tuple[str, Tensor]]]]] = [
            ("clip.", "clip", vision.clip_config is not None, clip_from_open_clip),
            ("openclip_convnext_xxl.", "convnext", vision.convnext_config is not None, convnext_from_timm),
            (
                "dinov2_vitg14.",
                "dinov2",
                vision.dinov2_config is not None,
                lambda tensors: dinov2_from_hub(tensors, vision.grid_size),
            ),
            ("qformer.", "qformer", vision.qformer_config is not None, qformer_from_blip2),
        ]
        for prefix, name, used, rename in sources:
            tensors = prefixed(self.first, prefix)
            if not used:
                if tensors:
                    raise WeightsError(
                        f"{self.shards[0][0]}: {PREFIX}{prefix}{next(iter(tensors))} is not part of {self.variant}"
                    )
                continue
            try:
                for ours, tensor in rename(tensors):
                    yield Weight.of(f"model.vision_tower.{name}.{ours}", prefix + ours, tensor)
            except WeightsError as error:
                raise WeightsError(f"{self.shards[0][0]}: {error}") from error

    def _llama_weight(self, key: str, config: SphinxConfig) -> Weight:
        stem, _, kind = key.rpartition(".")
        short = re.sub(r"^layers\.\d+\.", "", stem)
        if kind != "weight" or short not in LLAMA_NAMES:
            raise WeightsError(f"{self.shards[0][0]}: unknown key {PREFIX}{key}")
        layer = stem.removesuffix(short)
        name = f"{f'model.language_model.{layer}' if layer else ''}{LLAMA_NAMES[short]}.weight"
        parts = [tensors[key] for _, tensors in self.shards]
        heads = {
            "attention.wq": config.text_config.num_attention_heads,
            "attention.wk": config.text_config.num_key_value_heads,
        }.get(short)
        if short not in SPLIT_DIM:
            return Weight.of(name, key, parts[0])
        dim = SPLIT_DIM[short]
        shape = list(parts[0].shape)
        if len(shape) <= dim:
            raise WeightsError(f"{self.shards[0][0]}: {PREFIX}{key} has shape {shape}, expected a matrix")
        shape[dim] *= len(parts)

        def load() -> Tensor:
            whole = torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]
            return rotate_half_layout(whole, heads) if heads else whole

        return Weight(name, key, tuple(shape), parts[0].dtype, load)


def corrected_qformer(qformer: dict[str, Any]) -> dict[str, Any]:
    """The reference tensors' encoders.json, whose Q-Former entry is wrong in one number.

    It says 2 heads for the 48-wide Q-Former, but the tensors beside it were computed with 4: relative error 7e-8
    with 4, 8e-4 with 2, in all three folders that have a Q-Former. The number of heads leaves no trace in the weights.
    """
    misprint = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    widths = qformer.get("qformer", {})
    if misprint.items() <= widths.items() and qformer.get("vision", {}).get("hidden_size") == 64:
        return {**qformer, "qformer": {**widths, "num_attention_heads": 4}}
    return qformer


def rotate_half_layout(weight: Tensor, heads: int) -> Tensor:
    """wq or wk [H * head_dim, D]: rows from RoPE's pairs (2i, 2i+1) to rotate-half's (i, i + head_dim/2)."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def _shard_files(path: Path) -> list[Path]:
    """The checkpoint's files in order, all of them."""
    named = sorted(path.glob("consolidated.*-of-*.model.pth"))
    if named:
        totals = {int(re.search(r"-of-(\d+)", file.name)[1]) for file in named}  # type: ignore[index]
        if len(totals) > 1:
            raise WeightsError(f"{path}: shards of different checkpoints: {', '.join(file.name for file in named)}")
        total = totals.pop()
        expected = [path / f"consolidated.{i:02d}-of-{total:02d}.model.pth" for i in range(total)]
        for file in expected:
            if not file.is_file():
                raise WeightsError(f"{file}: shard is missing")
        return expected
    plain = sorted(path.glob("consolidated.[0-9][0-9].pth"))
    for index, file in enumerate(plain):
        if file.name != f"consolidated.{index:02d}.pth":
            raise WeightsError(f"{path / f'consolidated.{index:02d}.pth'}: shard is missing")
    if not plain:
        raise WeightsError(f"{path}: no consolidated.*.pth; is this a released SPHINX folder?")
    return plain
