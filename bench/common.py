"""One line per shape: time, GB/s, percent of the measured ceiling, ratio to each peer timed in the same run.

Calls of ours and of the peers alternate, so that a busy machine slows all of them alike; the median is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
Call = Callable[[], object]


@dataclass
class Line:
    room: str
    shape: str
    milliseconds: float
    gigabytes_per_second: float
    percent_of_ceiling: float
    ratio_to: dict[str, float] = field(default_factory=dict)  # peer -> its time / ours
    teraflops_per_second: float | None = None  # where arithmetic is the limit, not memory
    ceiling: str = "copy"
    figures: dict[str, float] = field(default_factory=dict)  # others, by name and unit

    def __str__(self) -> str:
        peers = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in self.ratio_to.items())
        tera = self.teraflops_per_second
        rate = f"{self.gigabytes_per_second:8.2f} GB/s" if tera is None else f"{tera:8.3f} TFLOP/s"
        return (
            f"{self.room:<10} {self.shape:<34} {self.milliseconds:9.3f} ms {rate} "
            f"{self.percent_of_ceiling:5.1f} % of {self.ceiling}  {peers}"
            + "".join(f"  {value:.4g} {name}" for name, value in self.figures.items())
        )


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="of torch and of the kernels; 0: torch's default")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on a shape")
    parser.add_argument("--save", action="store_true", help="append to bench/results/ with machine and commit")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    return chosen


def seconds_of(call: Call, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start_time = time.perf_counter()
    call()
    return time.perf_counter() - start_time


def median_seconds(calls: dict[str, Call], device: str, budget: float, least: int = 5) -> dict[str, float]:
    """Median seconds of each call; rounds of all calls alternate until `budget` seconds are spent, at least `least`."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            times[name].append(seconds_of(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_ceiling(device: str) -> float:
    """GB/s, read plus written, of torch's copy of a buffer that no cache holds."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]
    return 2 * source.numel() * source.element_size() / seconds / 1e9


def read_ceiling(device: str) -> float:
    """GB/s of reading two buffers that no cache holds side by side."""
    left, right = (torch.ones(2**28 if device == "cuda" else 2**26, device=device) for _ in range(2))
    seconds = median_seconds({"dot": lambda: torch.dot(left, right)}, device, 0.5)["dot"]
    return 2 * left.numel() * left.element_size() / seconds / 1e9


def measure(
    room: str,
    shape: str,
    ours: Call,
    peers: dict[str, Call],
    work: float,
    ceiling: float | str,
    chosen: argparse.Namespace,
    ceiling_name: str = "copy",
) -> Line:
    """Times ours beside its peers.

    `work` is the bytes that must be read and written at least, and `ceiling` the GB/s of a copy (or what
    `ceiling_name` says); or `work` is operations and `ceiling` the peer that does nothing but them.
    """
    seconds = median_seconds({"": ours, **peers}, chosen.device, chosen.seconds)
    rate = work / seconds[""] / 1e9
    if isinstance(ceiling, str):
        line = Line(room, shape, seconds[""] * 1e3, 0.0, 100 * seconds[ceiling] / seconds[""])
        line.teraflops_per_second, line.ceiling = rate / 1e3, ceiling
    else:
        line = Line(room, shape, seconds[""] * 1e3, rate, 100 * rate / ceiling, ceiling=ceiling_name)
    line.ratio_to = {name: seconds[name] / seconds[""] for name in peers}
    print(line, flush=True)
    return line


def machine(device: str) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def save(lines: list[Line], chosen: argparse.Namespace, name: str = "") -> None:
    """With --save: one JSON object a line to bench/results/<name, or the room>-<device>.jsonl."""
    if not chosen.save or not lines:
        return
    RESULTS.mkdir(exist_ok=True)
    about = machine(chosen.device)
    with (RESULTS / f"{name or lines[0].room}-{chosen.device}.jsonl").open("a") as file:
        for line in lines:
            file.write(json.dumps(asdict(line) | about) + "\n")
