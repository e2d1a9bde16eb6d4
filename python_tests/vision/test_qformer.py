"""The Q-Former and its vision tower against transformers' BLIP-2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Blip2Config, Blip2Model

from sphinx_fast.vision.qformer import QFormerEncoder

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "encoder_hidden_size": 32,
    "vocab_size": 20,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 10,
    "hidden_size": 8,
    "ffn_dim": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "word_embed_proj_dim": 8,
    "max_position_embeddings": 16,
}


def blip2(cross_attention_frequency: int) -> Blip2Model:
    qformer = {**QFORMER, "cross_attention_frequency": cross_attention_frequency}
    model = Blip2Model(Blip2Config(vision_config=VISION, qformer_config=qformer, text_config=OPT, num_query_tokens=5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize("cross_attention_frequency", [1, 2])
@torch.no_grad()
def test_agrees_with_transformers(cross_attention_frequency: int) -> None:
    theirs = blip2(cross_attention_frequency)
    ours = QFormerEncoder(theirs.config.vision_config, theirs.config.qformer_config, 5).eval()
    state = theirs.state_dict()
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    output: Any = theirs.get_qformer_features(pixels)
    expected = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    assert expected.shape == (3, 5, 24)
    torch.testing.assert_close(ours(pixels), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the pictures are seen


@torch.no_grad()
def test_queries_start_as_the_tower_says() -> None:
    from tiny import tiny_config

    from sphinx_fast.vision import VisionTower

    torch.manual_seed(0)
    tower = VisionTower(tiny_config().vision_config)
    assert tower.qformer is not None and tower.qformer.query_tokens.std() > 1e-3
