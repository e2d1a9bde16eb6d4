"""Converted language models against the released arithmetic: other widths, grouped queries, RoPE factors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import GOLDEN, reshard
from torch.nn import functional as F

from sphinx_fast import SphinxForConditionalGeneration
from sphinx_fast.weights.accessory import convert

CASES: list[dict[str, Any]] = [
    {"dim": 48, "n_layers": 1, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 8, "shards": 1},
    {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 3, "multiple_of": 24, "shards": 3},
    {"dim": 96, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "ffn_dim_multiplier": 1.3, "shards": 2},
    {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 16, "rope_theta": 500.0, "shards": 1},
    {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16, "rope_scaling": 0.25, "norm_eps": 1e-3, "shards": 1},
]
VOCAB = 402


def released_folder(folder: Path, args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The encoders of a golden folder under a random language model of other widths; returns its weights."""
    shutil.copytree(GOLDEN / "llama_ens", folder)
    generator = torch.Generator().manual_seed(0)
    args = dict(args)
    shards = args.pop("shards")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(args))
    file = folder / "consolidated.00-of-01.model.pth"
    weights = torch.load(file, weights_only=True)["model"]
    old = 64
    dim, heads = args["dim"], args["n_heads"]
    kv = args.get("n_kv_heads", heads) * (dim // heads)
    hidden = int(args.get("ffn_dim_multiplier", 1) * int(2 * (4 * dim) / 3))
    hidden = args["multiple_of"] * -(-hidden // args["multiple_of"])

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    for key in [key for key in weights if key.startswith("llma.layers.")]:
        del weights[key]
    for i in range(args["n_layers"]):
        layer = f"llma.layers.{i}."
        weights |= {layer + f"attention.{n}.weight": drawn(r, dim) for n, r in (("wq", dim), ("wk", kv), ("wv", kv))}
        weights[layer + "attention.wo.weight"] = drawn(dim, dim)
        weights |= {layer + f"feed_forward.{name}.weight": drawn(hidden, dim) for name in ("w1", "w3")}
        weights[layer + "feed_forward.w2.weight"] = drawn(dim, hidden)
        weights |= {layer + f"{name}.weight": 1 + drawn(dim) for name in ("attention_norm", "ffn_norm")}
    weights["llma.tok_embeddings.weight"], weights["llma.output.weight"] = drawn(VOCAB, dim), drawn(VOCAB, dim)
    weights["llma.norm.weight"] = 1 + drawn(dim)
    for key, tensor in weights.items():  # projections and tags end in the language model's width
        if any(part in key for part in ("_img", "visual_proj", "qformer_proj")) and old in tensor.shape:
            axis = list(tensor.shape).index(old)
            weights[key] = drawn(*tensor.shape[:axis], dim, *tensor.shape[axis + 1 :])
    file.unlink()
    torch.save({"model": weights}, file)
    if shards > 1:
        reshard(folder, shards)
    return weights


def released_logits(weights: dict[str, torch.Tensor], args: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """The released language model in float64: RMSNorm, interleaved RoPE, grouped-query causal attention, SwiGLU."""
    w = {key.removeprefix("llma."): tensor.double() for key, tensor in weights.items() if key.startswith("llma.")}
    dim, heads = args["dim"], args["n_heads"]
    kv_heads, size, eps = args.get("n_kv_heads", heads), dim // heads, args.get("norm_eps", 1e-5)
    positions = torch.arange(len(ids)).double() * args.get("rope_scaling", 1.0)
    inverse = args.get("rope_theta", 10000.0) ** (-torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones(len(ids), size // 2).double(), torch.outer(positions, inverse))[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * w[name + ".weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * turn).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)
    for i in range(args["n_layers"]):
        at = f"layers.{i}.attention"
        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (
            (h @ w[f"{at}.{name}.weight"].T).view(len(ids), count, size)
            for name, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
        )
        q, k = rotate(q), rotate(k).repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(heads // kv_heads, 1))
        x = x + mixed.flatten(1) @ w[f"{at}.wo.weight"].T
        h, ff = norm(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward"
        x = x + (F.silu(h @ w[f"{ff}.w1.weight"].T) * (h @ w[f"{ff}.w3.weight"].T)) @ w[f"{ff}.w2.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("args", CASES, ids=lambda a: f"{a['dim']}x{a['n_layers']}-{a['shards']}shards")
def test_converted_logits_are_the_released_ones(tmp_path: Path, args: dict[str, Any]) -> None:
    weights = released_folder(tmp_path / "released", args)
    convert(tmp_path / "released", tmp_path / "new", progress=False)
    model = SphinxForConditionalGeneration.from_pretrained(tmp_path / "new").double().eval()
    ids = torch.randint(3, 400, (23,), generator=torch.Generator().manual_seed(1))
    expected = released_logits(weights, args, ids)
    # fp32 tables of cosines inside transformers' Llama bound the agreement, not the weights.
    torch.testing.assert_close(model(input_ids=ids[None]).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_activation_and_widths_come_from_encoders_json(tmp_path: Path) -> None:
    folder = tmp_path / "released"
    shutil.copytree(GOLDEN / "llama_ens", folder)
    widths = json.loads((folder / "encoders.json").read_text())
    widths["clip"]["hidden_act"] = "quick_gelu"
    (folder / "encoders.json").unlink()
    (folder / "encoders.json").write_text(json.dumps(widths))
    config = convert(folder, tmp_path / "new", progress=False)
    assert config.vision_config.clip_config.hidden_act == "quick_gelu"
    model = SphinxForConditionalGeneration.from_pretrained(tmp_path / "new")
    activation = next(module for name, module in model.named_modules() if name.endswith("clip.encoder.layers.0.mlp"))
    assert type(activation.activation_fn).__name__ == "QuickGELUActivation"
    assert config.text_config.max_position_embeddings == 4096
