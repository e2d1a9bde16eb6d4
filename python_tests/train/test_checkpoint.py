"""A run on disk: whole or not there, checked when read, the same for any number of processes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from sphinx_fast.train import checkpoint
from sphinx_fast.weights.foreign import WeightsError


def model(seed: int = 0) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    parameters = {
        name: nn.Parameter(torch.randn(shape)) for name, shape in (("a", (5, 3)), ("b", (4,)), ("c", (1, 1, 6)))
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for parameter in list(parameters.values())[:2]:  # the third was never touched
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return parameters, optimizer


def saved(run: Path, step: int = 7) -> Path:
    folder = run / f"step-{step:08d}"
    checkpoint.save(folder, {"step": step}, *model(step))
    return folder


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    parameters, optimizer = model(7)
    folder = saved(tmp_path)
    checkpoint.verify(folder)
    others, theirs = model(1)
    theirs.state.clear()
    assert checkpoint.load(folder, others, theirs) == {"step": 7}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name])
        assert optimizer.state.get(parameter, {}).keys() == theirs.state.get(others[name], {}).keys()
        for key, value in optimizer.state.get(parameter, {}).items():
            assert torch.equal(value, theirs.state[others[name]][key])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007"]


def test_of_another_model(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    parameters, optimizer = model()
    fewer = {name: parameter for name, parameter in parameters.items() if name != "b"}
    with pytest.raises(WeightsError, match="holds b, which does not learn here"):
        checkpoint.load(folder, fewer, optimizer)
    with pytest.raises(WeightsError, match="d is missing or of another size"):
        checkpoint.load(folder, {**parameters, "d": parameters["a"]}, optimizer)
    with pytest.raises(WeightsError, match="a is missing or of another size"):
        checkpoint.load(folder, {**parameters, "a": nn.Parameter(torch.zeros(6, 3))}, optimizer)


DAMAGE = ["flip", "cut", "grow", "remove", "empty", "swap"]


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_checkpoint_is_refused_by_file_name(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = Random(seed)
    older, newer = saved(tmp_path, 3), saved(tmp_path, 7)
    victim = rng.choice(sorted(newer.iterdir()))
    data = bytearray(victim.read_bytes())
    kind = DAMAGE[seed % len(DAMAGE)]
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "grow":
        data += b"x"
    elif kind == "swap":
        data = bytearray(rng.choice([p for p in sorted(newer.iterdir()) if p != victim]).read_bytes())
    victim.write_bytes(b"" if kind == "empty" else data)
    if kind == "remove":
        victim.unlink()
    if json_alike(victim, older):
        return  # the flip fell on a blank of the manifest: nothing is damaged
    with caplog.at_level(logging.WARNING, logger="sphinx_fast"):
        assert checkpoint.newest(tmp_path) == older
    assert "step-00000007" in caplog.text and "not used" in caplog.text
    if victim.name != "manifest.json":
        assert victim.name in caplog.text


def json_alike(victim: Path, older: Path) -> bool:
    """Whether a damaged manifest still says the same."""
    if victim.name != "manifest.json" or not victim.is_file():
        return False
    try:
        checkpoint.verify(victim.parent)
    except WeightsError:
        return False
    return json.loads(victim.read_text()).keys() == json.loads((older / "manifest.json").read_text()).keys()


def test_all_damaged(tmp_path: Path) -> None:
    for step in (3, 7):
        (saved(tmp_path, step) / "state.json").unlink()
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_an_interrupted_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = saved(tmp_path, 3)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    assert checkpoint.newest(tmp_path) == older


def test_tidy(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        saved(tmp_path, step)
    (tmp_path / ".step-00000011.partial-99").mkdir()
    (tmp_path / "model").mkdir()
    checkpoint.tidy(tmp_path, 2, tmp_path / "step-00000010")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "step-00000003", "step-00000010"]


@pytest.mark.parametrize("files", [1, 2, 3, 7])
def test_rows_lie_in_any_number_of_files(tmp_path: Path, files: int) -> None:
    """What several processes wrote, read whole: as after a run went on with fewer of them."""
    from safetensors.torch import save_file

    whole = torch.arange(15.0).view(5, 3)
    rows = -(-5 // files)
    for rank in range(files):
        part = whole[rank * rows : (rank + 1) * rows].contiguous()
        first = min(5, rank * rows)
        metadata = {"places": json.dumps({"a": [first, 5]})}
        save_file({"a": part}, tmp_path / f"trained-{rank:05d}-of-{files:05d}.safetensors", metadata)
    parts = checkpoint._Parts(tmp_path, "trained")
    for first in range(5):
        for count in range(1, 6 - first):
            assert torch.equal(parts.read("a", first, count), whole[first : first + count])
    shutil.rmtree(tmp_path)


def test_a_file_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 3), saved(tmp_path, 7)
    manifest = json.loads((newer / "manifest.json").read_text())
    del manifest["optimizer-00000-of-00001.safetensors"]
    (newer / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=r"optimizer-00000-of-00001\.safetensors: not in the manifest"):
        checkpoint.verify(newer)
    assert checkpoint.newest(tmp_path) == older


def test_what_lies_behind_is_not_counted_as_kept(tmp_path: Path) -> None:
    for step in (3, 5, 7):
        saved(tmp_path, step)
    (tmp_path / "step-00000007" / "state.json").unlink()
    checkpoint.tidy(tmp_path, 1, tmp_path / "step-00000005")
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step-00000005", "step-00000007"]


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="step-00000007: I/O error: No space left"):
        saved(tmp_path, 7)
    assert not list(tmp_path.iterdir())
