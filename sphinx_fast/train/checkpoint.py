"""Where a run is, on disk: a folder per saved step that is whole or not there, and is checked before it is used.

    step-00000100/
      state.json                              step, counts, settings
      trained-00000-of-00002.safetensors      what learns, in fp32: this process's rows of every parameter
      optimizer-00000-of-00002.safetensors    its moments, the same rows
      manifest.json                           size and SHA-256 of every file; written last

A run goes on with any number of processes: each reads the rows it holds now from whichever files have them. Random
numbers need no file: every generator is seeded by (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from sphinx_fast.weights.files import new_folder
from sphinx_fast.weights.foreign import WeightsError, read_json

logger = logging.getLogger("sphinx_fast")

FOLDER = re.compile(r"step-(\d{8})")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def rank_and_world() -> tuple[int, int]:
    """(0, 1) without torch.distributed."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def from_first(value: Any) -> Any:
    """The first process's value, in all of them."""
    if rank_and_world()[1] == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def _shared_folder(target: Path) -> Iterator[Path]:
    """`new_folder`, made and renamed by the first process, filled by all."""
    if rank_and_world()[0] > 0:
        yield Path(from_first(None))
        distributed.barrier()  # until all have written
        distributed.barrier()  # until it is renamed
        return
    with new_folder(target) as partial:
        from_first(str(partial))
        yield partial
        if rank_and_world()[1] > 1:
            distributed.barrier()
        _write_manifest(partial)
    if rank_and_world()[1] > 1:
        distributed.barrier()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(files, indent=1))


def verify(folder: Path) -> None:
    """Raises WeightsError naming the first file that is missing, cut off, changed, or not in the manifest."""
    manifest = read_json(folder / "manifest.json")
    for name, entry in manifest.items():
        path = folder / name
        if not isinstance(entry, dict) or Path(name).name != name:
            raise WeightsError(f"{folder / 'manifest.json'}: damaged")
        if not path.is_file():
            raise WeightsError(f"{path}: missing")
        if path.stat().st_size != entry.get("bytes") or _digest(path) != entry.get("sha256"):
            raise WeightsError(f"{path}: damaged")
    if "state.json" not in manifest:
        raise WeightsError(f"{folder / 'manifest.json'}: damaged")
    for path in sorted(folder.iterdir()):
        if path.name not in manifest and path.name != "manifest.json":
            raise WeightsError(f"{path}: not in the manifest")


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place(tensor: Tensor) -> tuple[int, int]:
    """(first row, rows in all) of what this process holds. Sharded parameters are cut into equal runs of rows."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    rank, world = rank_and_world()
    rows = tensor.shape[0]
    return min(rows, rank * -(-rows // world)), rows


def save(
    folder: Path, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint; `folder` appears when all of it is on the disk. All processes call this.

    Raises:
        OSError: it cannot be written; nothing of it stays.
    """
    rank, world = rank_and_world()
    trained, moments, places = {}, {}, {}
    for name, parameter in parameters.items():
        sharded = isinstance(parameter, DTensor)
        if rank > 0 and not sharded:
            continue
        places[name] = _place(parameter)
        trained[name] = _local(parameter.detach()).cpu().contiguous()
        for key in MOMENTS:
            value = optimizer.state.get(parameter, {}).get(key)
            if value is not None:
                moments[f"{key}.{name}"] = _local(value).detach().cpu().contiguous()
    with _shared_folder(folder) as partial:
        ending = f"{rank:05d}-of-{world:05d}.safetensors"
        metadata = {"places": json.dumps(places)}
        try:
            save_file(trained, partial / f"trained-{ending}", metadata)
            save_file(moments, partial / f"optimizer-{ending}", metadata)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{folder}: {error}") from error
        if rank == 0:
            (partial / "state.json").write_text(json.dumps(state, indent=1))


class _Parts:
    """Parameters that lie in rows over several files."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.rows = folder, dict[str, list[tuple[int, Any]]]()
        self.places: dict[str, int] = {}
        for path in sorted(folder.glob(f"{stem}-*.safetensors")):
            file = safe_open(path, framework="pt")
            places = json.loads(file.metadata()["places"])
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name = key if key in places else key.partition(".")[2]
                self.rows.setdefault(key, []).append((places[name][0], file))
                self.places[key] = places[name][1]

    def read(self, key: str, first: int, count: int) -> Tensor:
        """Rows first .. first + count - 1 of a parameter."""
        pieces = []
        for start, file in sorted(self.rows[key], key=lambda entry: entry[0]):
            part = file.get_slice(key)
            rows = part.get_shape()[0]
            a, b = max(first, start), min(first + count, start + rows)
            if a < b or (rows == count == 0):
                pieces.append(part[a - start : b - start])
        return torch.cat(pieces)

    def fill(self, key: str, target: Tensor) -> None:
        """Copy what this process holds of a parameter or moment."""
        local = _local(target)
        if not local.dim():
            local.copy_(self.rows[key][0][1].get_tensor(key))
        elif local.numel():
            local.copy_(self.read(key, _place(target)[0], local.shape[0]))


def load(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read a verified checkpoint into parameters and optimizer; returns its state.

    Raises:
        WeightsError: it is of other parameters (another model, other parts that learn).
    """
    trained, moments = _Parts(folder, "trained"), _Parts(folder, "optimizer")
    for name, parameter in parameters.items():
        rows = parameter.shape[0] if parameter.dim() else 1
        if trained.places.get(name) != rows:
            raise WeightsError(f"{folder}: not of this run, {name} is missing or of another size")
    if extra := sorted(trained.rows.keys() - parameters.keys()):
        raise WeightsError(f"{folder}: not of this run, it holds {extra[0]}, which does not learn here")
    with torch.no_grad():
        for name, parameter in parameters.items():
            trained.fill(name, parameter)
            if f"step.{name}" not in moments.rows:
                continue
            state = {key: torch.zeros_like(parameter) for key in MOMENTS[:2]}
            for key, moment in state.items():
                moments.fill(f"{key}.{name}", moment)
            state["step"] = torch.zeros((), device=_local(parameter).device)  # where the fused update counts
            moments.fill(f"step.{name}", state["step"])
            optimizer.state[parameter] = state
    return read_json(folder / "state.json")


def folders(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if FOLDER.fullmatch(path.name))


def newest(run: Path) -> Path | None:
    """The newest checkpoint that is whole. Damaged ones are named in a warning and passed over."""
    return next((folder for folder in reversed(folders(run)) if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint can be used; a warning says why not."""
    try:
        verify(folder)
    except WeightsError as error:
        logger.warning("%s; the checkpoint is not used", error)
        return False
    return True


def tidy(run: Path, keep: int, last: Path) -> None:
    """Remove all but the newest `keep` checkpoints up to `last`, and what killed saves left.

    What lies behind `last` is damaged, or the run would not be at `last`: it must not count as one of those kept.
    """
    done = [folder for folder in folders(run) if folder.name <= last.name]
    for old in [*done[:-keep], *run.glob(".step-*.partial-*")]:
        shutil.rmtree(old, ignore_errors=True)
