"""Stages two and three of sphinx-mini: align the fusion with words, then train fusion and language model on questions.

The encoders are frozen; their features were computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.models.llama.modeling_llama import rotate_half

from sphinx_fast.data.scene_drawing import COLOURS, DEFECTS, SHAPES
from sphinx_fast.data.scene_targets import SIZE_NAMES
from sphinx_fast.data.scenes import Scene
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.dense import BINS, LABELS, schedule, soft_bins, start_weights
from sphinx_fast.train.mini_rows import RowMaker, Rows, soft_labels
from sphinx_fast.vision.tower import VisionFeatures

WORDS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZE_NAMES[1:], "defect": DEFECTS}
COORDINATE_SOFTNESS = 0.015
POINTER_WEIGHT = 1.0


class Features:
    """Cached encoder features of the pool: patches [N, V, 1 + P, C] as parts, queries [N, V, Q, Cq], all fp16."""

    def __init__(self, patches: Sequence[np.ndarray], queries: np.ndarray) -> None:
        self.patches, self.queries = patches, queries

    def __len__(self) -> int:
        return len(self.queries)

    def batch(self, indices: np.ndarray) -> VisionFeatures:
        """Features of pictures, views flattened: patches [B*V, 1 + P, C], queries [B*V, Q, Cq]."""
        parts = [torch.from_numpy(np.asarray(part[indices])).float() for part in self.patches]
        queries = torch.from_numpy(np.asarray(self.queries[indices])).float()
        return VisionFeatures([part.flatten(0, 1) for part in parts], queries.flatten(0, 1))


@torch.no_grad()
def start_language_model(model: Any) -> None:
    """Attention starts by likeness (query = key projection), and the output head reads what the embedding writes."""
    start_weights(model.model.language_model)
    start_weights(model.model.fusion)
    embedding = model.get_input_embeddings().weight
    embedding.normal_(std=1.0)
    model.lm_head.weight.copy_(embedding * embedding.shape[1] ** -0.5)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.normal_(std=embedding.shape[1] ** -0.5)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def align_fusion(
    model: Any,
    features: Features,
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
            picked = np.sort(rng.integers(0, len(features), batch))
            tokens = fusion.view_tokens(features.batch(picked)).unflatten(0, (batch, -1))[:, 0, first:]
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


class Pointer:
    """Two attention heads that learn to look at what a box is about.

    While a coordinate is being said, heads `HEADS` of one layer are asked to put their weight on the patches of the
    global view that lie in the box. The model is unchanged: this only reads its queries and keys during training.
    """

    LAYER, HEADS = 2, (0, 1)

    def __init__(self, model: Any) -> None:
        config = model.config.vision_config
        self.attention = model.model.language_model.layers[self.LAYER].self_attn
        self.first = 2 + config.view_tags + config.num_query_tokens  # BOS, start tag, queries, class token
        at = (torch.arange(config.grid_size) + 0.5) / config.grid_size
        y, x = torch.meshgrid(at, at, indexing="ij")
        self.middles, self.half = torch.stack([x, y], dim=-1).flatten(0, 1), 0.5 / config.grid_size
        self.seen: dict[str, Any] = {}
        self.attention.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self.seen = {"hidden": named["hidden_states"], "rotary": named["position_embeddings"]}

    def targets(self, boxes: Tensor) -> Tensor:
        """Boxes [K, 4] -> [K, P] bool: patches whose middle lies in the box, and the one that holds its middle."""
        inside = ((self.middles >= boxes[:, None, :2]) & (self.middles <= boxes[:, None, 2:])).all(-1)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        return inside | ((self.middles - middle[:, None]).abs() <= self.half).all(-1)

    def loss(self, rows: Rows, mask: Tensor) -> Tensor:
        """Mean of -log(attention on the right patches) over the heads and the coordinates of the batch."""
        if not len(rows.pointers):
            return torch.zeros(())
        row, at = rows.pointers.unbind(-1)
        hidden, (cos, sin) = self.seen["hidden"], self.seen["rotary"]
        size, heads = self.attention.head_dim, list(self.HEADS)
        cos, sin = cos.expand(len(hidden), -1, -1).unsqueeze(2), sin.expand(len(hidden), -1, -1).unsqueeze(2)
        keys = self.attention.k_proj(hidden).unflatten(-1, (-1, size))[:, :, heads]
        queries = self.attention.q_proj(hidden[row, at]).unflatten(-1, (-1, size))[:, heads]
        keys = keys * cos + rotate_half(keys) * sin
        queries = queries * cos[row, at] + rotate_half(queries) * sin[row, at]
        scores = torch.einsum("khd,kthd->kht", queries, keys[row]) * size**-0.5
        scores = (scores + mask[row, 0, at].unsqueeze(1)).log_softmax(-1)
        patches = scores[..., self.first : self.first + len(self.middles)]
        wrong = ~self.targets(rows.pointed).unsqueeze(1)
        return -patches.masked_fill(wrong, torch.finfo(patches.dtype).min).logsumexp(-1).mean()


def answer_loss(
    model: SphinxForConditionalGeneration,
    rows: Rows,
    visual_tokens: Tensor,
    targets: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted soft cross-entropy over answer tokens, and the share of them whose best guess is right."""
    outputs = model.model(
        input_ids=rows.input_ids,
        visual_tokens=visual_tokens,
        attention_mask=mask,
        position_ids=rows.positions,
        use_cache=False,
    )
    asked = rows.labels >= 0
    logits = model.lm_head(outputs.last_hidden_state[asked])
    labels, weights = rows.labels[asked], rows.weights[asked]
    losses = F.cross_entropy(logits, targets[labels], reduction="none")
    right = (logits.argmax(-1) == labels).float().mean()
    return (losses * weights).sum() / weights.sum(), right


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train_language(
    model: SphinxForConditionalGeneration,
    tokenizer: SphinxTokenizer,
    features: Features,
    scenes: Sequence[Scene],
    *,
    steps: int,
    batch: int,
    rate: float,
    text_length: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train fusion and language model, encoders frozen: `steps` batches of `batch` pictures with all their questions.

    With `world` processes each takes its share of every batch and the gradients are averaged, which two single-threaded
    processes do better than one process with two threads.
    """
    torch.manual_seed(seed)
    rng, generator = Random(seed * world + rank), np.random.default_rng(seed)
    config = model.config
    maker = RowMaker(tokenizer, config.vision_config.tokens_per_picture, config.image_token_id, text_length)
    targets = soft_labels(tokenizer, config.text_config.vocab_size, COORDINATE_SOFTNESS)
    parts = (model.model.fusion, model.model.language_model, model.lm_head)
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    order = np.concatenate([generator.permutation(len(features)) for _ in range(1 + steps * batch // len(features))])
    pointer = Pointer(model)
    smooth = {"loss": 0.0, "tokens right": 0.0, "pointer": 0.0}
    model.train()
    with tqdm(total=steps, desc="language", mininterval=5, disable=rank > 0) as bar:
        for step in range(steps):
            picked = np.sort(order[step * batch + rank : (step + 1) * batch : world])
            rows = maker.rows([scenes[k] for k in picked], rng)
            visual_tokens = model.model.fusion(features.batch(picked))
            mask = rows.mask()
            loss, right = answer_loss(model, rows, visual_tokens, targets, mask)
            pointing = pointer.loss(rows, mask)
            optimizer.zero_grad()
            (loss + POINTER_WEIGHT * pointing).backward()
            if world > 1:
                average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, steps, 30)
            optimizer.step()
            keep = min(0.97, step / (step + 1))
            for name, value in zip(smooth, (loss, right, pointing), strict=True):
                smooth[name] = keep * smooth[name] + (1 - keep) * value.item()
            bar.update()
            if step % 10 == 0:
                bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in smooth.items()))
    model.eval()
