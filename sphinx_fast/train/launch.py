"""Several processes of one machine from one command; several machines are torchrun's."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from sphinx_fast.train.settings import Settings


def launch(settings: Settings, processes: int = 1, *, progress: bool = True) -> str:
    """Train in `processes` processes, one GPU each, or on a CPU its cores shared out; one line about the result.

    Under torchrun, or with one process, nothing is started.

    Raises:
        ValueError: as of the run, or more processes than GPUs.
    """
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return train(settings, progress=progress)
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    if settings.device != "cpu" and processes > torch.cuda.device_count():
        raise ValueError(
            f"processes: {processes}, but there are {torch.cuda.device_count()} GPUs; on a CPU: device=cpu"
        )
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    meeting = Path(settings.out).absolute() / ".meeting"
    meeting.parent.mkdir(parents=True, exist_ok=True)
    meeting.unlink(missing_ok=True)  # where an interrupted run met
    arguments = (processes, meeting, settings, progress, said)
    running = multiprocessing.spawn(_process, arguments, nprocs=processes, join=False)

    def pass_on(number: int, frame: Any) -> None:
        for started in running.pids():
            os.kill(started, number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while not running.join():
            pass
    except KeyboardInterrupt:  # the terminal has told all of them: each finishes its step, and the first saves
        for started in running.processes:
            started.join()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        meeting.unlink(missing_ok=True)
    kind, text = said.get()
    if kind == "error":
        raise ValueError(text)
    if kind == "interrupted":
        raise KeyboardInterrupt
    return str(text)


def train(settings: Settings, *, progress: bool = True) -> str:
    """Train in this process."""
    from sphinx_fast.train.training import Training

    training = Training(settings, progress=progress)
    folder = training.run()
    skipped = f", {training.skipped} updates skipped" if training.skipped else ""
    bad = f", {training.bad.total()} bad rows skipped" if training.bad else ""
    return f"{folder}: {training.step:,} steps{skipped}{bad}"


def _process(rank: int, world: int, meeting: Path, settings: Settings, progress: bool, said: Any) -> None:
    """What torchrun would start; they meet at a file. The first process says how it ended."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    if settings.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    backend = "gloo" if settings.device == "cpu" else "nccl"
    distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        message = ("done", train(settings, progress=progress))
    except (ValueError, OSError) as error:
        message = ("error", str(error))
    except KeyboardInterrupt:
        message = ("interrupted", "")
    finally:
        distributed.destroy_process_group()
    if rank == 0:
        said.put(message)
