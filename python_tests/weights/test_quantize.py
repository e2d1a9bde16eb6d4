"""Quantisation: which layers change, how far, that the rest does not, and what a user can get wrong."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import GOLDEN, converted, tiny_config, tiny_model
from torch import Tensor, nn

from sphinx_fast import Sphinx, SphinxConfig, SphinxForConditionalGeneration, SphinxProcessor
from sphinx_fast.cli import main
from sphinx_fast.weights import quantize
from sphinx_fast.weights.quantize import GROUP, LANGUAGE, inspect, is_quantized, plan, stored_bytes

CAT = str(GOLDEN / "cat.png")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def wide_folder(folder: Path, **text: Any) -> Path:
    """A folder that `Sphinx` loads, with a language model of 256 channels, for tests that quantise."""
    pytest.importorskip("torchao")
    config = SphinxConfig.from_pretrained(converted("llama_ens"))
    for name, value in {**WIDE, "head_dim": 64, **text}.items():
        setattr(config.text_config, name, value)
    tiny_model(config).save_pretrained(folder)
    SphinxProcessor.from_pretrained(converted("llama_ens")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_folder(tmp_path_factory.mktemp("wide") / "model")


@functools.cache
def load(folder: Path, method: str | None, dtype: torch.dtype = torch.float32) -> Sphinx:
    return Sphinx.from_pretrained(folder, device="cpu", dtype=dtype, quantize=method)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module for name, module in model.named_modules() if name.startswith(LANGUAGE) and name[-5:] == "_proj"
    }


@torch.no_grad()
def dequantized(module: nn.Module, inputs: int) -> Tensor:
    """What the layer multiplies by, through its own arithmetic: [outputs, inputs]."""
    return module(torch.eye(inputs)).T.double()


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_the_language_model_and_nothing_else(folder: Path, method: str) -> None:
    plain, ours = load(folder, None), load(folder, method)
    assert plain.quantization is None and ours.quantization is not None
    found = ours.quantization
    assert set(found.changed) == set(linears(plain.model)) and len(found.changed) == 2 * len(LAYER)
    assert found.kept == {"lm_head": quantize.KEPT_HEAD}
    wholes = dict(plain.model.named_parameters())
    layers = {f"{name}.weight" for name in found.changed}
    for name, weight in ours.model.named_parameters():
        assert is_quantized(weight) == (name in layers)
        if name not in layers:
            assert type(weight) is nn.Parameter and torch.equal(weight, wholes[name]), name
    assert found.bytes_after == sum(stored_bytes(p) for n, p in ours.model.named_parameters() if n in layers) + (
        stored_bytes(ours.model.lm_head.weight)
    )
    linear = sum(module.weight.numel() for module in linears(plain.model).values())
    share = (found.bytes_before - found.bytes_after) / linear  # bytes saved a weight, of 4
    assert share > (2.9 if method == "int8" else 3.4)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_weights_lie_within_half_a_step(folder: Path, method: str) -> None:
    plain, ours = linears(load(folder, None).model), linears(load(folder, method).model)
    for name, module in plain.items():
        exact = module.weight.detach().double()
        outputs, inputs = exact.shape
        groups = exact.view(outputs, -1, GROUP if method == "int4" else inputs)
        span = groups.amax(-1) - groups.amin(-1) if method == "int4" else 2 * groups.abs().amax(-1)
        step = span / (15 if method == "int4" else 255)  # int8 is symmetric, -128 to 127
        error = (dequantized(ours[name], inputs) - exact).view_as(groups).abs()
        rounding = groups.abs().amax(-1) * 8 * torch.finfo(torch.float32).eps
        assert bool((error <= (step / 2 + rounding).unsqueeze(-1)).all()), name
        assert error.max() > 0


@pytest.mark.parametrize(("method", "dtype"), [("int8", torch.float32), ("int4", torch.bfloat16)])
def test_greedy_answers_run_and_repeat(folder: Path, method: str, dtype: torch.dtype) -> None:
    sphinx = load(folder, method, dtype)
    answers = {sphinx.ask(CAT, "What is in the image?", max_new_tokens=4) for _ in range(2)}
    assert len(answers) == 1


def test_int8_answers_as_the_whole_model_nearly_does(folder: Path) -> None:
    ids = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, ours = (load(folder, method).model(input_ids=ids).logits for method in (None, "int8"))
    assert (whole - ours).norm() < 0.2 * whole.norm() and not torch.equal(whole, ours)


def test_int4_computes_in_bfloat16_unless_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Sphinx.from_pretrained(folder, device="cpu", quantize="int4").model.dtype == torch.bfloat16
    with caplog.at_level("WARNING", logger="sphinx_fast"):
        assert load.__wrapped__(folder, "int4").model.dtype == torch.float32
    assert "int4 on a CPU is made for bfloat16" in caplog.text
    assert Sphinx.from_pretrained(folder, device="cpu", quantize="int8").model.dtype == torch.float32


def test_nothing_changes_for_the_rest_of_the_process(folder: Path) -> None:
    from torch._inductor import config as inductor

    before = (inductor.coordinate_descent_tuning, inductor.epilogue_fusion, torch.get_float32_matmul_precision())
    for method in ("int8", "int4"):
        load.__wrapped__(folder, method)
    after = (inductor.coordinate_descent_tuning, inductor.epilogue_fusion, torch.get_float32_matmul_precision())
    assert before == after


def test_widths_that_do_not_fit_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = wide_folder(tmp_path / "model", intermediate_size=328)
    sphinx = load(path, "int4")
    found = sphinx.quantization
    assert found is not None
    assert {name.rpartition(".")[2] for name in found.changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = f"{LANGUAGE}layers.1.mlp."
    assert found.kept[f"{mlp}down_proj"] == "width 328 is no multiple of the group of 128"
    assert found.kept[f"{mlp}gate_proj"] == "328 outputs are no multiple of 16"
    assert type(sphinx.model.get_submodule(f"{mlp}down_proj").weight) is nn.Parameter
    line = str(found)
    assert line.startswith("int4: 8 linear layers of the language model quantised (")
    assert f"7 left as they were: {LANGUAGE}layers.0.mlp.gate_proj and 3 like it (328 outputs" in line
    assert [record.levelname for record in caplog.records if record.message == line] == ["WARNING"]
    everything = load(path, "int8").quantization
    assert everything is not None and len(everything.changed) == 14


def test_what_a_library_skips_in_silence_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "misfit", lambda *_: None)
    found = load(wide_folder(tmp_path / "model", intermediate_size=320), "int4").quantization
    assert found is not None
    assert found.kept[f"{LANGUAGE}layers.0.mlp.down_proj"] == "the library left it out"
    assert f"{LANGUAGE}layers.0.mlp.gate_proj" in found.changed


def test_tied_embeddings_and_experts_are_said() -> None:
    tied = tiny_config(text={**WIDE, "tie_word_embeddings": True})
    assert inspect(tiny_model(tied), plan(tied, "int4", "cpu")).kept["lm_head"] == quantize.TIED
    experts = tiny_config(text={**WIDE, "model_type": "mixtral", "num_local_experts": 2})
    kept = inspect(tiny_model(experts), plan(experts, "int4", "cpu")).kept
    assert any("experts" in name and reason == "not a linear layer" for name, reason in kept.items())


def test_nf4_changes_the_same_layers(folder: Path) -> None:
    """bitsandbytes computes on the CPU too: what is found and what is counted can be tested without a GPU."""
    pytest.importorskip("bitsandbytes")
    planned = plan(SphinxConfig.from_pretrained(folder), "nf4", "cuda")
    model: Any = SphinxForConditionalGeneration.from_pretrained(
        folder, device_map="cpu", quantization_config=planned.library_config(torch.float32), dtype=torch.float32
    )
    found = inspect(model, planned)
    assert set(found.changed) == set(linears(load(folder, None).model)) and list(found.kept) == ["lm_head"]
    assert found.bytes_before - found.bytes_after == planned.saved_bytes(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["int8", "int4", "nf4"])
def test_on_a_gpu(folder: Path, method: str) -> None:
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    planned = plan(SphinxConfig.from_pretrained(folder), method, "cuda")
    sphinx = Sphinx.from_pretrained(folder, device="cuda", dtype=torch.bfloat16, quantize=method)
    found = sphinx.quantization
    assert found is not None and set(found.changed) == set(planned.fits)
    assert found.bytes_before - found.bytes_after == planned.saved_bytes(torch.bfloat16)
    assert isinstance(sphinx.ask(CAT, "What?", max_new_tokens=6), str)


MISTAKES: list[tuple[str, str, torch.dtype, str]] = [
    ("int3", "cpu", torch.float32, "quantize: expected one of int8, int4, nf4, got 'int3'"),
    ("nf4", "cpu", torch.float32, "quantize: nf4 is for CUDA GPUs, the device is cpu; int8 and int4 run there"),
    ("int4", "cuda", torch.float16, "quantize: int4 computes in bfloat16 on a GPU, not in float16"),
]


@pytest.mark.parametrize(("method", "device", "dtype", "message"), MISTAKES)
def test_wrong_methods_are_named(method: str, device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tiny_config(text=WIDE), method, device, dtype)


def test_models_that_cannot_be_quantised_are_named() -> None:
    with pytest.raises(ValueError, match=r"no linear layer .* fits int4: .*q_proj: width 32 is no multiple"):
        plan(tiny_config(), "int4", "cpu")
    done = tiny_config(text=WIDE)
    done.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match="quantised already"):
        plan(done, "int8", "cpu")


@pytest.mark.parametrize(("method", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, method: str, library: str) -> None:
    monkeypatch.setattr(quantize, f"is_{library}_available", lambda: False)
    planned = plan(tiny_config(text=WIDE), method, "cuda")
    with pytest.raises(ValueError, match=rf'{method} needs {library}.*pip install "sphinx-fast\[quantize\]"'):
        planned.library_config(torch.bfloat16)


def test_the_command_line(folder: Path, capsys: Any) -> None:
    arguments = ["ask", CAT, "What?", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "3"]
    assert main([*arguments, "--quantize", "int8", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("{") and captured.out.count("\n") == 1
    assert "int8: 14 linear layers of the language model quantised (" in captured.err
    assert "of weights in int8 and float32" in captured.err
    assert main([*arguments, "--quantize", "nf4"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "sphinx-fast: quantize: nf4 is for CUDA GPUs" in captured.err
