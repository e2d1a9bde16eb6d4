"""A training step of both stages beside transformers' own way, and the loss beside torch's.

    python bench/bench_train.py [--device cuda] [--save]
    pytest bench/bench_train.py --benchmark-only

A step is forward, backward and AdamW of everything that learns, on pieces whose lengths are drawn once; pictures are
given as pixels. Encoders have no size on a CPU (a view costs next to nothing) and their released sizes on a GPU.
    padded      the same conversations as one padded batch through SphinxForConditionalGeneration with labels: what a
                Trainer does; all logits
    plain Llama a Llama of the same size on as many tokens of text in one row, all logits: no pictures, no parts of ours
`pieces/s` is what a user waits for. The percentage is of the rate at which this machine multiplies matrices, or on a
GPU of the 989 TFLOP/s an H200 is sold with (MFU). Operations are those of train/flops.py: no padding, no logits that
teach nothing, so a peer that computes more is slower, not busier.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from common import Line, arguments, median_seconds, save
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sphinx_fast import SphinxConfig, SphinxForConditionalGeneration
from sphinx_fast.model.presets import preset
from sphinx_fast.train.flops import Flops, peak
from sphinx_fast.train.learner import Learner, choose_parts, decay_groups, see
from sphinx_fast.train.loss import head_cross_entropy
from sphinx_fast.train.packing import Row, make_row, pack
from sphinx_fast.train.pieces import IGNORED, Piece

ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 224, "patch_size": 14}  # fmt: skip
SMALL_VISION = {"view_size": 224, "grid_size": 16, "num_query_tokens": 32, "convnext_size": 256, "dinov2_size": 224,
                "clip_config": ENCODER, "dinov2_config": ENCODER, "qformer_vision_config": ENCODER,
                "convnext_config": {"depths": (1, 1, 1, 1), "hidden_sizes": (4, 8, 12, 16)},
                "qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                   "intermediate_size": 32, "encoder_hidden_size": 16}}  # fmt: skip
LLAMA = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "cuda": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
}  # fmt: skip
# stage: (views, pieces with a picture, text pieces, their length, positions of a row); stage 1 in the paper's shares
SHAPES = {
    "cpu": {"stage1": (1, 6, 1, 614, 1024), "stage2": (5, 1, 2, 200, 2048)},
    "cuda": {"stage1": (1, 160, 8, 2048, 16384), "stage2": (5, 32, 32, 400, 16384)},
}
VOCABULARY = 32000
Call = Callable[[], object]


def build(device: str, views: int) -> SphinxForConditionalGeneration:
    """Seeded, what learns in fp32 on a CPU and bf16 on a GPU (a single one needs no sharding for the measurement)."""
    torch.manual_seed(0)
    vision = SMALL_VISION if device == "cpu" else preset("sphinx-1k").vision_config.to_dict()
    vision = {**vision, "picture_size": vision["view_size"] * (1 if views == 1 else 2)}
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 4096, **LLAMA[device]}
    config = SphinxConfig(vision_config=vision, text_config=text, image_token_id=VOCABULARY)
    model: Any = SphinxForConditionalGeneration(config)
    choose_parts(model, ("language_model", "fusion"), None)
    return model.to(device, torch.bfloat16) if device == "cuda" else model.to(device)


def pieces_of(model: Any, stage: str, shape: tuple[int, int, int, int, int]) -> list[Piece]:
    """Pieces of random tokens: captions behind one view, or conversations behind five whose answers are a third."""
    _, pictures, texts, length, _ = shape
    rng, visual = Random(0), model.config.vision_config.tokens_per_picture
    pieces = []
    for number in range(pictures + texts):
        text = length if number >= pictures else rng.randint(20, 40) if stage == "stage1" else rng.randint(60, 400)
        head = [1] + [VOCABULARY] * (visual if number < pictures else 0)
        ids = np.array(head + [rng.randrange(3, VOCABULARY) for _ in range(text)])
        targets = np.full(len(ids), IGNORED)
        taught = np.arange(len(ids) - (text if stage == "stage1" else text // 3), len(ids))
        targets[taught - 1] = ids[taught]
        weights = (targets != IGNORED).astype(np.float32)
        pieces.append(Piece(ids, targets, weights, (len(ids),), Path("p") if number < pictures else None))
    return pieces


def pixels_of(model: Any, pieces: list[Piece]) -> Tensor:
    """Views of the pictures, in the order of their pieces: those with a picture come first."""
    vision, pictures = model.config.vision_config, sum(piece.picture is not None for piece in pieces)
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(pictures * vision.num_views, 3, vision.view_size, vision.view_size, generator=drawn)


def rows_of(model: Any, pieces: list[Piece], pixels: Tensor, length: int) -> list[Row]:
    """Packed, each row with the views of its own pictures."""
    views, rows = pixels.split(model.config.vision_config.num_views), []
    for row in pack([len(piece) for piece in pieces], length):
        seen = [views[k] for k in row if pieces[k].picture is not None]
        rows.append(make_row([pieces[k] for k in row], torch.cat(seen) if seen else None).to(model.device))
    return rows


def optimizer_of(parameters: list[tuple[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(parameters, 0.1), lr=1e-5, betas=(0.9, 0.95), fused=True)


def ours(model: Any, rows: list[Row]) -> Call:
    """A step as `Training.update` does it, from rows that are there."""
    learner = Learner(model)
    optimizer = optimizer_of([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    taught = sum(int((row.targets != IGNORED).sum()) for row in rows)

    def step() -> float:
        total = 0.0
        for row in rows:
            asked = int((row.targets != IGNORED).sum())
            loss, *_ = learner(row, see(model, row.pixel_values), torch.full((asked,), 1 / taught, device=model.device))
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def padded(model: Any, pieces: list[Piece], pixels: Tensor) -> Call:
    """The same conversations as a batch, right-padded, through the model's own forward."""
    longest = max(len(piece) for piece in pieces)
    ids = torch.zeros(len(pieces), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for k, piece in enumerate(pieces):
        n = len(piece)
        ids[k, :n], mask[k, :n] = torch.from_numpy(piece.ids), 1
        labels[k, 1:n] = torch.from_numpy(piece.targets[:-1])
    optimizer = optimizer_of([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    seen = pixels.to(model.device, model.dtype)
    inputs = {
        name: t.to(model.device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }

    def step() -> float:
        loss = model(**inputs, pixel_values=seen).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def plain_llama(model: Any, rows: list[Row]) -> Call:
    """As many tokens of text in as many rows, every one taught."""
    config = LlamaConfig(**{k: v for k, v in model.config.text_config.to_dict().items() if k != "model_type"})
    llama: Any = LlamaForCausalLM(config).to(model.device, next(model.lm_head.parameters()).dtype)
    optimizer = optimizer_of(list(llama.named_parameters()))
    ids = [torch.randint(3, VOCABULARY, (1, len(row)), device=model.device) for row in rows]

    def step() -> None:
        for row in ids:
            llama(input_ids=row, labels=row, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gemm_rate(device: str) -> float:
    """Operations a second of a product of matrices as large as the language model's."""
    width = 4096 if device == "cuda" else 1408
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds = median_seconds({"": lambda: left @ right}, device, 0.5)[""]
    return 2 * width**3 / seconds


def stage_line(stage: str, chosen: argparse.Namespace, gemm: float) -> Line:
    """One stage's step beside its peers."""
    shape = SHAPES[chosen.device][stage]
    model: Any = build(chosen.device, shape[0])
    pieces = pieces_of(model, stage, shape)
    pixels = pixels_of(model, pieces)
    rows = rows_of(model, pieces, pixels, shape[4])
    calls = {
        "": ours(model, rows),
        "padded": padded(model, pieces, pixels),
        "plain Llama": plain_llama(model, rows),
    }
    operations, language = Flops.of(model).step(rows)
    seconds = median_seconds(calls, chosen.device, chosen.seconds, least=3)
    tokens = sum(len(row) for row in rows)
    rate, most = operations / seconds[""], peak(model.device) or gemm
    name = f"{stage} {len(pieces)} pieces {tokens:,} tokens"
    line = Line("train", name, seconds[""] * 1e3, 0.0, 100 * rate / most, teraflops_per_second=rate / 1e12)
    line.ceiling = "peak" if peak(model.device) else "matrix products"
    line.ratio_to = {peer: seconds[peer] / seconds[""] for peer in calls if peer}
    line.figures = {
        "tokens/s": tokens / seconds[""],
        "pieces/s": len(pieces) / seconds[""],
        "pictures/s": shape[1] / seconds[""],
        "language model's share of peak": language / seconds[""] / most,
        "share of matrix products": rate / gemm,
    }
    print(line, flush=True)
    return line


def head_calls(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Call]:
    """Value and gradients of the head's loss, in ours and in torch's ways."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    mean = torch.full((rows,), 1 / rows, device=device)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (hidden, weight))

    calls: dict[str, Call] = {
        "": lambda: gradients(head_cross_entropy(hidden, weight, targets, mean)[0]),
        "all logits": lambda: gradients(F.cross_entropy((hidden @ weight.T).float(), targets)),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        calls["torch chunked"] = lambda: gradients(F.linear_cross_entropy(hidden, weight, targets, options=options))
    return calls


def head_line(rows: int, chosen: argparse.Namespace, gemm: float) -> Line:
    """The loss alone."""
    width = LLAMA[chosen.device]["hidden_size"]
    seconds = median_seconds(head_calls(rows, width, VOCABULARY, chosen.device), chosen.device, chosen.seconds)
    rate = 6 * rows * width * VOCABULARY / seconds[""]
    line = Line("train", f"head {rows:,} x {width} x {VOCABULARY}", seconds[""] * 1e3, 0.0, 100 * rate / gemm)
    line.teraflops_per_second, line.ceiling = rate / 1e12, "matrix products"
    line.ratio_to = {peer: value / seconds[""] for peer, value in seconds.items() if peer}
    print(line, flush=True)
    return line


def main() -> None:
    chosen = arguments(__doc__ or "")
    gemm = gemm_rate(chosen.device)
    lines = [stage_line(stage, chosen, gemm) for stage in ("stage1", "stage2")]
    lines += [
        head_line(rows, chosen, gemm) for rows in ((256, 1024, 4096) if chosen.device == "cpu" else (4096, 16384))
    ]
    save(lines, chosen)


@pytest.mark.parametrize("name", ["", "all logits"])
def test_head(benchmark: Any, name: str) -> None:
    benchmark(head_calls(128, 64, 1000, "cpu")[name])


if __name__ == "__main__":
    main()
