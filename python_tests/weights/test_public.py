"""Encoders and language models from the files their makers publish: the source's outputs, and damage refused."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXT
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from sphinx_fast import SphinxForConditionalGeneration
from sphinx_fast.model.config import ConvNextConfig
from sphinx_fast.vision.clip import clip_features
from sphinx_fast.vision.convnext import ConvNextModel
from sphinx_fast.vision.dinov2 import bake_position_table
from sphinx_fast.weights.checkpoint import Checkpoint
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.public import (
    assemble,
    load_blip2,
    load_clip,
    load_convnext,
    load_dinov2,
    load_language_model,
    read_clip,
    read_convnext,
    read_dinov2,
)

Tensors = dict[str, Tensor]
VIEW, PATCH, GRID = 32, 8, 4
VIT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": VIEW,
    "patch_size": PATCH,
}
# Fields of the views that fit encoders this small.
VIEWS = {"picture_size": 64, "view_size": VIEW, "grid_size": GRID, "convnext_size": 64, "dinov2_size": VIEW}


def randomized(module: Any, seed: int = 0) -> Any:
    """Weights large enough that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def pixels(count: int = 2, size: int = VIEW) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def save_bin(module: Any, folder: Path, shards: int = 1) -> Path:
    """A transformers folder as it was written before safetensors."""
    module.save_pretrained(folder)
    state = {key: tensor.clone() for key, tensor in Checkpoint(folder).items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = {key: f"pytorch_model-{i % shards:05d}-of-{shards:05d}.bin" for i, key in enumerate(state)}
    for name in set(names.values()):
        torch.save({key: tensor for key, tensor in state.items() if names[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- CLIP ---


def clip_source(act: str = "quick_gelu") -> CLIPVisionModel:
    return randomized(CLIPVisionModel(CLIPVisionConfig(**VIT, hidden_act=act)))


def clip_reference(source: Any) -> Tensor:
    trunk = getattr(source, "vision_model", source)
    with torch.no_grad():
        return trunk.post_layernorm(source(pixel_values=pixels()).last_hidden_state)


def whole_clip(vision: CLIPVisionModel) -> CLIPModel:
    """A CLIPModel around a vision tower."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        vision_config=vision.config.to_dict(),
        text_config={**text, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2},
        projection_dim=8,
    )
    model = CLIPModel(config)
    model.vision_model.load_state_dict(getattr(vision, "vision_model", vision).state_dict())
    return model


def open_clip_names(source: CLIPVisionModel, folder: Path) -> Tensors:
    """The source's weights under open_clip's names, with the text side's leftovers around them."""
    source.save_pretrained(folder)
    ours = {key.removeprefix("vision_model."): tensor for key, tensor in Checkpoint(folder).items()}
    named = {
        "positional_embedding": torch.zeros(5, 8),
        "logit_scale": torch.zeros(()),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
        "visual.proj": torch.zeros(128, 8),
        "visual.class_embedding": ours["embeddings.class_embedding"],
        "visual.positional_embedding": ours["embeddings.position_embedding.weight"],
        "visual.conv1.weight": ours["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        named[f"visual.ln_pre.{kind}"] = ours[f"pre_layrnorm.{kind}"]
        named[f"visual.ln_post.{kind}"] = ours[f"post_layernorm.{kind}"]
        for layer in range(2):
            theirs, at = f"visual.transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            packed = [ours[f"{at}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            named[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(packed)
            named[f"{theirs}.attn.out_proj.{kind}"] = ours[f"{at}.self_attn.out_proj.{kind}"]
            named[f"{theirs}.mlp.c_fc.{kind}"] = ours[f"{at}.mlp.fc1.{kind}"]
            named[f"{theirs}.mlp.c_proj.{kind}"] = ours[f"{at}.mlp.fc2.{kind}"]
            named[f"{theirs}.ln_1.{kind}"] = ours[f"{at}.layer_norm1.{kind}"]
            named[f"{theirs}.ln_2.{kind}"] = ours[f"{at}.layer_norm2.{kind}"]
    return {key: tensor.clone() for key, tensor in named.items()}


def _clip_open_clip_folder(source: CLIPVisionModel, tmp: Path) -> Path:
    settings = {"model_cfg": {"quick_gelu": True, "vision_cfg": {"head_width": 64}}}
    (tmp / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(open_clip_names(source, tmp / "hf"), tmp / "open_clip_model.safetensors")
    return tmp


def _saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def _folder(model: Any, path: Path, **kwargs: Any) -> Path:
    model.save_pretrained(path, **kwargs)
    return path


CLIP_FORMATS: dict[str, Callable[[Any, Path], Path]] = {
    "CLIPVisionModel": lambda m, tmp: _folder(m, tmp / "f"),
    "CLIPVisionModel shards": lambda m, tmp: _folder(m, tmp / "f", max_shard_size="100KB"),
    "CLIPVisionModel bin": lambda m, tmp: save_bin(m, tmp / "f"),
    "CLIPModel": lambda m, tmp: _folder(whole_clip(m), tmp / "f"),
    "CLIPModel bin shards": lambda m, tmp: save_bin(whole_clip(m), tmp / "f", shards=3),
    "open_clip folder": _clip_open_clip_folder,
    "open_clip training checkpoint": lambda m, tmp: _saved(
        {"epoch": 3, "state_dict": {f"module.{k}": t for k, t in open_clip_names(m, tmp / "hf").items()}}, tmp / "e.pt"
    ),
    "OpenAI state dict": lambda m, tmp: _saved(
        {**open_clip_names(m, tmp / "hf"), "input_resolution": torch.tensor(VIEW)}, tmp / "ViT.pt"
    ),
}


@pytest.mark.parametrize("kind", CLIP_FORMATS)
def test_clip(tmp_path: Path, kind: str) -> None:
    source = clip_source()
    ours = load_clip(CLIP_FORMATS[kind](source, tmp_path), hidden_act="quick_gelu" if "training" in kind else None)
    assert ours.config.hidden_act == "quick_gelu"
    with torch.no_grad():
        close(clip_features(ours, pixels()), clip_reference(source))


def test_clip_activation_of_a_bare_state_dict(tmp_path: Path) -> None:
    source = clip_source("gelu")
    file = _saved(open_clip_names(source, tmp_path / "hf"), tmp_path / "laion.pt")
    with torch.no_grad():
        close(clip_features(load_clip(file), pixels()), clip_reference(source))
        other = clip_features(load_clip(file, hidden_act="quick_gelu"), pixels())
    assert (other - clip_reference(source)).abs().max() > 1e-3


# --- ConvNeXt ---


def convnext_source() -> ConvNextModel:
    config = ConvNextConfig(depths=(1, 2, 1, 1), hidden_sizes=(4, 8, 12, 20), layer_norm_eps=1e-6)
    return randomized(ConvNextModel(config))


def _trunk(source: nn.Module) -> Tensors:
    named = {f"visual.trunk.{key}": tensor for key, tensor in source.state_dict().items()}
    return {**named, "visual.head.proj.weight": torch.zeros(3, 20), "logit_scale": torch.zeros(())}


def _timm_folder(source: nn.Module, tmp: Path) -> Path:
    (tmp / "config.json").write_text(json.dumps({"architecture": "convnext_atto", "num_features": 20}))
    save_file({**source.state_dict(), "head.fc.weight": torch.zeros(3, 20)}, tmp / "model.safetensors")
    return tmp


CONVNEXT_FORMATS: dict[str, Callable[[Any, Path], Path]] = {
    "timm state dict": lambda m, tmp: _saved(m.state_dict(), tmp / "c.pth"),
    "timm folder": _timm_folder,
    "open_clip state dict": lambda m, tmp: _saved(_trunk(m), tmp / "open_clip_pytorch_model.bin"),
    "open_clip folder": lambda m, tmp: _saved(_trunk(m), tmp / "open_clip_pytorch_model.bin").parent,
}


@pytest.mark.parametrize("kind", CONVNEXT_FORMATS)
def test_convnext(tmp_path: Path, kind: str) -> None:
    source = convnext_source()
    ours = load_convnext(CONVNEXT_FORMATS[kind](source, tmp_path))
    assert ours.config.depths == [1, 2, 1, 1] and ours.config.layer_norm_eps == 1e-6
    with torch.no_grad():
        close(ours(pixels(size=64)), source(pixels(size=64)))


def test_convnext_norm_eps(tmp_path: Path) -> None:
    file = _saved(convnext_source().state_dict(), tmp_path / "c.pth")
    assert load_convnext(file, layer_norm_eps=1e-5).head["norm"].eps == 1e-5
    xxl = ConvNextModel(ConvNextConfig(depths=(0, 0, 0, 0), hidden_sizes=(384, 2, 2, 2))).state_dict()
    xxl |= {f"stages.{i}.blocks.0.gamma": torch.ones(1) for i in range(4)}
    assert read_convnext(_saved(xxl, tmp_path / "x.pth")).config.layer_norm_eps == 1e-5


# --- DINOv2 ---


def dinov2_source(side: int = GRID, **fields: Any) -> Dinov2Model:
    vit = {k: v for k, v in VIT.items() if k != "intermediate_size"}
    config = Dinov2Config(**{**vit, "image_size": side * PATCH, "use_swiglu_ffn": True, **fields})
    return randomized(Dinov2Model(config))


def dinov2_reference(source: Dinov2Model) -> Tensor:
    """The source's own output with its table resampled as DINOv2's code does it."""
    baked = Dinov2Model(type(source.config)(**{**source.config.to_dict(), "image_size": VIEW})).eval()
    state = source.state_dict()
    state["embeddings.position_embeddings"] = bake_position_table(state["embeddings.position_embeddings"], GRID)
    baked.load_state_dict(state)
    with torch.no_grad():
        return baked(pixel_values=pixels()).last_hidden_state


def hub_names(source: Dinov2Model, folder: Path) -> Tensors:
    """The source's weights under the names of DINOv2's own repository."""
    source.save_pretrained(folder)
    ours = Checkpoint(folder)
    named = {
        "cls_token": ours["embeddings.cls_token"],
        "mask_token": ours["embeddings.mask_token"],
        "pos_embed": ours["embeddings.position_embeddings"],
    }
    feed_forward = (
        {"w12": "weights_in", "w3": "weights_out"} if source.config.use_swiglu_ffn else {"fc1": "fc1", "fc2": "fc2"}
    )
    for kind in ("weight", "bias"):
        named[f"patch_embed.proj.{kind}"] = ours[f"embeddings.patch_embeddings.projection.{kind}"]
        named[f"norm.{kind}"] = ours[f"layernorm.{kind}"]
        for layer in range(2):
            theirs, at = f"blocks.{layer}", f"encoder.layer.{layer}"
            parts = [ours[f"{at}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            named[f"{theirs}.attn.qkv.{kind}"] = torch.cat(parts)
            named[f"{theirs}.attn.proj.{kind}"] = ours[f"{at}.attention.output.dense.{kind}"]
            for name, name_of_ours in feed_forward.items():
                named[f"{theirs}.mlp.{name}.{kind}"] = ours[f"{at}.mlp.{name_of_ours}.{kind}"]
            for norm in ("norm1", "norm2"):
                named[f"{theirs}.{norm}.{kind}"] = ours[f"{at}.{norm}.{kind}"]
    for layer in range(2):
        for scale in (1, 2):
            named[f"blocks.{layer}.ls{scale}.gamma"] = ours[f"encoder.layer.{layer}.layer_scale{scale}.lambda1"]
    return {key: tensor.clone() for key, tensor in named.items()}


def _classifier(source: Dinov2Model) -> Dinov2ForImageClassification:
    model = Dinov2ForImageClassification(source.config)
    model.dinov2.load_state_dict(source.state_dict())
    return model


DINOV2_FORMATS: dict[str, Callable[[Any, Path], Path]] = {
    "Dinov2Model": lambda m, tmp: _folder(m, tmp / "f"),
    "Dinov2Model bin": lambda m, tmp: save_bin(m, tmp / "f"),
    "Dinov2ForImageClassification": lambda m, tmp: _folder(_classifier(m), tmp / "f"),
    "own state dict": lambda m, tmp: _saved(hub_names(m, tmp / "f"), tmp / "dinov2.pth"),
}


@pytest.mark.parametrize(("side", "swiglu"), [(GRID, True), (7, True), (7, False)])
@pytest.mark.parametrize("kind", DINOV2_FORMATS)
def test_dinov2(tmp_path: Path, kind: str, side: int, swiglu: bool) -> None:
    source = dinov2_source(side, use_swiglu_ffn=swiglu)
    ours = load_dinov2(DINOV2_FORMATS[kind](source, tmp_path), grid_size=GRID)
    with torch.no_grad():
        close(ours(pixel_values=pixels()).last_hidden_state, dinov2_reference(source))


# --- BLIP-2 ---


def blip2_source(cls: Any, text_half: bool = False) -> Any:
    qformer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    opt = {"model_type": "opt", "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Blip2Config(
        vision_config={**VIT, "hidden_size": 32},
        qformer_config={**qformer, "encoder_hidden_size": 32, "vocab_size": 20, "use_qformer_text_input": text_half},
        text_config={**opt, "vocab_size": 10, "word_embed_proj_dim": 8, "max_position_embeddings": 16},
        num_query_tokens=3,
        image_text_hidden_size=8,
    )
    return randomized(cls(config))


def blip2_reference(source: Any) -> Tensor:
    with torch.no_grad():
        patches = source.vision_model(pixel_values=pixels()).last_hidden_state
        queries = source.query_tokens.expand(len(patches), -1, -1)
        out = source.qformer(query_embeds=queries, query_length=3, encoder_hidden_states=patches)
    return out.last_hidden_state


@pytest.mark.parametrize(
    ("cls", "text_half", "shards"),
    [
        (Blip2Model, False, 0),
        (Blip2ForConditionalGeneration, False, 0),
        (Blip2ForConditionalGeneration, False, 2),
        (Blip2ForImageTextRetrieval, False, 1),
        (Blip2ForImageTextRetrieval, True, 0),
    ],
)
def test_blip2(tmp_path: Path, cls: Any, text_half: bool, shards: int) -> None:
    source = blip2_source(cls, text_half)
    folder = save_bin(source, tmp_path, shards) if shards else _folder(source, tmp_path)
    with torch.no_grad():
        close(load_blip2(folder)(pixels()), blip2_reference(source))


# --- language models and the whole ---


def llama(**fields: Any) -> LlamaForCausalLM:
    return randomized(LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TEXT.items() if k != "model_type"}, **fields)))


LANGUAGE_MODELS: dict[str, Callable[[Path], Any]] = {
    "llama": lambda tmp: (m := llama(), _folder(m, tmp))[0],
    "llama shards": lambda tmp: (m := llama(), _folder(m, tmp, max_shard_size="20KB"))[0],
    "llama bin": lambda tmp: (m := llama(), save_bin(m, tmp))[0],
    "llama tied": lambda tmp: (m := llama(tie_word_embeddings=True), _folder(m, tmp))[0],
    "gpt2": lambda tmp: (
        m := randomized(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64))),
        _folder(m, tmp),
    )[0],
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_model_in_the_whole(tmp_path: Path, kind: str) -> None:
    source = LANGUAGE_MODELS[kind](tmp_path / "llm")
    model = assemble(
        language_model=tmp_path / "llm",
        convnext=_saved(convnext_source().state_dict(), tmp_path / "c.pth"),
        preset="sphinx-1k",
        vision=VIEWS,
    )
    ids = torch.tensor([[1, 7, 9, 3]])
    with torch.no_grad():
        close(model(input_ids=ids).logits, source(input_ids=ids).logits)
    assert model.config.image_token_id == source.config.vocab_size
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == bool(source.config.tie_word_embeddings)
    assert model.generation_config.eos_token_id == source.generation_config.eos_token_id
    model.save_pretrained(tmp_path / "sphinx")
    again = SphinxForConditionalGeneration.from_pretrained(tmp_path / "sphinx")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@functools.cache
def saved_parts() -> tuple[dict[str, Any], Path]:
    """One module of each kind, and a folder with the checkpoints they were saved to."""
    sources: dict[str, Any] = {
        "clip": clip_source(),
        "convnext": convnext_source(),
        "dinov2": dinov2_source(7),
        "blip2": blip2_source(Blip2Model),
        "language_model": llama(),
    }
    folder = Path(tempfile.mkdtemp(prefix="sphinx-fast-test-"))
    _folder(whole_clip(sources["clip"]), folder / "clip")
    _saved(_trunk(sources["convnext"]), folder / "convnext.bin")
    _saved(hub_names(sources["dinov2"], folder / "dinov2"), folder / "dinov2.pth")
    _folder(sources["blip2"], folder / "blip2")
    _folder(sources["language_model"], folder / "language_model")
    return sources, folder


@pytest.fixture
def public_parts(tmp_path: Path) -> dict[str, Any]:
    """`sources`, and `paths` of their checkpoints, to damage freely."""
    sources, folder = saved_parts()
    shutil.copytree(folder, tmp_path / "parts")
    files = {"convnext": "convnext.bin", "dinov2": "dinov2.pth"}
    return {"sources": sources, "paths": {name: tmp_path / "parts" / files.get(name, name) for name in sources}}


def whole_inputs(model: SphinxForConditionalGeneration) -> dict[str, Tensor]:
    count = model.config.vision_config.tokens_per_picture
    ids = torch.tensor([[1] + [model.config.image_token_id] * count + [5, 6]])
    return {"input_ids": ids, "pixel_values": pixels(model.config.vision_config.num_views)}


@torch.no_grad()
def test_the_whole_gives_what_its_parts_give(public_parts: dict[str, Any], tmp_path: Path) -> None:
    model = assemble(**public_parts["paths"], preset="sphinx-1k", vision=VIEWS)
    vision = model.config.vision_config
    assert (vision.num_views, vision.tokens_per_picture, vision.patch_channels) == (5, 5 * (2 + 3 + 17), 276)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    tower, sources = model.model.vision_tower, public_parts["sources"]
    close(clip_features(tower.clip, pixels()), clip_reference(sources["clip"]))
    close(tower.convnext(pixels()), sources["convnext"](pixels()))
    close(tower.dinov2(pixel_values=pixels()).last_hidden_state, dinov2_reference(sources["dinov2"]))
    close(tower.qformer(pixels()), blip2_reference(sources["blip2"]))
    logits = model(**whole_inputs(model)).logits
    assert torch.isfinite(logits).all()

    model.save_pretrained(tmp_path / "sphinx")
    again = SphinxForConditionalGeneration.from_pretrained(tmp_path / "sphinx")
    assert torch.equal(again(**whole_inputs(again)).logits, logits)


def test_the_whole_in_bfloat16_is_one_dtype(public_parts: dict[str, Any]) -> None:
    model = assemble(**public_parts["paths"], vision=VIEWS, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**whole_inputs(model)).logits.dtype == torch.bfloat16


def test_the_fusion_is_new_trainable_and_seeded(public_parts: dict[str, Any]) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = assemble(**public_parts["paths"], vision=VIEWS)
        states.append(model.model.fusion.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["view_start"], states[2]["view_start"])
    assert states[0]["view_start"].abs().sum() > 0
    model(**whole_inputs(model), labels=whole_inputs(model)["input_ids"].clamp(max=399)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.fusion.parameters())


def test_a_part_left_out_is_absent(public_parts: dict[str, Any]) -> None:
    paths = {name: path for name, path in public_parts["paths"].items() if name not in ("clip", "blip2")}
    model = assemble(**paths, vision={**VIEWS, "view_tags": False})
    assert model.model.vision_tower.clip is None and model.model.vision_tower.qformer is None
    assert model.config.vision_config.tokens_per_view == 17


# --- what is refused ---


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a weight file or a JSON file in place."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    elif path.suffix == ".safetensors":
        state = {key: tensor.clone() for key, tensor in Checkpoint(path).items()}
        change(state)
        save_file(state, path)
    else:
        state = torch.load(path, weights_only=True)
        change(state)
        path.unlink()
        torch.save(state, path)


class Sneaky:
    """An object that would run code when unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this must never be printed",))


BLOCK = "visual.trunk.stages.1.blocks.0"
DAMAGED: dict[str, tuple[Callable[[dict[str, Path]], Any], str]] = {
    "no such path": (lambda p: p.update(clip=p["clip"] / "nowhere"), r"clip/nowhere: no such file"),
    "an empty folder": (
        lambda p: [(p["clip"] / "model.safetensors").unlink()],
        r"clip: none of model\.safetensors\.index\.json, .* is here",
    ),
    "another architecture": (lambda p: p.update(clip=p["blip2"]), r"blip2: model_type is 'blip-2', expected clip or"),
    "a language model as DINOv2": (
        lambda p: p.update(dinov2=p["language_model"]),
        r"language_model: model_type is 'llama'",
    ),
    "registers": (
        lambda p: edit(p["dinov2"], lambda w: w.update(register_tokens=torch.zeros(1, 4, 128))),
        r"dinov2\.pth: unknown DINOv2 key register_tokens",
    ),
    "a table that is not square": (
        lambda p: edit(p["dinov2"], lambda w: w.update(pos_embed=torch.zeros(1, 12, 128))),
        r"dinov2\.pth: position table of 11 patches is not square",
    ),
    "no table": (lambda p: edit(p["dinov2"], lambda w: w.pop("pos_embed")), r"dinov2\.pth: pos_embed is missing"),
    "a DINOv2 weight too few": (
        lambda p: edit(p["dinov2"], lambda w: w.pop("blocks.1.norm2.bias")),
        r"dinov2\.pth: nothing in this checkpoint gives encoder\.layer\.1\.norm2\.bias",
    ),
    "broken JSON": (lambda p: (p["clip"] / "config.json").write_text("{"), r"clip/config\.json: not JSON"),
    "JSON of nonsense": (
        lambda p: edit(p["clip"] / "config.json", lambda c: c["vision_config"].update(hidden_size="wide")),
        r"clip/config\.json: Validation error for field 'hidden_size'",
    ),
    "a CLIP weight too many": (
        lambda p: edit(p["clip"] / "model.safetensors", lambda w: w.update({"vision_model.bogus": torch.zeros(1)})),
        r"clip/model\.safetensors: unknown key vision_model\.bogus",
    ),
    "a CLIP weight of another shape": (
        lambda p: edit(
            p["clip"] / "model.safetensors", lambda w: w.update({"vision_model.post_layernorm.bias": torch.zeros(3)})
        ),
        r"clip/model\.safetensors: vision_model\.post_layernorm\.bias gives .* the shape \[3\], expected \[128\]",
    ),
    "CLIP of another picture size": (
        lambda p: [
            edit(p["clip"] / "config.json", lambda c: c["vision_config"].update(image_size=48)),
        ],
        r"clip: does not fit the views: clip_config: image_size 48",
    ),
    "CLIP of another patch size": (
        lambda p: edit(p["clip"] / "config.json", lambda c: c["vision_config"].update(patch_size=16)),
        r"clip: does not fit the views: clip_config: .*patch_size 16",
    ),
    "truncated": (
        lambda p: p["convnext"].write_bytes(p["convnext"].read_bytes()[:5000]),
        r"convnext\.bin: damaged or not a weight file",
    ),
    "code inside": (lambda p: [p["convnext"].unlink(), torch.save({"x": Sneaky()}, p["convnext"])], r"bin: "),
    "not tensors": (lambda p: [p["convnext"].unlink(), torch.save({"x": 1}, p["convnext"])], r"bin: x is int"),
    "another model's state dict": (
        lambda p: p.update(convnext=p["dinov2"]),
        r"dinov2\.pth: stem\.0\.weight is missing",
    ),
    "a ConvNeXt key too many": (
        lambda p: edit(p["convnext"], lambda w: w.update({f"{BLOCK}.grn.weight": torch.zeros(1)})),
        rf"bin: unknown key {BLOCK}\.grn\.weight".replace("blocks.0", r"blocks\.0"),
    ),
    "a ConvNeXt weight of another shape": (
        lambda p: edit(p["convnext"], lambda w: w.update({f"{BLOCK}.gamma": torch.zeros(3)})),
        r"bin: visual\.trunk\.stages\.1\.blocks\.0\.gamma gives .* the shape \[3\], expected \[8\]",
    ),
    "no queries": (
        lambda p: edit(p["blip2"] / "model.safetensors", lambda w: w.pop("query_tokens")),
        r"blip2: query_tokens has shape \[0\]",
    ),
    "a Q-Former weight too few": (
        lambda p: edit(p["blip2"] / "model.safetensors", lambda w: w.pop("qformer.layernorm.bias")),
        r"blip2: nothing in this checkpoint gives qformer\.layernorm\.bias",
    ),
    "BLIP-2 of another picture size": (
        lambda p: edit(p["blip2"] / "config.json", lambda c: c["vision_config"].update(image_size=364)),
        r"blip2: does not fit the views: qformer_vision_config: image_size 364",
    ),
    "no language model": (lambda p: p.update(language_model=p["dinov2"]), r"dinov2\.pth/config\.json: no such file"),
    "no causal language model": (lambda p: p.update(language_model=p["clip"]), r"clip: "),
    "a language model's weight too few": (
        lambda p: edit(p["language_model"] / "model.safetensors", lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        r"language_model: nothing in this checkpoint gives model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "a language model of another shape": (
        lambda p: edit(p["language_model"] / "config.json", lambda c: c.update(intermediate_size=50)),
        r"language_model: ",
    ),
    "no encoder at all": (
        lambda p: [p.pop(name) for name in ("clip", "convnext", "dinov2")],
        r"give at least one of clip, convnext and dinov2",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line_naming_file_and_key(public_parts: dict[str, Any], case: str, capfd: Any) -> None:
    damage, message = DAMAGED[case]
    paths = public_parts["paths"]
    damage(paths)
    with pytest.raises(WeightsError, match=message) as caught:
        assemble(**paths, vision=VIEWS)
    assert "\n" not in str(caught.value)
    assert "must never" not in capfd.readouterr().out


def test_shards_that_are_missing_or_point_elsewhere(tmp_path: Path) -> None:
    folder = save_bin(clip_source(), tmp_path / "f", shards=2)
    index = folder / "pytorch_model.bin.index.json"
    name = json.loads(index.read_text())["weight_map"]["embeddings.class_embedding"]
    (folder / name).rename(tmp_path / "elsewhere.bin")
    with pytest.raises(WeightsError, match=rf"{name}: no such file"):
        read_clip(folder)
    edit(index, lambda c: c["weight_map"].update({"embeddings.class_embedding": "../elsewhere.bin"}))
    with pytest.raises(WeightsError, match=r"'\.\./elsewhere\.bin' is not a file name"):
        read_clip(folder)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="no weight_map"):
        read_clip(folder)


def test_an_output_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    config = PhiConfig(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    PhiForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="output head has a bias"):
        load_language_model(tmp_path)


def test_reading_a_file_loads_no_weight_into_a_module(tmp_path: Path) -> None:
    """`read_*` is what a user asks for the widths with."""
    part = read_dinov2(_saved(hub_names(dinov2_source(), tmp_path / "d"), tmp_path / "d.pth"), grid_size=GRID)
    assert (part.config.hidden_size, part.config.num_hidden_layers, part.config.num_attention_heads) == (128, 2, 2)
