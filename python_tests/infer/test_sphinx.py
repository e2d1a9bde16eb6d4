"""Asking, streaming and chatting; what a user can get wrong is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GOLDEN, converted

from sphinx_fast import Sphinx
from sphinx_fast.infer.loading import default_dtype, with_variant
from sphinx_fast.model.conversation import conversation_prompt

CAT = GOLDEN / "cat.png"


@pytest.fixture(scope="module")
def sphinx() -> Sphinx:
    return Sphinx.from_pretrained(converted("llama_ens"), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_stream_joins_to_ask(sphinx: Sphinx, temperature: float) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "seed": 3}
    answer = sphinx.ask(CAT, "What is in the image?", **settings)
    assert "".join(sphinx.stream(CAT, "What is in the image?", **settings)) == answer


def test_stop_texts(sphinx: Sphinx) -> None:
    answer = sphinx.ask(CAT, "What is in the image?", max_new_tokens=16)
    cut = answer[4:6]
    assert sphinx.ask(CAT, "What is in the image?", max_new_tokens=16, stop=(cut,)) == answer.split(cut)[0]


def test_every_kind_of_picture_and_none(sphinx: Sphinx) -> None:
    array = np.asarray(Image.open(CAT).convert("RGB"))
    kinds: list[Any] = [CAT, str(CAT), CAT.read_bytes(), Image.open(CAT), array, torch.from_numpy(array.copy())]
    answers = {sphinx.ask(kind, "What?", max_new_tokens=6) for kind in kinds}
    assert len(answers) == 1
    assert isinstance(sphinx.ask(None, "Hello", max_new_tokens=3), str)


def test_chat_sees_the_turns_before(sphinx: Sphinx) -> None:
    talk = sphinx.chat(CAT)
    first = talk.say("What is in the image?", max_new_tokens=8)
    second = "".join(talk.stream("And now?", max_new_tokens=8))
    assert talk.turns == [("What is in the image?", first), ("And now?", second)]
    assert first == sphinx.ask(CAT, "What is in the image?", max_new_tokens=8)
    prompt = conversation_prompt([("What is in the image?", first), ("And now?", None)])
    inputs = sphinx.processor(images=[CAT], text=[prompt], return_tensors="pt")
    out = sphinx.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = sphinx.processor.decode(out, skip_special_tokens=True)
    assert second == text.split("\n###")[0]


def test_the_context_ends_the_answer_or_refuses_the_prompt(sphinx: Sphinx) -> None:
    config = sphinx.model.config.text_config
    needed = len(sphinx.processor(images=[CAT], text=conversation_prompt([("Hi", None)]))["input_ids"][0])
    before = config.max_position_embeddings
    try:
        config.max_position_embeddings = needed + 2
        answer = sphinx.ask(CAT, "Hi", max_new_tokens=50, stop=(), return_logprobs=True)
        assert len(answer.tokens) <= 2
        config.max_position_embeddings = needed
        with pytest.raises(ValueError, match=f"takes {needed} positions and leaves no room for an answer"):
            sphinx.ask(CAT, "Hi")
        with pytest.raises(ValueError, match="leaves no room"):
            sphinx.ask(None, "word " * 5000)
    finally:
        config.max_position_embeddings = before


def _folder(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (tmp_path / "nowhere", "no such folder"),
        ("./nowhere", "no such folder"),
        (CAT, "expected a model folder, got a file"),
        (GOLDEN / "llama_ens", "a released checkpoint; convert it first: sphinx-fast convert"),
        (_folder(tmp_path, config__json='{"model_type": "llama"}'), "model_type is 'llama', expected 'sphinx'"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            Sphinx.from_pretrained(folder)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no config\.json"):
        Sphinx.from_pretrained(_folder(tmp_path))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match="not a JSON object"):
        Sphinx.from_pretrained(_folder(tmp_path, config__json="[1]"))


def test_a_damaged_weight_file_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted("llama_ens"), folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model") as caught:
        Sphinx.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted("llama_ens"), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Sphinx.from_pretrained(folder)


def test_variant_changes_the_views_only() -> None:
    folder = converted("llama_ens")
    one, five = Sphinx.from_pretrained(folder), Sphinx.from_pretrained(folder, variant="sphinx-1k")
    assert (one.engine.encode(CAT).shape[0], five.engine.encode(CAT).shape[0]) == (1, 5)
    case = json.loads((GOLDEN / "llama_ens5" / "cases.json").read_text())["cases"][0]
    same = Sphinx.from_pretrained(converted("llama_ens5"))
    ids = [sphinx.processor(images=[CAT], text=case["prompt"])["input_ids"] for sphinx in (five, same)]
    assert ids[0] == ids[1]
    with pytest.raises(ValueError, match="cannot see the views of sphinx-tiny"):
        with_variant(one.model.config, "sphinx-tiny")
    with pytest.raises(ValueError, match="variant: expected one of"):
        with_variant(one.model.config, "sphinx-9k")


def test_dtype_and_device() -> None:
    assert default_dtype(torch.float32, torch.device("cpu")) == torch.float32
    assert default_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert default_dtype(torch.float16, torch.device("cpu")) == torch.float32
    sphinx = Sphinx.from_pretrained(converted("llama_ens"), device="cpu", dtype="bf16")
    assert sphinx.model.dtype == torch.bfloat16
    assert isinstance(sphinx.ask(CAT, "What?", max_new_tokens=3), str)
    with pytest.raises(ValueError, match="dtype: expected float32"):
        Sphinx.from_pretrained(converted("llama_ens"), dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            Sphinx.from_pretrained(converted("llama_ens"), device="cuda")
