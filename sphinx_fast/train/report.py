"""What a run says while it runs: a progress bar, log.jsonl, and TensorBoard or wandb."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import resource
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

logger = logging.getLogger("sphinx_fast")
RECENT = 20  # steps that speeds are averaged over


class _Writer(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start)  # an interrupted run does its last steps again

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        # By its whole path: two runs may lie in folders of one name.
        mark = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(dir=str(folder), name=folder.name, config=settings, resume="allow", id=mark)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _writer(kind: str | None, folder: Path, settings: dict[str, Any], start: int) -> _Writer | None:
    """TensorBoard is the default, so a machine without it only hears of it; wandb was asked for by name."""
    if kind == "wandb":
        try:
            return _Wandb(folder, settings)
        except ImportError as error:
            raise ValueError("report: wandb is not installed: pip install wandb") from error
    if kind == "tensorboard":
        try:
            return _TensorBoard(folder / "tensorboard", start)
        except ImportError:
            logger.warning("report: tensorboard is not installed; log.jsonl is written all the same")
    return None


def device_memory_used(device: torch.device) -> float:
    """GiB: the largest that torch held on a GPU, or that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Report:
    """One line per step in log.jsonl, the same to the writer, and a bar. Only the first process has one that speaks."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        start: int,
        steps: int,
        device: torch.device,
        peak: float | None,
        kind: str | None,
        speaks: bool,
        progress: bool,
    ) -> None:
        self.device, self.peak = device, peak
        self._recent: deque[tuple[float, dict[str, float]]] = deque(maxlen=RECENT)
        self._since = time.perf_counter()
        self._file, self._writer = None, None
        if speaks:
            path = folder / "log.jsonl"
            forget(path, start)
            self._file = path.open("a", encoding="utf-8")
            self._writer = _writer(kind, folder, settings, start)
        self._bar = tqdm(total=steps, initial=start, desc=folder.name, disable=not (speaks and progress))

    def step(self, step: int, values: dict[str, float], work: dict[str, float]) -> None:
        """`values` of a step, and its `work`: tokens, pictures, flops, language_flops."""
        now = time.perf_counter()
        self._recent.append((now - self._since, work))
        self._since = now
        seconds = sum(entry[0] for entry in self._recent)
        rates = {name: sum(entry[1][name] for entry in self._recent) / seconds for name in work}
        speed = {
            "seconds": self._recent[-1][0],
            "tokens_per_second": rates["tokens"],
            "pictures_per_second": rates["pictures"],
            "tflops": rates["flops"] / 1e12,
            "memory_gib": device_memory_used(self.device),
        }
        if self.peak:
            speed |= {"mfu": rates["flops"] / self.peak, "language_mfu": rates["language_flops"] / self.peak}
        self.write(step, {**values, **speed})
        self._bar.update()
        shown = {k: f"{v:.3g}" for k, v in values.items() if k.endswith("loss") or k == "rate"}
        shown |= {"tok/s": f"{rates['tokens']:,.0f}", "pic/s": f"{rates['pictures']:.1f}"}
        shown |= {"MFU": f"{speed['mfu']:.1%}"} if self.peak else {"TFLOP/s": f"{speed['tflops']:.2f}"}
        self._bar.set_postfix({**shown, "GiB": f"{speed['memory_gib']:.1f}"}, refresh=False)

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line of the log."""
        if self._file is not None:
            said = {k: float(f"{v:.8g}") if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
            self._file.write(json.dumps({"step": step, **said}) + "\n")
            self._file.flush()
        if self._writer is not None:
            self._writer.log(values, step)

    def say(self, text: str) -> None:
        """A sentence above the bar."""
        if self._file is not None:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()


def forget(path: Path, start: int) -> None:
    """Drop the lines of steps from `start` on: an interrupted run logged them and will do them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < start:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill
    part = path.with_suffix(".part")  # renamed, so that a kill leaves the one log or the other
    part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    part.replace(path)
