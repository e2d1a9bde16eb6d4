"""Memory said before loading is the memory found after it, and loading takes no second copy."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import converted, tiny_config, tiny_model, tiny_views
from torch import nn
from transformers import DynamicCache

from sphinx_fast import Sphinx, SphinxConfig, SphinxForConditionalGeneration, preset
from sphinx_fast.weights import memory
from sphinx_fast.weights.memory import MemoryNeed, announce, device_memory, folder_need, memory_need
from sphinx_fast.weights.quantize import METHODS, human_bytes, inspect, plan, stored_bytes

CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
# As sphinx, with LLaMA-2 7B.
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def held(model: nn.Module) -> tuple[int, int, int]:
    """Bytes in vision, fusion and language model, shared weights once."""
    parts: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        parts[name.split(".")[1] if name.startswith(("model.vision_tower", "model.fusion")) else ""] += stored_bytes(
            weight
        )
    return parts["vision_tower"], parts["fusion"], parts[""]


def parts(need: MemoryNeed | None) -> tuple[int, int, int]:
    assert need is not None
    return need.vision, need.fusion, need.language


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "wide"
    tiny_model(tiny_config(text=WIDE)).save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "text", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen2"}], ids=["llama", "tied", "qwen2"]
)
def test_weights_are_as_said(dtype: torch.dtype, text: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(text=text)
    tiny_model(config).save_pretrained(tmp_path)
    model = SphinxForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert parts(folder_need(tmp_path, config, dtype)) == held(model) == parts(memory_need(config, dtype))
    assert sum(p.nbytes for p in model.parameters()) == memory_need(config, dtype).weights


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_are_as_said(wide: Path, method: str, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    config = SphinxConfig.from_pretrained(wide)
    planned = plan(config, method, CPU, dtype)
    model: Any = SphinxForConditionalGeneration.from_pretrained(
        wide, dtype=dtype, quantization_config=planned.library_config(dtype)
    )
    need = folder_need(wide, config, dtype, planned=planned)
    assert parts(need) == held(model)
    assert need is not None and need.method == method
    found = inspect(model, planned)
    plain = folder_need(wide, config, dtype)
    assert plain is not None and plain.weights - need.weights == found.bytes_before - found.bytes_after > 0


@torch.inference_mode()
def test_a_picture_takes_what_is_said() -> None:
    model = tiny_model(tiny_config(text={"num_hidden_layers": 3}))
    need = memory_need(model.config, torch.float32)
    tokens = model.model.visual_tokens(tiny_views(model.config.vision_config.num_views, 32))
    cache = DynamicCache(config=model.config.text_config)
    model(inputs_embeds=tokens.reshape(1, -1, tokens.shape[-1]), past_key_values=cache, use_cache=True)
    assert need.visual_tokens == tokens.nbytes
    assert need.keys_values == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert need.picture == need.visual_tokens + need.keys_values and need.total == need.weights + need.picture


def test_what_cannot_be_known_is_none(tmp_path: Path) -> None:
    config = tiny_config()
    assert folder_need("somebody/some-model", config, torch.float32) is None
    assert folder_need(tmp_path, config, torch.float32) is None
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert folder_need(tmp_path, config, torch.float32) is None
    assert announce(tmp_path, config, torch.float32, CPU) is None
    assert device_memory(torch.device("meta")) is None or sys.platform == "linux"


def test_it_is_said_before_loading(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def loading(*_: Any, **__: Any) -> Any:
        raise Stop

    monkeypatch.setattr(SphinxForConditionalGeneration, "from_pretrained", loading)
    with caplog.at_level(logging.INFO, logger="sphinx_fast"), pytest.raises(Stop):
        Sphinx.from_pretrained(converted("llama_ens"), device="cpu", dtype="float32")
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.message.startswith("llama_ens: ")
    assert " of weights in float32 (vision " in record.message and record.message.endswith(" free on cpu")


def test_too_much_is_a_warning_or_an_error(
    wide: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SphinxConfig.from_pretrained(wide)
    need = folder_need(wide, config, torch.float32)
    assert need is not None
    monkeypatch.setattr(memory, "device_memory", lambda _: (need.total - 1, need.weights))
    announce(wide, config, torch.float32, torch.device("cuda"))
    assert caplog.records[-1].levelname == "WARNING"
    smaller = memory_need(config, torch.bfloat16, planned=plan(config, "int4", "cuda")).weights
    for words in (
        "but only",
        "free on cuda",
        f"--quantize int4 ({human_bytes(smaller)}",
        'device_map="auto"',
        "--dtype bf",
    ):
        assert words in caplog.records[-1].message
    caplog.clear()
    announce(wide, config, torch.float32, torch.device("cuda"), spread=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    monkeypatch.setattr(memory, "device_memory", lambda _: (need.weights - 1, need.weights - 1))
    announce(wide, config, torch.float32, CPU)  # a machine can map and swap
    assert caplog.records[-1].levelname == "WARNING" and "device_map" not in caplog.records[-1].message
    with pytest.raises(ValueError, match=r"of weights in float32 .* has .* in all; try --quantize int8"):
        announce(wide, config, torch.float32, torch.device("cuda"))


def test_the_numbers_have_units() -> None:
    assert [human_bytes(n) for n in (41.24e9, 0.24e9, 5.61e6, 999)] == ["41.2 GB", "0.2 GB", "5.6 MB", "1.0 kB"]


def test_the_page_says_what_is_computed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    saved: dict[int, list[int]] = {}
    for name, config in (
        ("sphinx, 7B", preset("sphinx", text=LLAMA_7B)),
        ("sphinx, 13B", preset("sphinx")),
        ("sphinx-1k, 13B", preset("sphinx-1k")),
        ("sphinx-2k, 13B", preset("sphinx-2k")),
        ("sphinx-tiny", preset("sphinx-tiny")),
        ("sphinx-tiny-1k", preset("sphinx-tiny-1k")),
    ):
        width = config.text_config.hidden_size
        if width not in saved:
            saved[width] = [plan(config, method, "cuda").saved_bytes(torch.bfloat16) for method in METHODS]
        need = memory_need(config, torch.bfloat16)
        sizes = (need.weights, need.vision, *(need.weights - bytes_ for bytes_ in saved[width]), need.picture)
        assert f"| {' | '.join([name, *map(human_bytes, sizes)])} |" in page


CHILD = """
import json, sys, threading, time
import torch
from sphinx_fast import SphinxForConditionalGeneration
from sphinx_fast.weights.quantize import plan, stored_bytes
from sphinx_fast import SphinxConfig

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(**options):
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    model = SphinxForConditionalGeneration.from_pretrained(sys.argv[1], **options)
    done.set()
    thread.join()
    weights = sum(stored_bytes(weight) for weight in model.parameters())
    kept.append(model)
    return {"peak": max(peak[0], anonymous()) - before, "weights": weights}

kept = []
load(dtype=torch.float32)  # the libraries' own set-up
found = {"mapped": load(dtype=torch.float32), "converted": load(dtype=torch.bfloat16)}
if sys.argv[2] == "quantize":
    config = SphinxConfig.from_pretrained(sys.argv[1])
    planned = plan(config, "int8", "cpu", torch.float32)
    found["int8"] = load(dtype=torch.float32, quantization_config=planned.library_config(torch.float32))
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_the_weights_and_at_most_a_shard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**WIDE, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 2000, "num_hidden_layers": 6}
    SphinxForConditionalGeneration(tiny_config(text=text)).save_pretrained(tmp_path, max_shard_size="16MB")
    files = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(files) > 5
    try:
        import torchao  # noqa: F401

        quantize = "quantize"
    except ImportError:
        quantize = "plain"
    # glibc keeps freed blocks below 32 MiB for itself, which the layers of a real model exceed and these do not.
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), quantize],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "200000", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(child.stdout.splitlines()[-1])
    shard = max(files)
    assert found["mapped"]["peak"] < shard < found["mapped"]["weights"] / 4  # the files themselves are the weights
    assert found["converted"]["peak"] < found["converted"]["weights"] + shard < found["mapped"]["weights"]
    if quantize == "quantize":
        assert found["int8"]["peak"] < found["int8"]["weights"] + shard < found["mapped"]["weights"]
