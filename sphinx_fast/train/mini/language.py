"""Where sphinx-mini's second stage starts: a language model that reads what it writes, a fusion aligned with words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sphinx_fast.data.scene_drawing import COLOURS, DEFECTS, SHAPES
from sphinx_fast.data.scene_targets import SIZE_NAMES
from sphinx_fast.data.scenes import TEXTS
from sphinx_fast.train.mini.encoders import BINS, LABELS, schedule, soft_bins, start_weights
from sphinx_fast.train.mini.pool import cut_views
from sphinx_fast.train.pointer import coordinate_ids

WORDS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZE_NAMES[1:], "defect": DEFECTS, "text": TEXTS}


WAVES = 24  # half a period of the fastest is 1 / 24 of the picture


@torch.no_grad()
def start_language_model(model: Any, tokenizer: Any) -> None:
    """Attention starts by likeness (query = key projection), and the output head reads what the embedding writes.

    Coordinates start as points of a smooth curve: otherwise 0.37 and 0.38 are strangers until training has met both.
    """
    start_weights(model.model.language_model)
    start_weights(model.model.fusion)
    embedding = model.get_input_embeddings().weight
    embedding.normal_(std=1.0)
    embedding[coordinate_ids(tokenizer)] = smooth_curve(BINS, embedding.shape[1]).to(embedding)
    model.lm_head.weight.copy_(embedding * embedding.shape[1] ** -0.5)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.normal_(std=embedding.shape[1] ** -0.5)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def smooth_curve(points: int, channels: int) -> Tensor:
    """[points, channels] of N(0, 1): random directions times sines and cosines of 1 .. WAVES half periods."""
    angles = torch.linspace(0, math.pi, points)[:, None] * torch.arange(1, WAVES + 1)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [points, 2 * WAVES], of length sqrt(WAVES)
    return waves @ torch.randn(2 * WAVES, channels) / WAVES**0.5


def align_fusion(
    model: Any,
    pool: dict[str, np.ndarray],
    word_ids: dict[str, Tensor],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> None:
    """Patch tokens learn to lie near the embeddings of the words for what they show, and to keep the box readable.

    The global view only: crops see the same things elsewhere.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    fusion, width = model.model.fusion, model.config.text_config.hidden_size
    boxes = nn.Linear(width, 4 * BINS)
    scale = nn.Parameter(torch.tensor(4.0))
    embedding = model.get_input_embeddings().weight
    parameters = [*fusion.parameters(), *boxes.parameters(), embedding, scale]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    first = model.config.vision_config.num_query_tokens + 1  # behind the queries and the class token
    with tqdm(total=steps, desc="align fusion", mininterval=5) as bar:
        for step in range(steps):
            picked = np.sort(rng.integers(0, len(pool["squares"]), batch))
            views = cut_views(torch.from_numpy(pool["squares"][picked]), model.config.vision_config.view_size)
            with torch.no_grad():
                features = model.model.vision_tower(views[:, 0])
            tokens = fusion.view_tokens(features)[:, first:]
            labels = torch.from_numpy(pool["labels"][picked][:, 0]).long()
            targets = torch.from_numpy(pool["boxes"][picked][:, 0, :, :4]).float()
            losses = {}
            for name, ids in word_ids.items():
                label = labels[..., LABELS.index(name)]
                where = label > 0
                if where.any():
                    logits = scale * F.normalize(tokens[where], dim=-1) @ F.normalize(embedding[ids], dim=-1).T
                    losses[name] = F.cross_entropy(logits * 2, label[where] - 1)
            owned = labels[..., 0] > 0
            logits = boxes(tokens[owned]).unflatten(-1, (4, BINS)).flatten(0, 1)
            losses["box"] = F.cross_entropy(logits, soft_bins(targets[owned]).flatten(0, 1))
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, steps, 20)
            optimizer.step()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix_str(" ".join(f"{k} {v.item():.2f}" for k, v in losses.items()))
    with torch.no_grad():
        model.lm_head.weight.copy_(embedding * width**-0.5)
