"""Pre-training of one encoder on scenes: in its own way (`pretext.py`), and densely: what stands in each patch, where
its box lies, what the view holds.

A small linear head reads each encoder alone, so that its features are linear in shape, colour, size, text, joints and
in the box of the patch's owner (soft bins). The language model then only has to find a patch and copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sphinx_fast.data.scene_targets import CLASSES
from sphinx_fast.data.scenes import LETTERS, TEXTS
from sphinx_fast.train.mini.pool import LABELS, WHOLE_CLASSES, cut_views
from sphinx_fast.train.mini.pretext import SelfDistillation, pretext_of
from sphinx_fast.vision import VisionTower
from sphinx_fast.vision.clip import clip_features
from sphinx_fast.vision.convnext import convnext_features, repeat_to_grid
from sphinx_fast.vision.dinov2 import dinov2_features

BINS = 101  # one per coordinate token, 0.00 .. 1.00
SOFTNESS = 0.03  # standard deviation of a soft coordinate
HEAD_RATE = 1e-2
HEADS_FIRST = 60  # steps in which only the heads learn
ENCODERS = ("clip", "convnext", "dinov2", "qformer")
OWN_WEIGHT = 0.3  # of the encoder's own way beside the labels
LABEL_WEIGHTS = {"size": 0.5, "letter": 3.0, "letters": 6.0, "text": 3.0, "defect": 0.5, "joint": 0.5}  # the others: 1
LONGEST = max(map(len, TEXTS))
# [1 + texts, LONGEST]: the letters of a text, 1 + their place in LETTERS, 0 behind its end
SPELLINGS = torch.tensor([[1 + LETTERS.find(c) for c in text.ljust(LONGEST)] for text in ("", *TEXTS)])


def soft_bins(values: Tensor, bins: int = BINS, softness: float = SOFTNESS) -> Tensor:
    """[...] in [0, 1] -> [..., bins]: a normalised Gaussian around the value."""
    centres = torch.linspace(0, 1, bins, device=values.device)
    return torch.softmax(-0.5 * ((values.clamp(0, 1).unsqueeze(-1) - centres) / softness) ** 2, dim=-1)


class DenseHeads(nn.Module):
    """Linear heads of one encoder.

    Args:
        channels: features per patch; 0 when there are none (the Q-Former).
        whole_channels: features of the whole view.
    """

    def __init__(self, channels: int, whole_channels: int) -> None:
        super().__init__()
        self.labels = nn.ModuleDict({name: nn.Linear(channels, CLASSES[name] + 1) for name in LABELS if channels})
        self.boxes: Any = nn.Linear(channels, 6 * BINS) if channels else None
        self.letters: Any = nn.Linear(channels, LONGEST * (1 + len(LETTERS))) if channels else None
        self.whole = nn.Linear(whole_channels, sum(WHOLE_CLASSES))

    def _letter_loss(self, features: Tensor, texts: Tensor) -> Tensor:
        """Features [N, C], texts [N] -> the sum of the mean cross-entropy of a text's letters, one place after another.

        Spelling goes first: 130 texts told apart as wholes stay at a guess for thousands of steps.
        """
        logits = self.letters(features).unflatten(-1, (LONGEST, -1))
        spelled = SPELLINGS.to(texts.device)[texts]
        return F.cross_entropy(logits.flatten(0, 1), spelled.flatten(), reduction="sum") / LONGEST

    def whole_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Features [N, C], targets [N, W]: mean cross-entropy over all questions."""
        logits = self.whole(features).split(list(WHOLE_CLASSES), dim=-1)
        losses = [F.cross_entropy(row, targets[:, k]) for k, row in enumerate(logits)]
        return torch.stack(losses).sum() / 20

    def patch_losses(self, features: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Features [N, P, C], labels [N, P, 8], boxes [N, P, 6] -> a loss per head.

        Labels that are mostly zero are scored where they are not; `thing` decides between something and nothing. All
        sums are divided by the number of owned patches: a mean over the two patches of a batch that hold a word would
        drown everything else in noise.
        """
        losses: dict[str, Tensor] = {}
        owned = labels[..., 0] > 0
        scored = owned.sum().clamp(min=1)
        for k, name in enumerate(LABELS):
            if name in ("thing", "joint"):
                losses[name] = F.cross_entropy(self.labels[name](features).flatten(0, 1), labels[..., k].flatten())
                continue
            where = labels[..., k] > 0
            if name == "text":  # a word that the view cuts cannot be read
                where &= ((boxes[..., :4] > -0.02) & (boxes[..., :4] < 1.02)).all(-1)
                losses["letters"] = self._letter_loss(features[where], labels[..., k][where]) / scored
            logits = self.labels[name](features[where])
            losses[name] = F.cross_entropy(logits, labels[..., k][where], reduction="sum") / scored
        jointed = labels[..., LABELS.index("joint")] > 0
        for name, where, part in (("box", owned, slice(0, 4)), ("point", jointed, slice(4, 6))):
            logits = self.boxes(features[where]).unflatten(-1, (6, BINS))[:, part]
            target = soft_bins(boxes[where][:, part])
            total = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="sum")
            losses[name] = total / (logits.shape[1] * scored)
        return losses


def sine_positions(grid: int, channels: int, scale: float = 1.0) -> Tensor:
    """[1 + grid * grid, channels]: sines and cosines of a patch's row and column; zeros for the class token."""
    frequencies = math.pi * torch.arange(1, channels // 4 + 1) / 2 ** (torch.arange(channels // 4) % 3)
    at = (torch.arange(grid) + 0.5) / grid
    waves = torch.cat([torch.sin(at[:, None] * frequencies), torch.cos(at[:, None] * frequencies)], dim=-1)
    rows = waves[:, None].expand(grid, grid, -1)
    table = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
    return scale * torch.cat([torch.zeros(1, channels), table])


@torch.no_grad()
def start_weights(module: nn.Module) -> None:
    """Linear and convolution weights from N(0, 1 / fan-in).

    The usual 0.02 suits widths near 1,000. At 64 it leaves every block close to nothing, the network close to linear,
    and shapes unlearned for a thousand steps.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.weight.normal_(std=part.weight[0].numel() ** -0.5)


@torch.no_grad()
def start_positions(tower: Any, name: str) -> None:
    """Position tables start as sines: from noise of 0.02 a box takes hundreds of steps to be found."""
    grid = tower.config.grid_size
    if name == "clip":
        table = tower.clip.get_parameter("embeddings.position_embedding.weight")
    elif name == "dinov2":
        table = tower.dinov2.embeddings.position_embeddings[0]
    elif name == "qformer":
        table = tower.qformer.vision_model.embeddings.position_embedding[0]
    else:
        return
    table.copy_(sine_positions(grid, table.shape[-1]))


def relative_boxes(boxes: Tensor, grid: int) -> Tensor:
    """[N, P, 6] in the view's frame -> around the patch's middle, which is 0.5: for an encoder without positions."""
    at = (torch.arange(grid, device=boxes.device) + 0.5) / grid
    y, x = torch.meshgrid(at, at, indexing="ij")
    middles = torch.stack([x, y] * 3, dim=-1).flatten(0, 1)
    return (boxes - middles) + 0.5


def encoder_features(tower: Any, name: str) -> Callable[[Tensor], Tensor]:
    """Views [N, 3, s, s] -> tokens of the encoder `name`, class token first (Q-Former: the queries)."""
    grid = tower.config.grid_size
    if name == "clip":
        return lambda x: clip_features(tower.clip, x)
    if name == "convnext":
        return lambda x: repeat_to_grid(convnext_features(tower.convnext, tower._convnext_pixels(x)), grid * grid)
    if name == "dinov2":
        return lambda x: dinov2_features(tower.dinov2, tower._dinov2_pixels(x))
    return tower.qformer


def build_heads(tower: VisionTower, name: str) -> DenseHeads:
    """The heads that fit the encoder."""
    config = tower.config
    if name == "qformer":
        return DenseHeads(0, config.num_query_tokens * config.qformer_config.hidden_size)
    width = getattr(config, f"{name}_config").hidden_size
    return DenseHeads(width, width)


def dense_loss(name: str, tokens: Tensor, heads: DenseHeads, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """The weighted sum and the single losses of one batch."""
    if name == "qformer":
        losses = {"whole": heads.whole_loss(tokens.flatten(1), batch["wholes"])}
        return losses["whole"], losses
    grid = math.isqrt(tokens.shape[1] - 1)
    boxes = relative_boxes(batch["boxes"], grid) if name == "convnext" else batch["boxes"]
    losses = heads.patch_losses(tokens[:, 1:], batch["labels"], boxes)
    losses["whole"] = heads.whole_loss(tokens[:, 0], batch["wholes"])
    return sum((LABEL_WEIGHTS.get(key, 1.0) * value for key, value in losses.items()), torch.zeros(())), losses


def pool_batch(pool: dict[str, np.ndarray], indices: np.ndarray, rng: np.random.Generator, view_size: int) -> dict:
    """Pictures by index -> global view and one crop each, with their labels; full crops more often than empty ones."""
    order = np.sort(indices)
    views = cut_views(torch.from_numpy(pool["squares"][order]), view_size)
    owned = (pool["labels"][order][:, 1:, :, 0] > 0).sum(-1).cumsum(-1) + np.arange(1, views.shape[1])
    crop = 1 + (owned <= rng.random((len(order), 1)) * owned[:, -1:]).sum(-1)
    rows = np.arange(len(order))
    batch = {"views": torch.cat([views[:, 0], views[rows, crop]])}
    for name in ("labels", "boxes", "wholes", "captions"):
        array = pool[name][order]
        both = torch.from_numpy(np.concatenate([array[:, 0], array[rows, crop]]))
        batch[name] = both.float() if name == "boxes" else both.long()
    return batch


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_encoder(
    tower: VisionTower,
    name: str,
    pool: dict[str, np.ndarray],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    position: int = 0,
) -> dict[str, float]:
    """Train one encoder of the tower in place, where it lies; returns the smoothed losses of the end."""
    torch.manual_seed(seed)
    device = tower.device
    rng = np.random.default_rng(seed)
    heads = build_heads(tower, name).to(device)
    features = encoder_features(tower, name)
    encoder = getattr(tower, name)
    start_weights(encoder)
    start_positions(tower, name)
    pretext = pretext_of(tower, name, int(pool["captions"].max()) + 1, pool["captions"].shape[-1]).to(device)
    learning = [*heads.parameters(), *(p for p in pretext.parameters() if p.requires_grad)]
    parameters = [*encoder.parameters(), *learning]
    # The heads run ahead: a trunk that warms up together with them first learns to say the average answer, and forgets
    # where its patches are.
    groups = [{"params": [*encoder.parameters()], "rate": rate}, {"params": learning, "rate": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    smooth: dict[str, float] = {}
    count = len(pool["squares"])
    order = np.concatenate([rng.permutation(count) for _ in range(1 + steps * batch // count)])
    encoder.train()
    with tqdm(total=steps, desc=f"dense {name}", position=position, mininterval=5) as bar:
        for step in range(steps):
            picked = order[step * batch : (step + 1) * batch]
            batched = pool_batch(pool, picked, rng, tower.config.view_size)
            data = {key: value.to(device) for key, value in batched.items()}
            views = undisturbed = data["views"]
            if isinstance(pretext, SelfDistillation):
                views = pretext.disturb(views, tower.config.view_size // tower.config.grid_size)
                undisturbed = tower._dinov2_pixels(undisturbed)
            tokens = features(views)
            loss, losses = dense_loss(name, tokens, heads, data)
            losses["own"] = pretext(tokens, data["captions"], undisturbed)
            optimizer.zero_grad()
            (loss + OWN_WEIGHT * losses["own"]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                late = step < HEADS_FIRST and group["rate"] == rate
                group["lr"] = 0.0 if late else group["rate"] * schedule(step, steps, 10)
            optimizer.step()
            pretext.follow()
            for key, value in losses.items():
                smooth[key] = 0.97 * smooth.get(key, value.item()) + 0.03 * value.item()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix_str(" ".join(f"{key} {value:.2f}" for key, value in smooth.items()))
    encoder.eval()
    return smooth
