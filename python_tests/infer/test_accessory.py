"""The released API: the golden answers, the released signatures, and one clear line for every bad argument."""

from __future__ import annotations

import inspect
import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from tiny import GOLDEN, converted, reshard
from torch import Tensor

from sphinx_fast import Sphinx
from sphinx_fast.image.views import normalise
from sphinx_fast.infer.accessory import SPHINXModel
from sphinx_fast.infer.loading import load_released
from sphinx_fast.model.conversation import SYSTEM, conversation_prompt
from sphinx_fast.vision import VisionTower
from sphinx_fast.weights.accessory import open_released

CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
GREEDY: dict[str, Any] = {"max_gen_len": 16, "temperature": 0.0}
ASK_FIRST = ("What is in the image?", None)
CAT, COFFEE = (Image.open(GOLDEN / name) for name in ("cat.png", "coffee_portrait.png"))


def load(folder: Any, **kwargs: Any) -> SPHINXModel:
    return SPHINXModel.from_pretrained(folder, **{"with_visual": True, **CPU, **kwargs})


def cases(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / name / "cases.json").read_text())["cases"]
    return found


def squares(name: str) -> Tensor:
    """What the released transform makes of the golden pictures, [2, 3, S, S]: from the squares it resized them to."""
    return torch.stack([normalise(Image.open(GOLDEN / name / f"{i}.resized.png").convert("RGB")) for i in range(2)])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> SPHINXModel:
    """One view, read from a released folder of two shards."""
    folder = tmp_path_factory.mktemp("released") / "two"
    shutil.copytree(GOLDEN / "llama_ens", folder)
    reshard(folder, 2)
    assert len(list(folder.glob("consolidated.*-of-02.model.pth"))) == 2
    return load(folder)


@pytest.fixture(scope="module")
def five() -> SPHINXModel:
    """Five views, read from the released folder as it is, in two shards."""
    return load(GOLDEN / "llama_ens5")


def test_names_and_defaults_are_the_released_ones() -> None:
    def defaults(method: Any) -> dict[str, Any]:
        empty = inspect.Parameter.empty
        parameters = inspect.signature(method).parameters.values()
        return {p.name: None if p.default is empty else p.default for p in parameters if p.name != "self"}

    load_defaults = {"llama_type": None, "llama_config": None, "tokenizer_path": None, "with_visual": False}
    load_defaults |= {"max_seq_len": 4096, "mp_group": None, "dtype": torch.bfloat16, "device": "cuda", "quant": False}
    ask = {"qas": None, "image": None, "max_gen_len": 512, "temperature": 0.1, "top_p": 0.5, "seed": 0}
    raw = {"prompts": None, "images": None, "max_gen_len": 512, "temperature": 0.0, "top_p": 0.95}
    expected = [{"pretrained_path": None, **load_defaults}, ask, {**raw, "additional_stop_symbols": ()}]
    methods = [SPHINXModel.from_pretrained, SPHINXModel.generate_response, SPHINXModel.generate]
    assert [list(defaults(method).items()) for method in methods] == [list(table.items()) for table in expected]


# --- the released answers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["one", "five", "llama_ens", "converted llama_ens", "converted llama_ens5"])
def test_golden_answers(source: str, request: pytest.FixtureRequest) -> None:
    name = {"one": "llama_ens", "five": "llama_ens5"}.get(source, source.split()[-1])
    if source in ("one", "five"):
        model = request.getfixturevalue(source)
    else:
        model = load(converted(name) if " " in source else GOLDEN / name)
    for case in cases(name):
        picture = Image.open(GOLDEN / case["photo"])
        assert model.generate_response([[case["question"], None]], picture, **GREEDY) == case["response"]


@pytest.mark.parametrize("name", ["one", "five"])
def test_golden_tokens_of_raw_prompts_and_normalised_tensors(name: str, request: pytest.FixtureRequest) -> None:
    model, folder = request.getfixturevalue(name), {"one": "llama_ens", "five": "llama_ens5"}[name]
    spell = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / folder / "tokenizer.model"))
    prompts, expected = [], []
    for case in cases(folder):
        ids = case["greedy_ids"]
        ids = ids[: ids.index(2)] if 2 in ids else ids
        prompts.append(case["prompt"])
        expected.append(spell.decode([token for token in ids if token != 1]))
    assert model.generate(prompts, squares(folder), **GREEDY) == expected
    assert model.generate(prompts, [CAT, squares(folder)[1]], **GREEDY) == expected  # forms may be mixed


def test_views_of_a_normalised_square_are_the_picture_s_bit_for_bit(five: SPHINXModel) -> None:
    processor = five.sphinx.processor.image_processor
    for picture, square in zip((CAT, COFFEE), squares("llama_ens5"), strict=True):
        views, counts = processor.cut([square])
        assert (counts, processor.count_views(square)) == ([5], 5)
        assert torch.equal(views, processor(picture)["pixel_values"])
    mixed, counts = processor.cut([processor.load(CAT), squares("llama_ens5")[1]])
    assert counts == [5, 5]
    assert torch.equal(mixed, processor([CAT, COFFEE])["pixel_values"])


@pytest.mark.parametrize("picture", [CAT, None])
def test_a_conversation_of_several_turns(one: SPHINXModel, picture: Any) -> None:
    qas: list[list[Any]] = []
    written = SYSTEM
    for question in ("What is in the image?", "And now?", "Why?"):
        qas.append([question, None])
        written += f"### Human: {question}\n### Assistant:"
        answer = one.generate_response(qas, picture, max_gen_len=8, temperature=0.0)
        inputs = one.sphinx.processor(
            images=None if picture is None else [picture], text=[written], return_tensors="pt"
        )
        out = one.sphinx.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == one.sphinx.processor.decode(out, skip_special_tokens=True).split("\n###")[0]
        qas[-1][1] = answer
        written += f" {answer}\n"


def test_a_batch_with_and_without_pictures(one: SPHINXModel) -> None:
    prompts = [case["prompt"] for case in cases("llama_ens")] + ["### Human: Hello\n### Assistant:", "A cat"]
    pictures = [CAT, COFFEE, None, squares("llama_ens")[0]]
    together = one.generate(prompts, pictures, **GREEDY)
    assert together == [one.generate([p], [i], **GREEDY)[0] for p, i in zip(prompts, pictures, strict=True)]
    assert len(set(together)) == 4
    assert one.generate(prompts, None, **GREEDY)[2] == together[2]
    assert one.generate(prompts, None, **GREEDY)[0] != together[0]  # the picture counts
    assert one.generate([], None) == []


def test_stop_symbols_and_the_number_of_tokens(one: SPHINXModel) -> None:
    prompt = cases("llama_ens")[0]["prompt"]
    whole = one.generate([prompt], [CAT], **GREEDY)[0]
    late, early = whole[9:11], whole[4:6]
    for stop in ([late], (late, early), {early}):
        cut = min(whole.find(text) for text in stop)
        assert one.generate([prompt], [CAT], additional_stop_symbols=stop, **GREEDY) == [whole[:cut]]
    short = one.generate([prompt], [CAT], max_gen_len=5)[0]
    assert whole.startswith(short.rstrip("\ufffd")) and len(short) < len(whole)


# --- sampling ---------------------------------------------------------------------------------------------------------
def test_a_seed_repeats_and_the_global_generator_is_left_alone(one: SPHINXModel) -> None:
    def say(seed: int) -> str:
        return one.generate_response([["What?", None]], CAT, max_gen_len=12, temperature=2.0, top_p=1.0, seed=seed)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    said = [say(seed) for seed in (0, 1, 2, 0, 1, 2)]
    assert said[:3] == said[3:] and len(set(said)) == 3
    assert torch.equal(torch.rand(3), expected)


def test_torch_s_seed_repeats_a_batch(one: SPHINXModel) -> None:
    def say(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return one.generate(["A cat"] * 3, [CAT] * 3, max_gen_len=12, temperature=2.0, top_p=1.0)

    first = say(1)
    assert len(set(first)) == 3  # every row draws its own numbers
    assert say(1) == first and say(2) != first


# --- what is computed -------------------------------------------------------------------------------------------------
def test_what_was_seen_and_said_is_not_computed_again(one: SPHINXModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, positions = [], []
    forward, splice = VisionTower.forward, one.sphinx.model.model.splice
    monkeypatch.setattr(VisionTower, "forward", lambda self, views: (encoded.append(1), forward(self, views))[1])
    monkeypatch.setattr(
        one.sphinx.model.model, "splice", lambda ids, tokens: (positions.append(ids.shape[1]), splice(ids, tokens))[1]
    )

    def work(call: Any) -> tuple[int, int]:
        """How often the encoders ran, and how many positions of prompts the language model read."""
        encoded.clear(), positions.clear()
        call()
        return len(encoded), sum(positions)

    picture = Image.effect_noise((50, 40), 64).convert("RGB")
    qas: list[list[Any]] = [list(ASK_FIRST)]
    runs, whole = work(lambda: one.generate_response(qas, picture, **GREEDY))
    assert (runs, whole > 291) == (1, True)
    runs, question = work(lambda: one.generate_response([["Is it red?", None]], picture.copy(), **GREEDY))
    assert (runs, question < 60) == (0, True)  # no encoder, no prefix

    qas[0][1] = one.generate_response(qas, picture, **GREEDY)
    qas.append(["Is it red?", None])
    first, both = (one.sphinx.processor.prompt_ids(conversation_prompt(turns)) for turns in ([ASK_FIRST], qas))
    known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, both, strict=False)))
    runs, turn = work(lambda: one.generate_response(qas, picture, **GREEDY))
    assert (runs, 0 < turn <= len(both) - known) == (0, True)  # the first question is not read again

    square = torch.randn(3, 224, 224)
    assert work(lambda: one.generate(["A"], square[None], max_gen_len=2))[0] == 1
    assert work(lambda: one.generate(["A", "B"], [square, square.double()], max_gen_len=2))[0] == 0
    assert work(lambda: one.generate(["A", "B"], torch.randn(2, 3, 224, 224), max_gen_len=2))[0] == 1  # in one batch


def test_without_encoders(one: SPHINXModel) -> None:
    blind = SPHINXModel.from_pretrained(converted("llama_ens"), **CPU)  # with_visual is False by default
    assert not [name for name, _ in blind.sphinx.model.named_parameters() if "language_model" not in name][1:]
    qas = [["Hello", None]]
    assert blind.generate_response(qas, None, **GREEDY) == one.generate_response(qas, None, **GREEDY)
    with pytest.raises(ValueError, match=r"loaded without its encoders; from_pretrained\(\.\.\., with_visual=True\)"):
        blind.generate_response(qas, CAT)


# --- loading ----------------------------------------------------------------------------------------------------------
def test_later_folders_override(tmp_path: Path) -> None:
    """A whole checkpoint, then one of the trained weights alone: they count, and the encoders are the first one's."""
    folder, name = tmp_path / "trained", "consolidated.00-of-01.model.pth"
    folder.mkdir()
    for file in ("config.json", "meta.json", "tokenizer.model"):
        shutil.copy(GOLDEN / "llama_ens" / file, folder / file)
    whole = torch.load(GOLDEN / "llama_ens" / name, weights_only=True)["model"]
    frozen = ("llma.clip.", "llma.openclip_convnext_xxl.", "llma.dinov2_vitg14.", "llma.qformer.")
    trained = {key: tensor * 1.25 for key, tensor in whole.items() if not key.startswith(frozen)}
    torch.save({"model": trained}, folder / name)

    model = load([GOLDEN / "llama_ens", folder]).sphinx.model
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    assert torch.equal(head, trained["llma.output.weight"])
    assert torch.equal(embedding, trained["llma.tok_embeddings.weight"])
    assert torch.equal(model.model.vision_tower.qformer.query_tokens, whole["llma.qformer.query_tokens"])
    assert torch.equal(load([GOLDEN / "llama_ens"]).sphinx.model.lm_head.weight, whole["llma.output.weight"])
    shutil.copy(GOLDEN / "llama_ens" / "encoders.json", folder)
    with pytest.raises(ValueError, match=r"nothing in this checkpoint gives model\.vision_tower"):
        load(folder)


def test_llama_type_config_and_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "released"
    shutil.copytree(GOLDEN / "llama_ens", folder)
    (folder / "meta.json").unlink()
    for name in ("config.json", "tokenizer.model"):
        (folder / name).rename(tmp_path / name)
    (tmp_path / "more.json").write_text('{"rope_theta": 500.0}')
    elsewhere: dict[str, Any] = {"tokenizer_path": tmp_path / "tokenizer.model"}
    elsewhere["llama_config"] = [tmp_path / "config.json", str(tmp_path / "more.json")]
    model = load(folder, llama_type="llama_ens5", **elsewhere).sphinx
    assert model.engine.encode(CAT).shape[0] == 5
    assert model.model.config.text_config.rope_parameters["rope_theta"] == 500.0
    case = cases("llama_ens")[0]
    del elsewhere["llama_config"][1]
    plain = load(str(folder), llama_type="llama_ens", **elsewhere)
    assert plain.generate_response([[case["question"], None]], CAT, **GREEDY) == case["response"]
    assert load(converted("llama_ens"), llama_type="llama_ens5").sphinx.engine.encode(CAT).shape[0] == 5


def test_max_seq_len_bounds_prompt_and_answer(one: SPHINXModel) -> None:
    case = cases("llama_ens")[0]
    needed = 291 + len(case["input_ids"])
    for folder in (GOLDEN / "llama_ens", converted("llama_ens")):
        tight = load(folder, max_seq_len=needed + 2)
        cut = tight.generate([case["prompt"]], [CAT], max_gen_len=16)
        assert cut == one.generate([case["prompt"]], [CAT], max_gen_len=2)
        with pytest.raises(ValueError, match="leaves no room for an answer"):
            tight.generate_response([[case["question"] + " Say it.", None]], CAT)
    assert (one.sphinx.engine.context, load(GOLDEN / "llama_ens", max_seq_len=9000).sphinx.engine.context) == (
        4096,
        9000,
    )
    assert load(converted("llama_ens"), max_seq_len=9000).sphinx.engine.context == 4096


def test_a_released_folder_is_quantised_while_it_is_read() -> None:
    released = open_released([GOLDEN / "llama_ens"])
    loaded = load_released(released, device="cpu", dtype=torch.float32, quantize="int8")
    same = Sphinx.from_pretrained(converted("llama_ens"), **CPU, quantize="int8")
    assert loaded.quantization is not None and len(loaded.quantization.changed) > 6
    assert loaded.quantization == same.quantization
    assert Sphinx(loaded.model, loaded.processor).ask(CAT, "What?", max_new_tokens=8) == same.ask(
        CAT, "What?", max_new_tokens=8
    )


def test_weights_are_read_into_memory_of_their_own() -> None:
    for weight in open_released([GOLDEN / "llama_ens"]).weights:
        mapped, read = weight.load(), weight[...]
        assert torch.equal(read, mapped) and read.is_contiguous()
        assert read.untyped_storage().nbytes() == read.nbytes
        assert read.untyped_storage().data_ptr() != mapped.untyped_storage().data_ptr()


def test_a_group_of_one_is_none() -> None:
    case = cases("llama_ens")[0]
    model = load(converted("llama_ens"), mp_group=torch.distributed.ProcessGroup(0, 1))
    assert model.generate_response([[case["question"], None]], CAT, **GREEDY) == case["response"]


# --- what can be wrong ------------------------------------------------------------------------------------------------
RELEASED, CONVERTED = GOLDEN / "llama_ens", converted("llama_ens")
BAD_LOADS: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "pretrained_path: expected a folder or several, got none"),
    (None, {}, "pretrained_path: expected a folder or several, got none"),
    ("./nowhere", {}, "nowhere: no such folder"),
    ([RELEASED, CONVERTED], {}, r"no consolidated\.\*\.pth; is this a released SPHINX folder"),
    (RELEASED, {"llama_type": "mixtral_sparse_ens"}, "llama_type: expected one of llama_ens, .*'mixtral_sparse_ens'"),
    (RELEASED, {"llama_type": "llama_ens_light"}, "is not part of llama_ens_light"),
    (CONVERTED, {"llama_type": "llama_ens_light"}, "cannot see the views of sphinx-tiny"),
    (RELEASED, {"llama_config": "nowhere.json"}, r"nowhere\.json: not JSON"),
    (RELEASED, {"tokenizer_path": "nowhere.model"}, r"nowhere\.model: no such file"),
    (RELEASED, {"tokenizer_path": GOLDEN}, "expected a SentencePiece file"),
    (CONVERTED, {"llama_config": "config.json"}, "llama_config: .* is no released folder and comes with its own"),
    (CONVERTED, {"tokenizer_path": "tokenizer.model"}, "tokenizer_path: .* comes with its own; leave it out"),
    (RELEASED, {"max_seq_len": 0}, "max_seq_len: expected at least 1, got 0"),
    (RELEASED, {"mp_group": torch.distributed.ProcessGroup(0, 2)}, "mp_group: a group of 2 processes"),
    (RELEASED, {"dtype": torch.int8}, "dtype: expected float32, float16 or bfloat16, got 'int8'"),
    (RELEASED, {"quant": True}, "nf4 is for CUDA GPUs, the device is cpu"),
    (CONVERTED, {"quant": True}, "nf4 is for CUDA GPUs, the device is cpu"),
]


@pytest.mark.parametrize(("folder", "arguments", "message"), BAD_LOADS)
def test_bad_arguments_of_loading_are_one_line(folder: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("folder", [RELEASED, CONVERTED])
def test_no_gpu_is_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match="device: no CUDA GPU is available"):
        SPHINXModel.from_pretrained(folder, with_visual=True)


ASK = [["What?", None]]
BAD_CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("generate_response", ([], None), {}, "a conversation needs at least one question"),
    ("generate_response", ([["What?", "A cat"]], None), {}, "the last turn has an answer already"),
    ("generate_response", ([["What?", None], ["Why?", None]], None), {}, "turn 0 has no answer"),
    ("generate_response", ("What?", None), {}, r"qas: expected \[\[question, answer\], .*got 'W' among them"),
    ("generate_response", ([["What?"]], None), {}, r"qas: expected .*got \['What\?'\] among them"),
    ("generate_response", ([[None, None]], None), {}, "qas: expected"),
    ("generate_response", (ASK, "nowhere.png"), {}, r"nowhere\.png"),
    (
        "generate_response",
        (ASK, torch.zeros(3, 200, 224)),
        {},
        r"normalised float \[3, 224, 224\], got .*\[3, 200, 224\]",
    ),
    ("generate_response", (ASK, None), {"max_gen_len": 0}, "max_gen_len: expected at least 1, got 0"),
    ("generate_response", (ASK, None), {"temperature": -1.0}, "temperature: expected 0 or more"),
    ("generate_response", (ASK, None), {"top_p": 0.0}, "top_p: expected above 0"),
    ("generate", ("What?", None), {}, "prompts: expected a list of texts, got one text"),
    ("generate", (["A"], None), {"additional_stop_symbols": "###"}, "additional_stop_symbols: expected a list"),
    ("generate", (["A"], None), {"max_gen_len": 0}, "max_gen_len: expected at least 1, got 0"),
    ("generate", (["A", 7], None), {}, "prompt 1: expected a text, got int"),
    ("generate", (["A"], CAT), {}, r"images: expected a tensor \[prompts, 3, S, S\] or a list of pictures, got Png"),
    ("generate", (["A"], torch.zeros(3, 224, 224)), {}, r"images: expected a tensor .*got \[3, 224, 224\]"),
    ("generate", (["A"], [CAT, CAT]), {}, "images: expected one for each of 1 prompts, got 2"),
    ("generate", (["A", "B"], torch.zeros(1, 3, 224, 224)), {}, "images: expected one for each of 2 prompts, got 1"),
    ("generate", (["A", "B"], [None, b"no picture"]), {}, "prompt 1: "),
    ("generate", (["A", "word " * 5000], None), {}, "prompt 1: the prompt takes .* leaves no room for an answer"),
]


@pytest.mark.parametrize(("method", "given", "arguments", "message"), BAD_CALLS)
def test_bad_arguments_of_asking_are_one_line(
    one: SPHINXModel, method: str, given: tuple[Any, ...], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        getattr(one, method)(*given, **arguments)
    assert "\n" not in str(caught.value)
