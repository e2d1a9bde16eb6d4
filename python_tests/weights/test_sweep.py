"""The sweep: every beta from both folders, the minimum where the closed form has it, a table and a readable plot."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sphinx_fast import EMBEDDED_MODEL, SphinxForConditionalGeneration
from sphinx_fast.cli import main
from sphinx_fast.weights import sweep as sweep_module
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.mix import PARTS, mix
from sphinx_fast.weights.sweep import Point, best, parse_betas, sweep, table, write_report
from sphinx_fast.weights.sweep_figure import draw

NORM = "model.language_model.norm.weight"


def write(folder: Path, dtype: torch.dtype, shift: float) -> Path:
    """sphinx-mini in another dtype, its language model shifted."""
    shutil.copytree(EMBEDDED_MODEL, folder)
    weights = {key: value.to(dtype) for key, value in load_file(folder / "model.safetensors").items()}
    for key in filter(lambda key: key.startswith(PARTS["llm"]), weights):
        weights[key] = weights[key] + shift
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """fp32: real = mini + 1, syn = mini."""
    root = tmp_path_factory.mktemp("sweep")
    return [write(root / name, torch.float32, shift) for name, shift in (("real", 1.0), ("syn", 0.0))]


@pytest.fixture(scope="module")
def mini() -> Tensor:
    return load_file(EMBEDDED_MODEL / "model.safetensors")[NORM].float()


def distances(mini: Tensor) -> Any:
    """theta = mini + beta, so the losses are (beta - 0.3)^2 and (beta - 0.8)^2, and their mean is least at 0.55."""

    def losses(model: Any) -> dict[str, float]:
        shift = float((model.model.language_model.norm.weight.detach().cpu() - mini).mean())
        return {"near syn": (shift - 0.3) ** 2, "near real": (shift - 0.8) ** 2}

    return losses


def test_betas_as_decimals() -> None:
    tenths = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert parse_betas("0,0.1,...,1") == tenths == parse_betas(" 0, .1 ,... , 1.0")
    assert parse_betas("1,0.9,...,0") == tenths[::-1]
    assert parse_betas("0.2,0.5,1") == [0.2, 0.5, 1.0]
    assert parse_betas("0,0.5,...,1") == [0, 0.5, 1]
    assert parse_betas("0,0.1,...,0.3,0.5,...,0.9,1") == [0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1]
    assert parse_betas("0,0.001,...,1") == [index / 1000 for index in range(1001)]
    assert parse_betas("0.5") == parse_betas("0.5,0.50") == [0.5]


@pytest.mark.parametrize(
    "text",
    [
        *["", "a", "0,,1", "nan", "0,inf", "-0.1", "1.1", "...", "0,...,1", "0,0.1,...", "...,0,1", "0,0.3,...,1"],
        *["0.5,0.5,...,1", "0.5,0.4,...,1", "0,0.1,...,1.1", "0,0.1,...,...,1", "0,1e-9,...,1", "0,1e-9999999,...,1"],
    ],
)
def test_bad_betas(text: str) -> None:
    with pytest.raises(ValueError, match=r"^sweep: [^\n]+$"):
        parse_betas(text)


def test_the_minimum_is_found(folders: list[Path], mini: Tensor) -> None:
    betas = parse_betas("0,0.05,...,1")
    points = sweep(folders, betas, distances(mini), device="cpu")
    assert [point.beta for point in points] == betas
    for beta, losses in points:
        assert losses["near syn"] == pytest.approx((beta - 0.3) ** 2, abs=1e-6)
        assert losses["near real"] == pytest.approx((beta - 0.8) ** 2, abs=1e-6)
    assert best(points) == {"near syn": 0.3, "near real": 0.8, "mean": 0.55}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_those_of_the_mixed_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    """At every beta, whatever was before it; the folders' files stay as they are."""
    sources = [write(tmp_path / name, dtype, shift) for name, shift in (("real", 0.37), ("syn", 0.0))]
    digests = [hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() for folder in sources]
    seen: list[dict[str, Tensor]] = []

    def losses(model: Any) -> dict[str, float]:
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"any": 0.0}

    betas = [1.0, 0.3, 0.0, 0.7, 0.3, 1.0]
    sweep(sources, betas, losses, device="cpu")
    for beta, state in zip(betas, seen, strict=True):
        target = tmp_path / f"new-{beta}"
        if not target.exists():
            mix(sources, [beta, 1 - beta], target)
        loaded = SphinxForConditionalGeneration.from_pretrained(target, dtype=seen[0][NORM].dtype).state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(state[key], loaded[key]) for key in loaded)
    real = load_file(sources[0] / "model.safetensors")
    assert torch.equal(seen[0]["lm_head.weight"], real["lm_head.weight"].to(seen[0]["lm_head.weight"].dtype))
    assert digests == [hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() for folder in sources]


def test_tied_embeddings_are_written_once(folders: list[Path], tmp_path: Path) -> None:
    sources = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    embedding = load_file(sources[0] / "model.safetensors")["model.language_model.embed_tokens.weight"]
    for folder in sources:
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config))
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def losses(model: Any) -> dict[str, float]:
        assert model.lm_head.weight is model.get_input_embeddings().weight
        return {"any": float((model.lm_head.weight.detach() - embedding).abs().max())}

    points = sweep(sources, [1.0, 0.5, 1.0], losses, device="cpu")
    assert [point.losses["any"] for point in points] == [0.0, pytest.approx(0.5, abs=1e-5), 0.0]


def test_fused_weights_are_refused(folders: list[Path], mini: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.clone() if key == NORM else value for key, value in state.items()}

    monkeypatch.setattr(sweep_module, "revert_weight_conversion", copies)
    with pytest.raises(WeightsError, match=r"norm\.weight is fused when loaded"):
        sweep(folders, [0.5], distances(mini), device="cpu")


def test_refusals(folders: list[Path], mini: Tensor) -> None:
    with pytest.raises(ValueError, match="two folders, got 3"):
        sweep([*folders, folders[0]], [0.5], distances(mini))
    with pytest.raises(ValueError, match=r"betas from 0 to 1, got 1\.5"):
        sweep(folders, [0.5, 1.5], distances(mini))
    names = iter("ab")
    with pytest.raises(ValueError, match="are of other domains"):
        sweep(folders, [0.5, 0.6], lambda model: {next(names): 0.0}, device="cpu")
    with pytest.raises(ValueError, match="are of other domains"):
        sweep(folders, [0.5], lambda model: {}, device="cpu")


# --- table and plot ---------------------------------------------------------------------------------------------------
POINTS = [
    Point(0.0, {"real": 3.0, "a|b": 1.0}),
    Point(0.5, {"real": math.nan, "a|b": 1.5}),
    Point(1.0, {"real": 2.0, "a|b": 4.0}),
]


def test_table_marks_the_least() -> None:
    assert table(POINTS).splitlines() == [
        "| beta |       real |       a\\|b |       mean |",
        "| ---: | ---------: | ---------: | ---------: |",
        "|    0 |     3.0000 | **1.0000** | **2.0000** |",
        "|  0.5 |        nan |     1.5000 |        nan |",
        "|    1 | **2.0000** |     4.0000 |     3.0000 |",
    ]
    one = [Point(0.5, {"x": math.nan})]
    assert best(one) == {} and "mean" not in table(one)


def test_report_of_losses_that_are_not_finite(tmp_path: Path) -> None:
    write_report(POINTS, ["some/real", "some/syn"], tmp_path / "new", parts="llm")
    record = json.loads((tmp_path / "new/sweep.json").read_text(), parse_constant=pytest.fail)
    assert record["folders"] == ["real", "syn"] and record["best"] == {"real": 1.0, "a|b": 0.0, "mean": 0.0}
    assert record["rows"][1] == {"beta": 0.5, "losses": {"real": None, "a|b": 1.5, "mean": None}}
    assert table(POINTS) in (tmp_path / "new/sweep.md").read_text()
    with pytest.raises(FileExistsError, match="exists already"):
        write_report(POINTS, ["a", "b"], tmp_path / "new", parts="llm")


@pytest.mark.parametrize(
    "lines",
    [
        {"<x> & y": [(b / 10, (b / 10 - 0.3) ** 2) for b in range(11)], "mean": [(0.0, 1.0), (1.0, 0.5)]},
        {"one": [(0.5, 2.0)]},
        {"flat": [(0.0, 2.0), (1.0, 2.0)]},
        {"none": [(0.0, math.nan), (1.0, math.inf)]},
        {f"d{i}": [(0.0, 1e-4 * i), (0.001, 2e4)] for i in range(10)},
    ],
)
def test_plot_is_well_formed(lines: dict[str, list[tuple[float, float]]]) -> None:
    root = ElementTree.fromstring(draw("a <title>", lines, {name: points[0][0] for name, points in lines.items()}))
    space = "{http://www.w3.org/2000/svg}"
    shown = {name: [p for p in points if math.isfinite(p[1])] for name, points in lines.items()}
    drawn = root.findall(f"{space}polyline")
    assert len(drawn) == sum(bool(points) for points in shown.values())
    places = [tuple(map(float, pair.split(","))) for line in drawn for pair in (line.get("points") or "").split()]
    assert len(places) == sum(map(len, shown.values()))
    assert all(70 <= x <= 570 and 40 <= y <= 360 for x, y in places)
    texts = [text.text for text in root.findall(f"{space}text")]
    assert {"a <title>", "beta", "loss", *(name for name, points in shown.items() if points)} <= set(texts)
    numbers = [text for text in texts if text and text.replace(".", "").replace("-", "").isdigit()]
    assert 4 <= len(numbers) <= 20 and len(set(numbers)) > 3
    assert len([dot for dot in root.findall(f"{space}circle") if dot.get("r") == "5"]) <= len(drawn)


# --- the command ------------------------------------------------------------------------------------------------------
@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch, mini: Tensor) -> list[Any]:
    """A stand-in for the loss of held-out rows; the calls it got."""
    calls: list[Any] = []

    def held_out_losses(model: Any, processor: Any, files: Mapping[str, Path], *, rows: int = 256) -> dict[str, float]:
        calls.append((type(processor).__name__, dict(files), rows))
        return dict(zip(files, distances(mini)(model).values(), strict=False))

    stand_in = SimpleNamespace(held_out_losses=held_out_losses)
    monkeypatch.setitem(sys.modules, "sphinx_fast.train.held_out", stand_in)  # type: ignore[arg-type]
    return calls


def test_sweep_command(folders: list[Path], tmp_path: Path, held_out: list[Any], capsys: Any) -> None:
    files = [tmp_path / name for name in ("scenes.jsonl", "other=.jsonl")]
    for file in files:
        file.write_text("{}\n")
    target = tmp_path / "new"
    options = ["--sweep", "0,0.1,...,1", "--data", str(files[0]), "--data", f"photos={files[1]}", "--rows", "8"]
    assert main(["mix", *options, "--device", "cpu", "--quiet", *map(str, folders), str(target)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].replace(" ", "") == "|beta|scenes|photos|mean|" and len(out.splitlines()) == 14
    assert out.splitlines()[-1].startswith("least: scenes at 0.3, photos at 0.8, mean at 0.")
    assert held_out == [("SphinxProcessor", {"scenes": files[0], "photos": files[1]}, 8)] * 11
    assert sorted(path.name for path in target.iterdir()) == ["sweep.json", "sweep.md", "sweep.svg"]
    assert [row["beta"] for row in json.loads((target / "sweep.json").read_text())["rows"]] == parse_betas(
        "0,0.1,...,1"
    )
    assert main(["mix", "--sweep", "0.5", "--data", str(files[0]), "--device", "cpu", *map(str, folders)]) == 0
    out, err = capsys.readouterr()
    assert "| beta | scenes |" not in err and "|  0.5 | **0.0400** |" in out and "sweep: 100%" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "0,2"], "sweep: expected numbers from 0 to 1"),
        (["--sweep", "0.5"], "--sweep needs --data FILE"),
        (["--sweep", "0.5", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--sweep", "0.5", "--data", "x=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--sweep", "0.5", "--data", "DATA", "--data", "data=DATA"], "'data' cannot name two domains"),
        (["--sweep", "0.5", "--data", "mean=DATA"], "'mean' cannot name a domain"),
        (["--sweep", "0.5", "--data", "DATA", "--rows", "0"], "--rows of at least 1, got 0"),
        (["--sweep", "0.5", "--data", "DATA", "more", "more"], "takes two folders and perhaps one to create, got 5"),
    ],
)
def test_sweep_mistakes_are_one_line(
    folders: list[Path], tmp_path: Path, held_out: list[Any], options: list[str], message: str, capsys: Any
) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    options = [option.replace("DATA", str(tmp_path / "data.jsonl")) for option in options]
    target = tmp_path / "new"
    extra = options[-2:] if options[-1] == "more" else []
    options = options[: len(options) - len(extra)]
    assert main(["mix", *options, *map(str, folders), str(target), *extra]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not held_out and [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_sweep_does_not_replace(folders: list[Path], tmp_path: Path, held_out: list[Any], capsys: Any) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    options = ["--sweep", "0.5", "--data", str(tmp_path / "data.jsonl")]
    assert main(["mix", *options, *map(str, folders), str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err and not held_out
    assert main(["mix", *options, str(folders[0]), "somebody/model"]) == 1
    assert "somebody/model: no such folder" in capsys.readouterr().err
