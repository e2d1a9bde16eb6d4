"""The importer of released folders: parity with the reference, and one clear line for every bad folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import GOLDEN, converted, reshard
from transformers import AutoModelForImageTextToText, AutoProcessor

from sphinx_fast import Sphinx
from sphinx_fast.weights.accessory import convert
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.layout import on_disk_shapes
from sphinx_fast.weights.released import rotate_half_layout

FOLDERS = ["llama_ens", "llama_ens5"]
TOLERANCE = 1e-4  # relative, fp32: what the reference tensors ask for


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours - expected).norm() / expected.norm())


@pytest.fixture(params=FOLDERS)
def golden(request: pytest.FixtureRequest) -> Any:
    """(model, processor, expected tensors, cases) of one golden folder."""
    folder = converted(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    cases = json.loads((GOLDEN / request.param / "cases.json").read_text())["cases"]
    expected = load_file(GOLDEN / request.param / "expected.safetensors")
    return model, AutoProcessor.from_pretrained(folder), expected, cases


@torch.no_grad()
def test_golden_tensors_and_greedy_ids(golden: Any) -> None:
    model, processor, expected, cases = golden
    for i, case in enumerate(cases):
        inputs = processor(images=[Image.open(GOLDEN / case["photo"])], text=[case["prompt"]], return_tensors="pt")
        ids = inputs["input_ids"][0]
        assert [t for t in ids.tolist() if t != model.config.image_token_id] == case["input_ids"]
        features = model.model.vision_tower(inputs["pixel_values"])
        assert relative(features.patches, expected[f"{i}.visual_concat"]) < TOLERANCE
        assert relative(features.queries, expected[f"{i}.qformer_out"]) < TOLERANCE
        assert relative(model.model.fusion.view_tokens(features), expected[f"{i}.view_tokens"]) < TOLERANCE
        logits = expected[f"{i}.logits"]
        assert relative(model(**inputs).logits[0, -len(logits) :], logits) < TOLERANCE
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        wanted = case["greedy_ids"]
        assert out == (wanted[: wanted.index(2) + 1] if 2 in wanted else wanted)


@torch.no_grad()
def test_rows_with_and_without_a_picture_in_one_batch(golden: Any) -> None:
    model, processor, _, cases = golden
    pictures = [Image.open(GOLDEN / case["photo"]) for case in cases]
    texts = [cases[0]["prompt"], "### Human: Hello\n### Assistant:", cases[1]["prompt"]]
    batch = processor(images=[[pictures[0]], None, [pictures[1]]], text=texts, padding=True, return_tensors="pt")
    together = model(**batch).logits[:, -1]
    for row, images in enumerate([[pictures[0]], None, [pictures[1]]]):
        alone = processor(images=images, text=[texts[row]], return_tensors="pt")
        assert relative(together[row], model(**alone).logits[0, -1]) < 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_ask_text_is_the_reference_text(name: str) -> None:
    sphinx = Sphinx.from_pretrained(converted(name), device="cpu", dtype=torch.float32)
    for case in json.loads((GOLDEN / name / "cases.json").read_text())["cases"]:
        photo = GOLDEN / case["photo"]
        answer = sphinx.ask(photo, case["question"], max_new_tokens=16, temperature=0.0)
        assert answer == case["response"]
        assert "".join(sphinx.stream(photo, case["question"], max_new_tokens=16)) == case["response"]


def released_copy(tmp_path: Path, name: str = "llama_ens") -> Path:
    """A golden folder to damage."""
    folder = tmp_path / "released"
    shutil.copytree(GOLDEN / name, folder)
    return folder


@pytest.mark.parametrize("shards", [2, 4])
def test_any_number_of_shards_gives_the_same_file(tmp_path: Path, shards: int) -> None:
    folder = released_copy(tmp_path)
    reshard(folder, shards)
    convert(folder, tmp_path / "new", progress=False)
    ours = load_file(tmp_path / "new" / "model.safetensors")
    whole = load_file(converted("llama_ens") / "model.safetensors")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_written_names_are_those_of_save_pretrained(tmp_path: Path) -> None:
    folder = converted("llama_ens")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    saved, written = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == written.keys() == on_disk_shapes(model.config).keys()
    assert all(torch.equal(saved[name], written[name]) for name in saved)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 1, 6), (3, 3, 2)])
def test_rope_layout_gives_the_attention_of_interleaved_pairs(heads: int, kv_heads: int, head_dim: int) -> None:
    """Scores q.k after interleaved RoPE (the released form) equal those after rotate-half of permuted weights."""
    generator = torch.Generator().manual_seed(0)
    dim, positions = 16, 7
    x = torch.randn(positions, dim, generator=generator, dtype=torch.float64)
    angle = torch.outer(
        torch.arange(positions), 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    )
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def interleaved(weight: torch.Tensor, count: int) -> torch.Tensor:
        v = (x @ weight.T).view(positions, count, head_dim)
        even, odd = v[..., 0::2], v[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def rotate_half(weight: torch.Tensor, count: int) -> torch.Tensor:
        v = (x @ rotate_half_layout(weight, count).T).view(positions, count, head_dim)
        first, second = v.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    wq = torch.randn(heads * head_dim, dim, generator=generator, dtype=torch.float64)
    wk = torch.randn(kv_heads * head_dim, dim, generator=generator, dtype=torch.float64)
    group = heads // kv_heads

    def scores(rotate: Any) -> torch.Tensor:
        q, k = rotate(wq, heads), rotate(wk, kv_heads).repeat_interleave(group, dim=1)
        return torch.einsum("qhd,khd->hqk", q, k)

    torch.testing.assert_close(scores(rotate_half), scores(interleaved), rtol=1e-12, atol=1e-12)


def test_dtype_as_stored_and_as_asked(tmp_path: Path) -> None:
    convert(GOLDEN / "llama_ens", tmp_path / "half", dtype=torch.bfloat16, progress=False)
    halved, stored = (
        load_file(tmp_path / "half" / "model.safetensors"),
        load_file(converted("llama_ens") / "model.safetensors"),
    )
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert all(torch.equal(halved[name], stored[name].bfloat16()) for name in stored)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def edit_weights(folder: Path, change: Any) -> None:
    file = next(folder.glob("consolidated.*.pth"))
    content = torch.load(file, weights_only=True)
    change(content["model"])
    file.unlink()
    torch.save(content, file)


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    content = json.loads(file.read_text())
    content.update(changes)
    file.unlink()
    file.write_text(json.dumps(content))


class Sneaky:
    """An object that would run code when unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this must never be printed",))


def _add(key: str) -> Any:
    return lambda folder: edit_weights(folder, lambda w: w.update({key: torch.zeros(3)}))


def _drop(key: str) -> Any:
    return lambda folder: edit_weights(folder, lambda w: w.pop(key))


def _reshape(key: str) -> Any:
    return lambda folder: edit_weights(folder, lambda w: w.update({key: w[key][1:].clone()}))


BAD_FOLDERS: dict[str, tuple[Any, str]] = {
    "unknown llm key": (
        _add("llma.layers.0.attention.wz.weight"),
        r"\.pth: unknown key llma\.layers\.0\.attention\.wz",
    ),
    "unknown top key": (_add("llma.bogus"), r"\.pth: unknown key llma\.bogus"),
    "unknown clip key": (_add("llma.clip.visual.bogus"), r"unknown CLIP key visual\.bogus"),
    "unknown convnext key": (_add("llma.openclip_convnext_xxl.bogus"), r"unknown ConvNeXt key bogus"),
    "unknown dino key": (_add("llma.dinov2_vitg14.blocks.0.bogus.weight"), r"unknown DINOv2 key blocks\.0\.bogus"),
    "unknown qformer key": (_add("llma.qformer.bogus"), r"unknown key llma\.qformer\.|unknown Q-Former key bogus"),
    "layer too many": (_add("llma.layers.9.attention_norm.weight"), r"unknown key llma\.layers\.9\.attention_norm"),
    "missing weight": (_drop("llma.layers.1.ffn_norm.weight"), r"layers\.1\.post_attention_layernorm"),
    "missing encoder weight": (_drop("llma.dinov2_vitg14.norm.bias"), r"dinov2\.layernorm\.bias"),
    "no projection": (_drop("llma.visual_proj.0.weight"), r"llma\.visual_proj\.0\.weight is missing"),
    "wrong shape": (
        _reshape("llma.layers.0.feed_forward.w1.weight"),
        r"feed_forward\.w1\.weight has shape \[175, 64\]",
    ),
    "wrong norm": (_reshape("llma.norm.weight"), r"llma\.norm\.weight has shape \[63\], expected \[64\]"),
    "wrong args": (lambda f: edit_json(f, "config.json", n_layers=3), r"nothing in this checkpoint gives .*layers\.2"),
    "unknown type": (
        lambda f: edit_json(f, "meta.json", llama_type="mixtral_sparse_ens"),
        r"'mixtral_sparse_ens' is not",
    ),
    "no meta": (lambda f: (f / "meta.json").unlink(), r"no meta\.json with a llama_type"),
    "broken json": (
        lambda f: [(f / "config.json").unlink(), (f / "config.json").write_text("{")],
        r"config\.json: not JSON",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), r"tokenizer\.model: no such file"),
    "not a tokenizer": (
        lambda f: [(f / "tokenizer.model").unlink(), (f / "tokenizer.model").write_bytes(b"\x0a\xff\xff")],
        r"tokenizer\.model is not a SentencePiece model",
    ),
    "no shards": (lambda f: (f / "consolidated.00-of-01.model.pth").unlink(), r"no consolidated"),
    "shard missing": (
        lambda f: (f / "consolidated.00-of-01.model.pth").rename(f / "consolidated.01-of-02.model.pth"),
        r"consolidated\.00-of-02\.model\.pth: shard is missing",
    ),
    "truncated": (
        lambda f: [
            (f / "consolidated.00-of-01.model.pth").unlink(),
            (f / "consolidated.00-of-01.model.pth").write_bytes(
                (GOLDEN / "llama_ens" / "consolidated.00-of-01.model.pth").read_bytes()[:100_000]
            ),
        ],
        r"consolidated\.00-of-01\.model\.pth: damaged",
    ),
    "code inside": (
        lambda f: [
            (f / "consolidated.00-of-01.model.pth").unlink(),
            torch.save({"model": {"x": Sneaky()}}, f / "consolidated.00-of-01.model.pth"),
        ],
        r"consolidated\.00-of-01\.model\.pth: ",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_one_line_and_nothing_is_written(tmp_path: Path, case: str, capfd: Any) -> None:
    damage, message = BAD_FOLDERS[case]
    folder = released_copy(tmp_path)
    damage(folder)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(WeightsError, match=message) as caught:
        convert(folder, tmp_path / "new", progress=False)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert "must never" not in capfd.readouterr().out


def test_missing_folder_and_existing_target(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "new", progress=False)
    with pytest.raises(WeightsError, match="exists already"):
        convert(GOLDEN / "llama_ens", tmp_path, progress=False)


def test_a_key_in_one_shard_only(tmp_path: Path) -> None:
    folder = released_copy(tmp_path)
    reshard(folder, 2)
    edit_weights(folder, lambda w: w.pop("llma.norm.weight"))
    with pytest.raises(WeightsError, match=r"llma\.norm\.weight is in this shard only"):
        convert(folder, tmp_path / "new", progress=False)
