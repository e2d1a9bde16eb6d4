"""What learns, as one module: fusion, language model and head. The frozen encoders stand beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_fast.model.attention import NAME
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.train.loss import SoftLabels, head_cross_entropy
from sphinx_fast.train.packing import Packed, Row
from sphinx_fast.train.pieces import IGNORED
from sphinx_fast.train.pointer import Pointing
from sphinx_fast.train.settings import LoraSettings
from sphinx_fast.vision.tower import VisionFeatures


class Learner(nn.Module):
    """A row and what the encoders saw of its pictures -> the row's part of the step's loss.

    Everything is inside one forward, so that FSDP gathers and casts what it needs, the head included.
    """

    def __init__(self, model: SphinxForConditionalGeneration, soft: SoftLabels | None = None) -> None:
        super().__init__()
        self.fusion: Any = model.model.fusion
        self.language_model: Any = model.model.language_model
        self.lm_head: Any = model.lm_head
        self.config = model.config
        self.soft = soft
        # Not only while a pass runs: recomputed activations ask for it in the backward pass.
        self.language_model.config._attn_implementation = NAME

    def forward(
        self, row: Row, features: VisionFeatures | None, coefficients: Tensor, pointing: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of coefficients * cross-entropy, the cross-entropy of every target [N], and of every pointer [K].

        Args:
            row: T tokens.
            features: of the row's views, None: it has no picture.
            coefficients: [N] of the row's N targets, in order.
            pointing: coefficient of every pointer's loss (train/pointer.py), which is added; None: there are none.
        """
        placeholders = row.input_ids == self.config.image_token_id
        embeddings = self.language_model.get_input_embeddings()(row.input_ids.masked_fill(placeholders, 0))
        unused = None
        if features is not None:
            # Beside adapters the fusion stays in fp32 while the encoders compute in half precision.
            features = features.to(self.fusion.patch_projection.linear.weight.dtype)
            visual_tokens = self.fusion(features).flatten(0, 1)
            embeddings = embeddings.masked_scatter(placeholders[:, None], visual_tokens.to(embeddings))
        elif self.training:
            # Every process must give every weight a gradient, or the reductions of a sharded run do not match.
            unused = sum((p.sum() * 0.0 for p in self.fusion.parameters() if p.requires_grad), torch.zeros(()))
        attention = Packed(row.lengths, row.positions) if pointing is None else Pointing(row, self.config)
        hidden = attention.run(self.language_model, embeddings)
        asked = row.targets != IGNORED
        loss, losses = head_cross_entropy(
            hidden[asked], self.lm_head.weight, row.targets[asked], coefficients, self.soft
        )
        pointed = attention.losses if isinstance(attention, Pointing) else losses[:0]
        if pointing is not None:
            loss = loss + pointing * pointed.sum()
        if unused is not None:
            loss = loss + unused.to(loss)
        return loss, losses, pointed.detach()


@torch.no_grad()
def see(model: Any, pixel_values: Tensor | None) -> VisionFeatures | None:
    """What the frozen encoders see of views [N, 3, s, s], if there are any."""
    return None if pixel_values is None else model.model.vision_tower(pixel_values)


def choose_parts(model: SphinxForConditionalGeneration, parts: Sequence[str], lora: LoraSettings | None) -> list[str]:
    """Freeze everything but the named parts; with `lora` the language model learns through adapters alone.

    Returns the names of the parameters that learn, in the model's order. The head belongs to the language model.
    """
    model.requires_grad_(False)
    if "fusion" in parts:
        model.model.fusion.requires_grad_(True)
    if "language_model" in parts:
        if lora is not None:
            add_adapters(model, lora)
        else:
            model.model.language_model.requires_grad_(True)
            model.lm_head.requires_grad_(True)
    model.model.vision_tower.eval()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def add_adapters(model: SphinxForConditionalGeneration, lora: LoraSettings) -> None:
    """Low-rank adapters on the language model's linear layers, in place (PEFT)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError('lora needs PEFT: pip install "sphinx-fast[peft]"') from error
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    language_model: Any = model.model.language_model
    try:
        inject_adapter_in_model(config, language_model)
    except ValueError as error:
        raise ValueError(f"lora: {' '.join(str(error).split())}") from error
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def enable_checkpoints(language_model: Any) -> None:
    """Keep the borders of blocks and compute their insides again in the backward pass (transformers renamed it)."""
    enable = getattr(language_model, "activation_checkpointing_enable", None)
    (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})


def decay_groups(named: Sequence[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay, and norms, biases and view tags, which do not."""
    plain = [p for name, p in named if not _decays(name, p)]
    decayed = [p for name, p in named if _decays(name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Norms and biases are vectors; the tags [1, 1, D] are named, because they are biases by nature."""
    return parameter.dim() > 1 and not name.endswith(("view_start", "view_end"))
