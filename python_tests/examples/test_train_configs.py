"""The configurations of examples/train: each is read without a word, runs at toy size, and needs what it says."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_data import data_folder, start_folder

from sphinx_fast.cli import main
from sphinx_fast.data.sources import DRAWN, SOURCES, options_of
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.presets import preset
from sphinx_fast.train import estimate as module
from sphinx_fast.train.estimate import estimate
from sphinx_fast.train.settings import Stage1, Stage2, make_settings, read_settings
from sphinx_fast.weights.quantize import human_bytes

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "train"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted(FOLDER.glob("*.yaml"))
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
GPUS = (1, 8, 32)


def stage(path: Path) -> str:
    return "stage1" if path.name.startswith("stage1") else "stage2"


# --- what the files say -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_is_read(path: Path) -> None:
    settings = read_settings(stage(path), path)
    data: Any = settings.data  # type: ignore[attr-defined]
    for entry in (*data, *settings.eval_data):
        if entry.type != "meta":
            assert entry.options.keys() <= options_of(entry.type).keys()
    assert path.name in README
    assert f"train {stage(path)} examples/train/{path.name}" in path.read_text(encoding="utf-8")


def test_what_the_paper_says() -> None:
    """The files repeat the paper's numbers so that they can be seen; they must be those of the defaults."""
    real, synthetic = (read_settings("stage1", FOLDER / f"stage1-{name}.yaml") for name in ("real", "synthetic"))
    two = read_settings("stage2", FOLDER / "stage2.yaml")
    assert isinstance(real, Stage1) and isinstance(synthetic, Stage1) and isinstance(two, Stage2)
    plain = make_settings("stage1", {"model": "m", "out": "o", "data": [{"path": "p"}], "text": ["t"]})
    for name in ("optimizer", "steps", "pairs", "text_tokens", "text_length", "max_length", "caption_weight"):
        assert getattr(real, name) == getattr(synthetic, name) == getattr(plain, name)
    assert real.train == ("language_model", "fusion") and synthetic.train == ("language_model",)
    assert synthetic.model == f"{real.out}/model"
    assert (two.batch, two.max_length, two.epochs, two.picture_size) == (128, 3072, 1.0, 448)
    families = set(SOURCES) - {"image_text", "text", "openai", "webdataset", "parquet", "classes", *DRAWN}
    assert families == {entry.type for entry in two.data}
    released = read_settings("stage2", FOLDER / "stage2-released.yaml")
    assert released.optimizer.weight_decay == 0.0 and isinstance(released, Stage2) and released.batch == 16


@pytest.fixture(scope="module", autouse=True)
def shapes_once() -> Iterator[None]:
    """The shapes of a large model take seconds, and are the same for any settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SphinxConfig, "__hash__", object.__hash__)
        for name in ("on_disk_shapes", "plan"):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


# --- what they need ---------------------------------------------------------------------------------------------------
@functools.cache
def model(name: str) -> SphinxConfig:
    return {
        "13B": lambda: preset("sphinx-1k"),
        "7B": lambda: preset("sphinx-1k", text=LLAMA_7B),
        "Tiny-1k": lambda: preset("sphinx-tiny-1k"),
    }[name]()


def needed(name: str, settings: Any) -> list[str]:
    return [human_bytes(estimate(model(name), settings, world=n, dtype=torch.bfloat16).total) for n in GPUS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_memory_it_names(path: Path) -> None:
    lines = re.findall(r"^#   (\S+)((?: +[\d.]+ GB){3})$", path.read_text(encoding="utf-8"), re.M)
    assert [name for name, _ in lines] == ["13B", "7B", "Tiny-1k"]
    settings = read_settings(stage(path), path)
    for name, said in lines:
        assert re.findall(r"[\d.]+ GB", said) == needed(name, settings), name


def test_the_table_of_memory() -> None:
    rows = re.findall(r"^\| (\S+) \| (.+?) \| ([\d.]+ GB) \| ([\d.]+ GB) \| ([\d.]+ GB) \|$", README, re.M)
    changes: dict[str, list[str]] = {
        "everything": [],
        "everything, `scale.checkpoint=false`": ["scale.checkpoint=false"],
        "`lora.yaml`": ["lora.rank=16"],
        "`qlora.yaml`": ["lora.rank=16", "quantize=nf4"],
    }
    assert [row[:2] for row in rows] == [(name, kind) for name in ("13B", "7B", "Tiny-1k") for kind in changes]
    for name, kind, *said in rows:
        assert list(said) == needed(name, read_settings("stage2", FOLDER / "stage2.yaml", changes[kind])), (name, kind)


def test_views_do_not_count() -> None:
    """SPHINX and SPHINX-1k have the same weights, and the same rows."""
    settings = read_settings("stage2", FOLDER / "stage2.yaml")
    of = [estimate(c, settings, world=8, dtype=torch.bfloat16) for c in (preset("sphinx"), model("13B"))]
    assert of[0] == of[1]


# --- how they run -----------------------------------------------------------------------------------------------------
SMALL = ["device=cpu", "workers=0", "report=null", "steps=2", "save_every=100"]


def train(name: str, start: Path, out: Path, *changes: str) -> Path:
    """A file's run of two steps on tiny data; the result's folder."""
    path = FOLDER / f"{name}.yaml"
    given = [f"model={start}", f"out={out}", *SMALL, *changes]
    assert main(["train", stage(path), str(path), *given, "--quiet"]) == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    return out / "model"


def rows(*entries: dict[str, Any]) -> str:
    return f"data={json.dumps(entries)}"


def stage_one(*changes: str) -> list[str]:
    data = rows({"path": str(data_folder() / "captions.jsonl")})
    sizes = ["pairs=4", "text_tokens=96", "text_length=48", "max_length=160"]
    sizes += ["optimizer.rate=1e-3", "optimizer.warmup_steps=1"]
    return [data, f"text=[{data_folder() / 'corpus.txt'}]", *sizes, *changes]


def stage_two(*changes: str) -> list[str]:
    data = rows(*({"path": str(data_folder() / f"{name}.jsonl")} for name in ("talk", "plain")))
    return [data, "batch=4", "max_length=700", *changes]


def test_the_papers_workflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 1 twice, the mean of the two, stage 2, what follows it; asked at the end."""
    real = train("stage1-real", start_folder(), tmp_path / "real", *stage_one())
    synthetic = train("stage1-synthetic", real, tmp_path / "synthetic", *stage_one())
    mixed, swept = tmp_path / "mixed", tmp_path / "sweep"
    assert main(["mix", "--beta", "0.5", str(real), str(synthetic), str(mixed), "--quiet"]) == 0
    captions, talk = (str(data_folder() / f"{name}.jsonl") for name in ("captions", "talk"))
    measured = ["--data", f"real={captions}", "--data", f"syn={talk}", "--rows", "4", "--device", "cpu", "--quiet"]
    capsys.readouterr()
    assert main(["mix", "--sweep", "0,0.5,1", *measured, str(real), str(synthetic), str(swept)]) == 0
    assert capsys.readouterr().out.count("\n|") >= 4 and (swept / "sweep.svg").is_file()

    two = train("stage2", mixed, tmp_path / "two", *stage_two("picture_size=64"))
    classes = rows({"path": str(class_folder(tmp_path)), "type": "classes"})
    few = ["picture_size=32", "batch=4", "max_length=160", "eval_every=0", "eval_data=[]"]
    train("imagenet", two, tmp_path / "imagenet", classes, *few)
    assert json.loads((tmp_path / "imagenet/model/config.json").read_text())["vision_config"]["picture_size"] == 32
    adapted = train("lora", two, tmp_path / "lora", *stage_two("lora.rank=2"))
    assert (tmp_path / "lora/adapter/adapter_model.safetensors").is_file()
    picture = str(data_folder() / "pictures/0.png")
    asked = ["ask", picture, "What is in the image?", "--device", "cpu", "--max-new-tokens", "3"]
    for folder in (two, adapted):
        assert main([*asked, "--model", str(folder)]) == 0


def class_folder(tmp_path: Path) -> Path:
    """ImageNet's form: a folder of class folders."""
    folder = tmp_path / "classes"
    for number in range(8):
        target = folder / ("tench", "snail")[number % 2] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data_folder() / f"pictures/{number}.png", target)
    return folder


def test_the_released_list(tmp_path: Path) -> None:
    listed = [{"path": str(data_folder() / "talk.jsonl"), "type": "image_text", "ratio": 0.5}]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"META": listed}))
    changes = [f"data.0.path={tmp_path / 'data.yaml'}", "batch=4", "max_length=700"]
    train("stage2-released", start_folder(), tmp_path / "released", *changes)


@pytest.mark.parametrize(("name", "changes"), [("stage2", []), ("qlora", ["device=null"])])
def test_a_dry_run_says_what_is_needed(name: str, changes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Four-bit weights train on a GPU only; what they would need is known without one."""
    path, size = FOLDER / f"{name}.yaml", "picture_size=64"
    given = [f"model={start_folder()}", "out=nowhere", "workers=0", *stage_two(size, *changes)]
    assert main(["train", "stage2", str(path), *given, "--dry-run", "--processes", "8"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("learns", "memory", "first step", "8 processes"))
