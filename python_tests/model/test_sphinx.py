"""The model as transformers uses it: round trips, caches, training hooks, adapters, any language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import GOLDEN, converted, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForImageTextToText, pipeline

from sphinx_fast import SphinxForConditionalGeneration, SphinxModel


def sample(model: SphinxForConditionalGeneration, rows: int = 2, text: int = 9, seed: int = 0) -> dict[str, Any]:
    """Ids [rows, 1 + visual + text] and views of as many pictures."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    ids = torch.full((rows, 1 + vision.tokens_per_picture + text), model.config.image_token_id)
    ids[:, 0] = 1
    ids[:, 1 + vision.tokens_per_picture :] = torch.randint(3, 400, (rows, text), generator=generator)
    size = vision.view_size
    pixels = torch.randn(rows * vision.num_views, 3, size, size, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "num_image_patches": torch.full((rows,), vision.num_views)}


@pytest.fixture(scope="module")
def model() -> SphinxForConditionalGeneration:
    return tiny_model()


@torch.no_grad()
def test_pictures_reach_the_logits_of_their_row_only(model: SphinxForConditionalGeneration) -> None:
    inputs = sample(model)
    logits = model(**inputs).logits
    inputs["pixel_values"][: model.config.vision_config.num_views] *= -1
    changed = model(**inputs).logits
    assert (changed[0] - logits[0]).abs().max() > 1e-2
    torch.testing.assert_close(changed[1], logits[1])


@torch.no_grad()
def test_save_and_load_give_the_same_logits(model: SphinxForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(again, SphinxForConditionalGeneration)
    inputs = sample(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(base, SphinxModel)
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_save_in_shards_and_load(model: SphinxForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation_is_the_same_with_any_cache(model: SphinxForConditionalGeneration, cache: str | None) -> None:
    inputs = sample(model)
    ids = inputs["input_ids"]
    expected = ids
    for _ in range(6):  # the definition: the whole row again for every token
        logits = model(**{**inputs, "input_ids": expected}).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    options: dict[str, Any] = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
    assert out.tolist() == expected.tolist()


def test_loss_is_the_mean_cross_entropy_of_the_labels(model: SphinxForConditionalGeneration) -> None:
    inputs = sample(model)
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    output = model(**inputs, labels=labels)
    picked = output.logits[:, -6:-1].double().log_softmax(-1).gather(-1, labels[:, -5:, None])
    assert output.loss.item() == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.model.language_model.gradient_checkpointing
        model.train()
        inputs = sample(model)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 400, -100)
        torch.manual_seed(0)  # the Q-Former has dropout
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert "model.fusion.view_start" in plain and "model.vision_tower.convnext.stem.0.weight" in plain
    for name in plain:
        if name.startswith(("model.language_model", "model.fusion", "lm_head")):
            torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_device_map(model: SphinxForConditionalGeneration, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    inputs = sample(model)
    for device_map in ("auto", {"": "cpu"}):
        mapped = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map).eval()
        torch.testing.assert_close(mapped(**inputs).logits, model(**inputs).logits)
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path,
        device_map={
            "model.vision_tower": "cpu",
            "model.fusion": "cpu",
            "model.language_model": "disk",
            "lm_head": "cpu",
        },
        offload_folder=tmp_path / "offload",
    ).eval()
    torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits)


def test_lora_on_the_language_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = r".*language_model\..*\.(q_proj|v_proj)"
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("language_model" in name and "lora" in name for name in trained)
    inputs = sample(model.get_base_model())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 400, -100)
    model(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    with torch.no_grad():
        merged = model.eval().merge_and_unload()(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, merged, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged, tiny_model()(**inputs).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "qwen2", "num_key_value_heads": 2},
        {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": None},
        {"model_type": "gpt_neox"},
    ],
    ids=lambda text: text["model_type"],
)
def test_any_causal_language_model(text: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(tiny_config(text=text))
    inputs = sample(model)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again.model.language_model) is type(model.model.language_model)
    assert again.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() == out.tolist()


@torch.no_grad()
def test_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(text={"tie_word_embeddings": True}))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.get_input_embeddings().weight
    inputs = sample(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_visual_tokens_once_and_image_features_per_picture(model: SphinxForConditionalGeneration) -> None:
    inputs = sample(model)
    tokens = model.model.visual_tokens(inputs["pixel_values"])
    per_picture = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [tuple(part.shape) for part in per_picture] == [(model.config.vision_config.tokens_per_picture, 32)] * 2
    assert torch.equal(torch.cat(per_picture), tokens.flatten(0, 1))
    again = model(input_ids=inputs["input_ids"], visual_tokens=tokens).logits
    assert torch.equal(again, model(**inputs).logits)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    ({"pixel_values": torch.zeros(5, 3, 32, 32)}, "views|placeholders"),
    ({"pixel_values": torch.zeros(10, 3, 16, 32)}, r"expected \[views, 3, 32, 32\], got \[10, 3, 16, 32\]"),
    ({"pixel_values": torch.zeros(10, 1, 32, 32)}, "was this picture cut for another variant"),
    ({"num_image_patches": torch.tensor([5, 6])}, "holds 10 views, but 11 are expected"),
    ({"input_ids": torch.full((2, 20), 400)}, "40 visual placeholders, but the pictures give 220"),
    ({"visual_tokens": torch.zeros(10, 22, 32)}, "pixel_values or visual_tokens, not both"),
]


def scattered(model: SphinxForConditionalGeneration) -> dict[str, Any]:
    """Two pictures in one row, a word between two of the second one's tokens, and a row without a picture."""
    inputs = sample(model, rows=2, text=5)
    picture, size = model.config.vision_config.tokens_per_picture, inputs["pixel_values"].shape[0]
    row = [1, 7, *[model.config.image_token_id] * (picture + 3), 9, *[model.config.image_token_id] * (picture - 3), 5]
    ids = torch.tensor([row, [1, *range(3, len(row) + 2)]])
    assert size == 2 * model.config.vision_config.num_views
    return {"input_ids": ids, "pixel_values": inputs["pixel_values"]}


@pytest.mark.parametrize(
    "make", [sample, lambda model: sample(model, rows=1), scattered], ids=["rows", "one", "broken"]
)
def test_tokens_written_in_place_are_those_that_are_spliced(
    model: SphinxForConditionalGeneration, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, fusion = make(model), model.model.fusion
    model.model.vision_tower.requires_grad_(False)  # so that it computes the same with gradients as without
    written: list[bool] = []
    forward = type(fusion).forward

    def spy(self: Any, features: Any, out: Any = None, first: Any = None) -> Any:
        written.append(out is not None)
        return forward(self, features, out, first)

    monkeypatch.setattr(type(fusion), "forward", spy)
    expected = model(**inputs)  # gradients are wanted: tokens are made, then spliced
    with torch.no_grad():
        outputs = model(**inputs)
    assert written == [False, make is not scattered]
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.image_hidden_states, expected.image_hidden_states)
    if make is not scattered:
        with torch.no_grad():
            embeddings, tokens = model.model.embed(inputs["input_ids"], inputs["pixel_values"])
        shared = tokens.untyped_storage().data_ptr() == embeddings.untyped_storage().data_ptr()
        assert shared == (inputs["input_ids"].shape[0] == 1), "one run of tokens is not copied"


@torch.no_grad()
def test_too_few_placeholders_are_refused_before_anything_is_written(model: SphinxForConditionalGeneration) -> None:
    inputs = sample(model, rows=1)
    inputs["input_ids"][0, 1] = 5
    count = model.config.vision_config.tokens_per_picture
    with pytest.raises(ValueError, match=rf"has {count - 1} visual placeholders, but the pictures give {count}"):
        model(**inputs)


@pytest.mark.parametrize(("change", "message"), BAD)
def test_inputs_that_do_not_fit_are_refused(
    model: SphinxForConditionalGeneration, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{**sample(model), **change})


def test_pipeline_image_text_to_text() -> None:
    pipe = pipeline("image-text-to-text", model=str(converted("llama_ens")), device="cpu")
    picture = Image.open(GOLDEN / "cat.png")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the image?"}]
    messages = [{"role": "user", "content": content}]
    out = pipe(text=messages, max_new_tokens=16, return_full_text=False)
    case = json.loads((GOLDEN / "llama_ens" / "cases.json").read_text())["cases"][0]
    assert out[0]["generated_text"] == case["response"]
