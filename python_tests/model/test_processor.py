"""The processor: placeholders where they belong, batches, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GOLDEN, converted
from transformers import AutoImageProcessor, AutoProcessor

from sphinx_fast import SphinxProcessor
from sphinx_fast.model.conversation import SYSTEM, conversation_prompt, cut_at_stop, held_back
from sphinx_fast.model.image_processor import SphinxImageProcessor, SphinxImageProcessorReference

CAT = GOLDEN / "cat.png"


@pytest.fixture(scope="module")
def processor() -> SphinxProcessor:
    """Five views of 291 positions."""
    return AutoProcessor.from_pretrained(converted("llama_ens5"))


def test_shapes_dtypes_and_place_of_the_visual_positions(processor: SphinxProcessor) -> None:
    inputs = processor(images=[Image.open(CAT)], text=["What is this?"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (5, 3, 224, 224)
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["num_image_patches"].tolist() == [5]
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == 1 and ids[1 : 1 + 1455] == [400] * 1455 and 400 not in ids[1456:]
    assert inputs["attention_mask"].sum() == len(ids)


def test_image_marks_say_where(processor: SphinxProcessor) -> None:
    ids = processor(images=[CAT, CAT], text="a <image> b <image>")["input_ids"][0]
    plain = processor.tokenizer("a ", add_special_tokens=False)["input_ids"]
    assert ids[1 : 1 + len(plain)] == plain
    assert ids.count(400) == 2 * 1455 and ids[-1] == 400


def test_batches_pad_on_the_left_and_rows_may_have_no_picture(processor: SphinxProcessor) -> None:
    batch = processor(images=[[CAT], []], text=["What?", "Hello"], padding=True, return_tensors="pt")
    assert batch["num_image_patches"].tolist() == [5]
    assert batch["input_ids"][1, 0] == 0 and batch["attention_mask"][1, 0] == 0
    assert (batch["input_ids"] == 400).sum(dim=1).tolist() == [1455, 0]
    text_only = processor(text=["Hello"], return_tensors="pt")
    assert "pixel_values" not in text_only


def test_every_kind_of_picture_gives_the_same_tensor(processor: SphinxProcessor) -> None:
    array = np.asarray(Image.open(CAT).convert("RGB"))
    kinds: list[Any] = [CAT, str(CAT), CAT.read_bytes(), Image.open(CAT), array, torch.from_numpy(array.copy())]
    kinds.append(torch.from_numpy(array.copy()).permute(2, 0, 1))  # channels first, as torchvision decodes
    tensors = [processor.image_processor(kind, return_tensors="pt")["pixel_values"] for kind in kinds]
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "images, text or both"),
    ({"images": [CAT], "text": ["a", "b"]}, "1 pictures for 2 texts"),
    ({"images": [CAT, CAT], "text": ["a", "b", "c"]}, "2 pictures for 3 texts"),
    ({"images": [[CAT]], "text": ["a", "b"]}, "1 lists of pictures for 2 texts"),
    ({"images": [[CAT], None], "text": ["a <image> <image>", "b"]}, "text 0 names 2 pictures and was given 1"),
    ({"text": ["<image>"]}, "0 pictures for 1 texts that name 1"),
    ({"text": ["a", "b c d"], "return_tensors": "pt"}, "padding=True"),
    ({"images": [CAT], "text": "x", "truncation": True, "max_length": 100}, "would cut through the visual tokens"),
    ({"images": ["nowhere.png"], "text": "x"}, "nowhere.png"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_does_not_add_up_is_refused(processor: SphinxProcessor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_chat_template_is_the_released_format(processor: SphinxProcessor) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<image>" + conversation_prompt([("What is this?", "A cat."), ("Sure?", None)])
    closed = processor.apply_chat_template(messages[:2], tokenize=False)
    assert closed == f"<image>{SYSTEM}### Human: What is this?\n### Assistant: A cat.\n###"
    other = processor.apply_chat_template(
        [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "Hi"}], tokenize=False
    )
    assert other == "Be brief.\n### Human: Hi\n###"


def test_template_with_tokens_and_pictures(processor: SphinxProcessor) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": str(CAT)}, {"type": "text", "text": "What is this?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    direct = processor(images=[CAT], text=[conversation_prompt([("What is this?", None)])], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], direct["input_ids"])
    assert torch.equal(inputs["pixel_values"], direct["pixel_values"])


def test_saved_again_it_is_the_same(processor: SphinxProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.tokens_per_view, again.image_token_id) == (291, 400)
    ours, theirs = (p(images=[CAT], text="x", return_tensors="pt") for p in (processor, again))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_backends_resolve_and_agree() -> None:
    folder = converted("llama_ens5")
    assert type(AutoImageProcessor.from_pretrained(folder)) is SphinxImageProcessor
    reference = AutoImageProcessor.from_pretrained(folder, backend="reference")
    assert type(reference) is SphinxImageProcessorReference
    fast = AutoImageProcessor.from_pretrained(folder, backend="sphinx_fast")
    ours, theirs = (p([CAT], return_tensors="pt")["pixel_values"] for p in (fast, reference))
    assert torch.equal(ours, theirs)


def test_serving_engines_are_told_the_counts(processor: SphinxProcessor) -> None:
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (30, 40)])
    assert counts.num_image_tokens == [1455, 1455] and counts.num_image_patches == [5, 5]
    assert processor.replace_image_token({}, 0) == "<image>" * 1455
    marked = processor(images=[CAT], text="x", return_mm_token_type_ids=True)
    assert sum(marked["mm_token_type_ids"][0]) == 1455


def test_conversation_refusals_and_stop_text() -> None:
    for turns in ([], [("a", "b")], [("a", None), ("b", None)]):
        with pytest.raises(ValueError, match=r"conversation|at least one"):
            conversation_prompt(turns)
    assert cut_at_stop("red\n### Human") == ("red", True)
    assert cut_at_stop("red\n##") == ("red\n##", False)
    assert [held_back(text) for text in ("red", "red\n", "red\n##", "red\n### x")] == [0, 1, 3, 0]


@pytest.mark.parametrize("transform", ["padded_resize", "resized_center_crop", "random_resized_crop"])
def test_transforms_equal_the_reference(transform: str) -> None:
    pictures = [np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8) for h, w in ((50, 90), (61, 40))]
    views = []
    for kind in (SphinxImageProcessor, SphinxImageProcessorReference):
        torch.manual_seed(3)
        views.append(kind(64, 32, transform=transform)(pictures)["pixel_values"])
    assert torch.equal(*views)
    assert SphinxImageProcessor.from_dict(SphinxImageProcessor(transform=transform).to_dict()).transform == transform


@pytest.mark.parametrize("size", [(40, 400), (400, 40), (100, 310), (100, 290), (60, 60), (1, 999), (7, 20)])
def test_crops_of_padding_alone_can_be_left_out(size: tuple[int, int]) -> None:
    """What is left out is one colour, what is kept is unchanged, and nothing of the picture is lost."""
    picture = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    whole = SphinxImageProcessor(picture_size=672)(picture, return_tensors="pt")
    short = SphinxImageProcessor(picture_size=672, skip_padding=True)
    kept = short(picture, return_tensors="pt")
    shown = short.views_shown(short.geometries([picture])[0])
    long_side, short_side = max(size), min(size)
    assert (len(shown) == 4) == (long_side > 3.2 * short_side) and shown[0] == 0
    assert torch.equal(kept["pixel_values"], whole["pixel_values"][shown])
    assert kept["num_image_patches"].tolist() == [len(shown)] and whole["num_image_patches"].tolist() == [10]
    assert short.get_number_of_image_patches(*size) == len(shown)
    for view in set(range(10)) - set(shown):
        crop = whole["pixel_values"][view]
        assert torch.equal(crop, crop[:, :1, :1].expand_as(crop))


def test_pictures_with_fewer_views_have_fewer_placeholders(processor: SphinxProcessor) -> None:
    wide, square = np.zeros((20, 200, 3), dtype=np.uint8), np.zeros((50, 50, 3), dtype=np.uint8)
    images = SphinxImageProcessor(picture_size=672, skip_padding=True)
    short = SphinxProcessor(images, processor.tokenizer, image_token_id=processor.image_token_id)
    inputs = short(images=[[wide, square], [square]], text=["<image> and <image>", "Hi"], padding=True)
    assert inputs["num_image_patches"].tolist() == [4, 10, 10] and inputs["pixel_values"].shape[0] == 24
    assert [row.count(400) for row in inputs["input_ids"]] == [14 * 291, 10 * 291]
    assert short.replace_image_token(inputs, 0) == "<image>" * (4 * 291)
    told = short._get_num_multimodal_tokens(image_sizes=[(20, 200), (50, 50)])
    assert told["num_image_patches"] == [4, 10] and told["num_image_tokens"] == [4 * 291, 10 * 291]


def test_an_unknown_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="transform: expected one of padded_resize"):
        SphinxImageProcessor(transform="squash")


@pytest.mark.gpu
def test_cuda_pictures_stay_on_the_gpu() -> None:
    picture = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)  # as a decoder leaves it: channels first
    processor = SphinxImageProcessor(64, 32)
    made = processor([picture.cuda()])["pixel_values"]
    assert made.is_cuda
    assert torch.equal(made.cpu(), processor([picture])["pixel_values"])
    with pytest.raises(ValueError, match="CUDA tensor"):
        processor([picture.float().cuda()])
