"""Mixing: the float64 sum rounded, whatever the shards; one clear line and no folder for models that do not match."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import GOLDEN, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from sphinx_fast import EMBEDDED_MODEL, Sphinx, SphinxForConditionalGeneration
from sphinx_fast.cli import main
from sphinx_fast.weights import mix as mix_module
from sphinx_fast.weights.alike import names_of
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.layout import on_disk_shapes
from sphinx_fast.weights.mix import PARTS, mix

LLM, TRAINED = PARTS["llm"], PARTS["trained"]
NORM = "model.language_model.norm.weight"
VISION = "model.vision_tower.clip.embeddings.position_embedding.weight"


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever its shards."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def header(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def exact(folders: list[Path], weights: list[float], key: str) -> Tensor:
    """The equation in float64."""
    return torch.stack([w * read(f)[key].double() for w, f in zip(weights, folders, strict=True)]).sum(0)


def family(
    folder: Path, count: int, *, dtype: torch.dtype = torch.float32, text: dict[str, Any] | None = None, **save: Any
) -> list[Path]:
    """Models with one vision tower and one fusion, and language models of their own."""
    folders = []
    config = tiny_config(text={"vocab_size": 96, **(text or {})})
    frozen = {k: v for k, v in tiny_model(config).state_dict().items() if not k.startswith(LLM)}
    for seed in range(count):
        model = tiny_model(config, seed=seed + 1)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # the norms' ones
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.load_state_dict(frozen, strict=False)
        folders.append(folder / f"source-{seed}")
        model.to(dtype).save_pretrained(folders[-1], **save)
    return folders


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return family(tmp_path_factory.mktemp("trio"), 3)


@pytest.fixture(scope="module")
def minis(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """sphinx-mini and another whose language model was trained on (here: shaken)."""
    root = tmp_path_factory.mktemp("minis")
    for name in ("real", "syn"):
        shutil.copytree(EMBEDDED_MODEL, root / name)
    edit_weights(root / "syn", lambda w: [shake(w, key) for key in w if key.startswith(LLM)])
    return [root / "real", root / "syn"]


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    change(weights)
    (folder / file).unlink()
    save_file(weights, folder / file, metadata={"format": "pt"})


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def shake(weights: dict[str, Tensor], key: str) -> None:
    generator = torch.Generator().manual_seed(len(key))
    value = weights[key]
    weights[key] = (value + 0.02 * torch.randn(value.shape, generator=generator)).to(value.dtype)


# --- the equation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.9, 1 - 0.9], [0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
def test_float32_is_the_float64_sum(trio: list[Path], tmp_path: Path, weights: list[float]) -> None:
    folders = trio[: len(weights)]
    mix(folders, weights, tmp_path / "new")
    sources, new = [read(folder) for folder in folders], read(tmp_path / "new")
    assert new.keys() == sources[0].keys()
    for key, value in new.items():
        if key.startswith(LLM):
            plain = torch.stack([w * source[key] for w, source in zip(weights, sources, strict=True)]).sum(0)
            assert_close(value, plain, exact(folders, weights, key), key)
            assert not torch.equal(value, sources[0][key])
        else:
            assert torch.equal(value, sources[0][key])
    assert header(tmp_path / "new/model.safetensors") == header(folders[0] / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.5, 0.3, 0.2]])
def test_half_precision_is_rounded_once(tmp_path: Path, dtype: torch.dtype, weights: list[float]) -> None:
    """fp32 errs by a few of its own roundings: the result is one of the exact sums that near, rounded to the dtype.

    Sums of tenths of 8-bit numbers are often halfway between two of them, so up to a percent may go the other way.
    """
    folders = family(tmp_path, len(weights), dtype=dtype)
    mix(folders, weights, tmp_path / "new")
    new, sources, same, total = read(tmp_path / "new"), [read(f) for f in folders], 0, 0
    for key in filter(lambda key: key.startswith(LLM), new):
        wanted = exact(folders, weights, key)
        slack = sum(s[key].double().abs() for s in sources) * 2 * len(weights) * torch.finfo(torch.float32).eps
        assert new[key].dtype == dtype
        assert bool(((wanted - slack).to(dtype) <= new[key]).all() and (new[key] <= (wanted + slack).to(dtype)).all())
        same, total = same + int((new[key] == wanted.to(dtype)).sum()), total + wanted.numel()
    assert same > 0.99 * total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dyadic_sums_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    """Values k/64 and weights of quarters: fp32 computes exactly, so the result is the float64 sum rounded once."""
    folders = family(tmp_path, 3, dtype=dtype)
    for seed, folder in enumerate(folders):

        def on_a_grid(weights: dict[str, Tensor], seed: int = seed) -> None:
            generator = torch.Generator().manual_seed(seed)
            for key in filter(lambda key: key.startswith(LLM), weights):
                weights[key] = (torch.randint(-255, 256, weights[key].shape, generator=generator) / 64).to(dtype)

        edit_weights(folder, on_a_grid)
    mix(folders, [0.5, 0.25, 0.25], tmp_path / "new")
    for key, value in read(tmp_path / "new").items():
        if key.startswith(LLM):
            assert torch.equal(value, exact(folders, [0.5, 0.25, 0.25], key).to(dtype)), key


def test_float64_is_computed_in_float64(tmp_path: Path) -> None:
    folders = family(tmp_path, 2, dtype=torch.float64)
    for folder in folders:
        edit_weights(folder, lambda w: w.update({NORM: w[NORM] + 1e-12}))
    mix(folders, [0.3, 0.7], tmp_path / "new")
    for key, value in read(tmp_path / "new").items():
        if key.startswith(LLM):
            torch.testing.assert_close(value, exact(folders, [0.3, 0.7], key), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("one", [0, 1, 2])
def test_a_weight_of_one_copies_and_zero_is_not_read(trio: list[Path], tmp_path: Path, one: int) -> None:
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in trio]
    for index, folder in enumerate(folders):
        if index != one:
            edit_weights(folder, lambda w: w[NORM].fill_(float("nan")))
    mix(folders, [float(index == one) for index in range(3)], tmp_path / "new")
    new, source = read(tmp_path / "new"), read(folders[one])
    assert all(torch.equal(bits(new[key]), bits(source[key])) for key in source)
    if not one:
        assert (tmp_path / "new/model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()


def test_order_is_rounding_and_agreement_stays(trio: list[Path], tmp_path: Path) -> None:
    a, b, c = trio
    mix([a, b, c], [0.5, 0.3, 0.2], tmp_path / "abc")
    mix([c, a, b], [0.2, 0.5, 0.3], tmp_path / "cab")
    mix([a, b, c], [0.5, 0.3, 0.2], tmp_path / "again")
    mix([b, b, b], [0.1, 0.2, 0.7], tmp_path / "bbb")
    abc, cab, again, bbb = (read(tmp_path / name) for name in ("abc", "cab", "again", "bbb"))
    for key, value in read(b).items():
        rounding = 4 * torch.finfo(torch.float32).eps * float(value.abs().max().clamp(min=1))
        torch.testing.assert_close(abc[key], cab[key], rtol=0, atol=rounding)
        assert torch.equal(bits(abc[key]), bits(again[key]))
        assert torch.equal(bbb[key], value)


def test_a_small_weight_of_large_values(trio: list[Path], tmp_path: Path) -> None:
    """Differences are taken from the heaviest source: the rounding is of the result, not of what hardly counts."""
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in trio[:2]]
    edit_weights(folders[0], lambda w: w[NORM].mul_(1000))
    mix(folders, [0.001, 0.999], tmp_path / "new")
    plain = 0.001 * read(folders[0])[NORM] + 0.999 * read(folders[1])[NORM]
    assert_close(read(tmp_path / "new")[NORM], plain, exact(folders, [0.001, 0.999], NORM))


def test_blocks_join(trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix(trio, [0.5, 0.3, 0.2], tmp_path / "whole")
    monkeypatch.setattr(mix_module, "BLOCK", 37)
    mix(trio, [0.5, 0.3, 0.2], tmp_path / "blocks")
    whole, blocks = (tmp_path / name / "model.safetensors" for name in ("whole", "blocks"))
    assert whole.read_bytes() == blocks.read_bytes()


def test_parts(trio: list[Path], tmp_path: Path) -> None:
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in trio[:2]]
    edit_weights(folders[1], lambda w: [shake(w, key) for key in w if key.startswith("model.fusion.")])
    with pytest.raises(WeightsError, match=r"source-1/model\.safetensors: model\.fusion\.\S+ differs from "):
        mix(folders, [0.5, 0.5], tmp_path / "new")
    mix(folders, [0.3, 0.7], tmp_path / "new", parts="trained")
    sources, new = [read(folder) for folder in folders], read(tmp_path / "new")
    seen = set()
    for key, value in new.items():
        if key.startswith(TRAINED):
            seen.add(key.split(".")[1])
            plain = 0.3 * sources[0][key] + 0.7 * sources[1][key]
            assert_close(value, plain, exact(folders, [0.3, 0.7], key), key)
        else:
            assert torch.equal(value, sources[0][key])
    assert seen == {"fusion", "language_model", "weight"}
    with pytest.raises(ValueError, match="parts: expected one of llm, trained, got 'all'"):
        mix(folders, [0.5, 0.5], tmp_path / "other", parts="all")  # type: ignore[arg-type]


# --- files ------------------------------------------------------------------------------------------------------------
def test_any_shards_give_the_same_tensors(trio: list[Path], tmp_path: Path) -> None:
    mix(trio[:2], [0.3, 0.7], tmp_path / "one")
    one = read(tmp_path / "one")
    sharded = []
    for index, (folder, size) in enumerate(zip(trio, ("60KB", "25KB"), strict=False)):
        sharded.append(tmp_path / f"sharded-{index}")
        AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(sharded[-1], max_shard_size=size)
    layouts = [{file.name: header(file) for file in folder.glob("*.safetensors")} for folder in sharded]
    assert 3 < len(layouts[0]) < len(layouts[1])
    for name, sources in {"same": sharded, "mixed": [sharded[0], trio[1]], "joined": [trio[0], sharded[1]]}.items():
        mix(sources, [0.3, 0.7], tmp_path / name)
        new = read(tmp_path / name)
        assert new.keys() == one.keys() and all(torch.equal(new[key], one[key]) for key in one)
        files = {file.name: header(file) for file in (tmp_path / name).glob("*.safetensors")}
        assert files == {file.name: header(file) for file in sources[0].glob("*.safetensors")}
        index = "model.safetensors.index.json"
        assert (tmp_path / name / index).is_file() == (sources is not None and (sources[0] / index).is_file())
        for file in files:
            with safe_open(tmp_path / name / file, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        assert torch.equal(model.lm_head.weight, one["lm_head.weight"])


@pytest.mark.parametrize("text", [{"tie_word_embeddings": True}, {"model_type": "mixtral", "num_local_experts": 2}])
def test_other_language_models(tmp_path: Path, text: dict[str, Any]) -> None:
    folders = family(tmp_path, 2, text=text)
    mix(folders, [0.3, 0.7], tmp_path / "new")
    sources, new = [read(folder) for folder in folders], read(tmp_path / "new")
    assert ("lm_head.weight" in new) == ("tie_word_embeddings" not in text)
    for key in filter(lambda key: key.startswith(LLM), new):
        assert_close(new[key], 0.3 * sources[0][key] + 0.7 * sources[1][key], exact(folders, [0.3, 0.7], key), key)
    model = SphinxForConditionalGeneration.from_pretrained(tmp_path / "new")
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, new["model.language_model.embed_tokens.weight"])
    assert (model.lm_head.weight is embedding) == ("tie_word_embeddings" in text)


def test_a_mixed_folder_is_a_model(minis: list[Path], tmp_path: Path, capsys: Any) -> None:
    new = tmp_path / "new"
    assert main(["mix", "--beta", "0.3", *map(str, minis), str(new), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{new}: 0.3 real + 0.7 syn\n"
    wanted = {path.name for path in minis[0].iterdir()} - {"README.md"} | {"mixing.json"}
    assert {path.name for path in new.iterdir()} == wanted
    for name in wanted - {"mixing.json", "model.safetensors"}:
        assert (new / name).read_bytes() == (minis[0] / name).read_bytes()
    sources = [{"folder": "real", "weight": 0.3}, {"folder": "syn", "weight": 0.7}]
    assert json.loads((new / "mixing.json").read_text()) == {"parts": "llm", "sources": sources}
    model: Any = Sphinx.from_pretrained(new, device="cpu", dtype="float32").model
    assert torch.equal(model.model.language_model.norm.weight, read(new)[NORM].float())
    assert main(["ask", str(GOLDEN / "cat.png"), "What is this?", "--model", str(new), "--max-new-tokens", "4"]) == 0


def test_beta_of_one_answers_as_the_first(minis: list[Path], tmp_path: Path) -> None:
    assert main(["mix", "--weights", "1,0", *map(str, minis), str(tmp_path / "new"), "--quiet"]) == 0
    name = "model.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (minis[0] / name).read_bytes()


def test_results_of_training_are_told_apart(minis: list[Path], tmp_path: Path, capsys: Any) -> None:
    """They are all called `model`; what is recorded says which is which, and nothing of where they lie besides."""
    folders = [shutil.copytree(folder, tmp_path / "runs" / folder.name / "model") for folder in minis]
    assert main(["mix", "--beta", "0.3", *map(str, folders), str(tmp_path / "new"), "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("new: 0.3 real/model + 0.7 syn/model\n")
    record = json.loads((tmp_path / "new" / "mixing.json").read_text())
    assert [source["folder"] for source in record["sources"]] == ["real/model", "syn/model"]
    assert names_of(["/a", "b", "/a"]) == ["a", "b", "a"]
    assert names_of(["/x/a", "/a", "/y/a"]) == ["x/a", "a", "y/a"] and names_of(["/"]) == [""]


def test_three_folders_and_a_bar(minis: list[Path], tmp_path: Path, capsys: Any) -> None:
    folders = [*map(str, minis), str(minis[0])]
    assert main(["mix", "--weights", "0.5,0.3,0.2", "--parts", "trained", *folders, str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("new: 0.5 real + 0.3 syn + 0.2 real\n") and "mix: 100%" in err


def test_what_does_not_matter(minis: list[Path], tmp_path: Path) -> None:
    """A folder saved again, by another version of transformers, after loading."""
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(minis[1]).save_pretrained(tmp_path / "saved")
    SphinxForConditionalGeneration.from_pretrained(minis[1], dtype="auto").save_pretrained(tmp_path / "saved")
    change = {"transformers_version": "6.0", "_name_or_path": "/somewhere", "use_cache": False, "extra": None}
    edit_json(tmp_path / "saved", "config.json", lambda c: c.update(change))
    mix([minis[0], tmp_path / "saved"], [0.5, 0.5], tmp_path / "new")
    mix(minis, [0.5, 0.5], tmp_path / "plain")
    name = "model.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


# --- refusals ---------------------------------------------------------------------------------------------------------
def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change)


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "config.json", lambda c: c.update(changes))


def _index(**weight_map: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        where = {key: "model.safetensors" for key in load_file(folder / "model.safetensors")} | weight_map
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    return write


def _append(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\n") and None


BAD_SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vision tower": (
        _weights(lambda w: w[VISION].view(-1)[-1:].add_(1)),
        rf"syn/model\.safetensors: {re.escape(VISION)} differs from .*real, but parts='llm' does not mix it",
    ),
    "fusion": (_weights(lambda w: w["model.fusion.view_end"].add_(1)), r"model\.fusion\.view_end differs"),
    "missing key": (_weights(lambda w: w.pop(NORM)), rf"syn: has no {re.escape(NORM)}, which .*real has"),
    "surplus key": (_weights(lambda w: w.update({"more": w[NORM].clone()})), r"real: has no more, which .*syn has"),
    "shape": (
        _weights(lambda w: w.update({NORM: w[NORM][1:].clone()})),
        r"norm\.weight has shape \[127\], but \[128\]",
    ),
    "dtype": (_weights(lambda w: w.update({NORM: w[NORM].float()})), r"has dtype torch\.float32, but torch\.bfloat16"),
    "config": (
        lambda f: edit_json(f, "config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-6)),
        r"syn/config\.json: text_config\.rms_norm_eps is 1e-06, but 1e-05 in .*real",
    ),
    "config dtype": (_config(dtype="float16"), r"dtype is 'float16', but 'bfloat16'"),
    "tokenizer": (_append("tokenizer.json"), r"syn/tokenizer\.json: differs from .*real/tokenizer\.json"),
    "pieces": (_append("tokenizer.model"), r"syn/tokenizer\.model: differs"),
    "no pieces": (lambda f: (f / "tokenizer.model").unlink(), r"syn/tokenizer\.model: differs"),
    "template": (_append("chat_template.jinja"), r"chat_template\.jinja: differs"),
    "tokenizer settings": (
        lambda f: edit_json(f, "tokenizer_config.json", lambda c: c.update(eos_token="<unk>")),
        r"tokenizer_config\.json: eos_token is '<unk>', but '</s>'",
    ),
    "processor": (
        lambda f: edit_json(f, "processor_config.json", lambda c: c["image_processor"].update(view_size=48)),
        r"processor_config\.json: image_processor\.view_size is 48, but 96",
    ),
    "not finite": (
        _weights(lambda w: w[NORM].view(-1)[-1:].fill_(float("inf"))),
        r"syn\S+ model\.\S+ holds values that",
    ),
    "truncated": (_cut, r"syn/model\.safetensors: damaged"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"x"), r"syn/model\.safetensors: damaged"),
    "quantised": (_config(quantization_config={"quant_method": "x"}), r"syn: is quantised; mix before"),
    "quantised inside": (
        lambda f: edit_json(f, "config.json", lambda c: c["text_config"].update(quantization_config={"bits": 4})),
        r"syn: is quantised; mix before",
    ),
    "other model": (_config(model_type="llama"), r"syn: model_type is 'llama', expected 'sphinx'"),
    "no config": (lambda f: (f / "config.json").unlink(), r"syn/config\.json: not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"syn: no model\.safetensors and no"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"syn: no model\.safetensors and no",
    ),
    "released": (lambda f: (f / "consolidated.00-of-01.model.pth").touch(), r"convert it first"),
    "shard missing": (_index(**{NORM: "other.safetensors"}), r"other\.safetensors: no such file"),
    "shard elsewhere": (_index(**{NORM: "../real/model.safetensors"}), r"is not a file name"),
    "index lies": (_index(ghost="model.safetensors"), r"syn: the files hold other weights than their index"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), r"no weight_map"),
    "missing folder": (shutil.rmtree, r"syn: no such folder"),
}


def refused(arguments: list[str], message: str, root: Path, capsys: Any) -> None:
    """Status 1, one line, nothing new in `root`."""
    before = sorted(path.name for path in root.iterdir())
    capsys.readouterr()
    assert main(["mix", *arguments, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("sphinx-fast: ")
    assert re.search(message, err), err
    assert sorted(path.name for path in root.iterdir()) == before


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_sources_that_do_not_match(minis: list[Path], tmp_path: Path, case: str, capsys: Any) -> None:
    damage, message = BAD_SOURCES[case]
    real, syn = (shutil.copytree(folder, tmp_path / folder.name) for folder in minis)
    damage(syn)
    refused(["--beta", "0.5", str(real), str(syn), str(tmp_path / "new")], message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", torch.int8, "up_proj.weight is quantised; mix before"),
        ("model.language_model.layers.0.mlp.up_proj.qweight", torch.int32, "up_proj.qweight is quantised"),
        ("lm_head.weight", torch.float8_e4m3fn, "lm_head.weight is quantised"),
        ("model.language_model.positions", torch.int64, "positions differs"),
        ("model.language_model.seen", torch.bool, "seen differs"),
    ],
)
def test_packed_weights_and_integers(
    minis: list[Path], tmp_path: Path, key: str, value: Any, message: str, capsys: Any
) -> None:
    real, syn = (shutil.copytree(folder, tmp_path / folder.name) for folder in minis)
    edit_weights(real, lambda w: w.update({key: torch.tensor([0, 1]).to(value)}))
    edit_weights(syn, lambda w: w.update({key: torch.tensor([1, 1]).to(value)}))
    refused(["--beta", "0.5", str(real), str(syn), str(tmp_path / "new")], message, tmp_path, capsys)


def test_equal_integers_are_copied(minis: list[Path], tmp_path: Path) -> None:
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in minis]
    more = {"model.language_model.positions": torch.arange(5), "model.language_model.one": torch.tensor(True)}
    more |= {"model.language_model.none": torch.zeros(0, 3), "model.language_model.scalar": torch.tensor(0.25)}
    for folder in folders:
        edit_weights(folder, lambda w: w.update(more))
    mix(folders, [0.5, 0.5], tmp_path / "new")
    new = read(tmp_path / "new")
    assert all(torch.equal(new[key], value) for key, value in more.items())


def test_overflow_is_named(tmp_path: Path) -> None:
    folders = family(tmp_path, 2)
    for folder, value in zip(folders, (3e38, -3e38), strict=True):
        edit_weights(folder, lambda w, value=value: w[NORM].fill_(value))
    with pytest.raises(WeightsError, match=rf"^{re.escape(NORM)}: the mixture overflows float32"):
        mix(folders, [0.5, 0.5], tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source-0", "source-1"]


@pytest.mark.parametrize(
    ("options", "folders", "message"),
    [
        (["--beta", "1.5"], 2, "expected numbers from 0 to 1, got 1.5"),
        (["--beta", "-0.5"], 2, "expected numbers from 0 to 1, got -0.5"),
        (["--beta", "nan"], 2, "expected numbers from 0 to 1, got nan"),
        (["--weights", "0.5,0.4"], 2, "expected a sum of 1, got 0.9"),
        (["--weights", "0.5,0.500002"], 2, "expected a sum of 1"),
        (["--weights", "0.5,half"], 2, "weights: expected numbers such as"),
        (["--weights", "1"], 1, "at least two folders to mix, got 1"),
        (["--weights", "0.5,0.5"], 3, "expected 2 folders and the one to create, got 4"),
        (["--beta", "0.5"], 1, "expected 2 folders and the one to create, got 2"),
        (["--beta", "0.5", "--data", "x"], 2, "--data goes with --sweep"),
    ],
)
def test_bad_arguments(
    minis: list[Path], tmp_path: Path, options: list[str], folders: int, message: str, capsys: Any
) -> None:
    sources = [str(folder) for folder in [*minis, minis[0]][:folders]]
    refused([*options, *sources, str(tmp_path / "new")], message, tmp_path, capsys)


def test_existing_targets_and_hub_names(minis: list[Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "new").mkdir()
    arguments = ["--beta", "0.5", *map(str, minis)]
    refused([*arguments, str(tmp_path / "new")], "new: exists already", tmp_path, capsys)
    refused([*arguments, str(minis[0])], "real: exists already", tmp_path, capsys)
    hub = ["--beta", "0.5", "somebody/some-model", str(minis[0]), str(tmp_path / "other")]
    refused(hub, "somebody/some-model: no such folder", tmp_path, capsys)
    with pytest.raises(ValueError, match="one for each of the 2 folders, got 3"):
        mix(minis, [0.5, 0.3, 0.2], tmp_path / "other")


def test_weights_are_divided_by_their_sum(trio: list[Path], tmp_path: Path) -> None:
    mix(trio, [0.3333333, 0.3333333, 0.3333333], tmp_path / "new")
    third = exact(trio, [1 / 3] * 3, NORM)
    assert_close(read(tmp_path / "new")[NORM], third.float(), third)
    record = json.loads((tmp_path / "new/mixing.json").read_text())
    assert [source["weight"] for source in record["sources"]] == [pytest.approx(1 / 3, rel=1e-15)] * 3


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(
    minis: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    blocks, written = mix_module.Sources.blocks, []

    def stop(self: Any, key: str, weights: Any) -> Any:
        written.append([path.name for path in tmp_path.iterdir()])
        if len(written) > 100:
            raise error
        return blocks(self, key, weights)

    monkeypatch.setattr(mix_module.Sources, "blocks", stop)
    with pytest.raises(type(error)):
        mix(minis, [0.5, 0.5], tmp_path / "new")
    assert written[-1] and written[-1] != ["new"] and not list(tmp_path.iterdir())


# --- memory and a full disk -------------------------------------------------------------------------------------------
def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], size: int, shift: bool) -> None:
    """A model of 200 MB without its initialisation; `shift`: another language model."""
    shards: list[dict[str, Tensor]] = [{}]
    for key, shape in shapes.items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > size:
            shards.append({})
        shards[-1][key] = torch.full(shape, 0.25)
        if key.startswith(LLM):
            shards[-1][key].view(-1)[::7] = 0.75 + shift
    index = {key: f"model-{number}.safetensors" for number, shard in enumerate(shards) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors", metadata={"format": "pt"})


CHILD = """
import json, resource, sys, threading
import sphinx_fast
from sphinx_fast.weights.mix import mix

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

small, real, syn, target = sys.argv[1:]
mix([small, small], [0.5, 0.5], target + "-small")  # the libraries' own set-up
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
mix([real, syn], [0.3, 0.7], target)
done.set()
thread.join()
print(json.dumps(max(peak[0], anonymous()) - before))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))
try:
    mix([real, syn], [0.3, 0.7], target + "-full")
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_a_few_blocks_and_a_full_disk_leaves_nothing(trio: list[Path], tmp_path: Path) -> None:
    text = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_hidden_layers": 4}
    config = tiny_config(text={**text, "vocab_size": 3000})
    real, syn = tmp_path / "real", tmp_path / "syn"
    for folder in (real, syn):
        config.save_pretrained(folder)
        write_shards(folder, on_disk_shapes(config), 80_000_000, shift=folder is syn)
    files = [file.stat().st_size for file in real.glob("*.safetensors")]
    assert len(files) > 2 and sum(files) > 200e6

    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, (trio[0], real, syn, tmp_path / "new"))],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "200000"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, full = child.stdout.splitlines()
    print(f"{peak} bytes to mix two folders of {sum(files)}")
    assert int(peak) < 8 * mix_module.BLOCK * 4 < min(sum(files) / 5, max(files))  # eight blocks of fp32
    assert "File too large" in full
    assert {path.name for path in tmp_path.iterdir()} == {"new", "new-small", real.name, syn.name}
    total, key = read(tmp_path / "new"), "model.language_model.layers.3.mlp.up_proj.weight"
    plain = 0.3 * read(real)[key] + 0.7 * read(syn)[key]
    assert_close(total[key], plain, exact([real, syn], [0.3, 0.7], key))
