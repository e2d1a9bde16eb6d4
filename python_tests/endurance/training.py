"""What training promises about harm, tried often: `make endurance`, or with other counts

    python python_tests/endurance/training.py [--kills 200] [--damages 300] [--rows 10000] [--seed 0]

One line of counts per promise; the exit status is 1 if one was broken.
"""

# ruff: noqa: E402 - threads are settled, and the tests' folders named, before anything is imported
from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # children are forked: no pool of threads may be there by then
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import logging
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (2, 1)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

import torch
from test_batches import spoiled, steps
from test_checkpoint import saved
from training_data import stage2

from sphinx_fast.train import checkpoint
from sphinx_fast.train.settings import make_settings
from sphinx_fast.train.training import Training

INSIDE = 0.75  # of the kills must fall into a save
PATIENCE = 60.0  # seconds that a child may go without a save


@dataclass
class Tally:
    """accepted: harmless as promised; refused: harm that was noticed as promised; other: a broken promise."""

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    other: list[str] = field(default_factory=list)

    def line(self, name: str, more: str = "") -> str:
        counts = {"tried": self.tried, "accepted": self.accepted, "refused": self.refused, "other": len(self.other)}
        said = ", ".join(f"{what} {count:,}" for what, count in counts.items())
        return f"{name}: {said}{more}" + "".join(f"\n    {what}" for what in self.other[:8])


# --- kill -9 while saving ---------------------------------------------------------------------------------------------
def train(out: Path, count: int, save_every: int) -> None:
    settings = make_settings("stage2", stage2(out, steps=count, save_every=save_every, batch=2, max_length=400))
    Training(settings, progress=False).run()


def forked(out: Path, count: int, save_every: int) -> int:
    """A child that trains: everything is imported already, so it starts at once. Returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        train(out, count, save_every)
        status = 0
    finally:
        os._exit(status)


def done(out: Path) -> int:
    """The newest step whose folder is there."""
    return max((int(folder.name.removeprefix("step-")) for folder in checkpoint.folders(out)), default=0)


def saving(out: Path) -> bool:
    return any(out.glob(".step-*.partial-*"))


def saves(out: Path, child: int) -> Iterator[Path]:
    """The folder of every save of a child as it appears; ends when the child does."""
    before = {path.name for path in out.glob(".step-*.partial-*")}  # of one that was killed
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for path in out.glob(".step-*.partial-*"):
            if path.name not in before:
                yield path
                before.add(path.name)
                until = time.monotonic() + PATIENCE
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.0005)
    raise RuntimeError(f"{out}: no save in {PATIENCE:g} s")


def kill_saves(folder: Path, kills: int, rng: Random, tally: Tally) -> str:
    """Kill a run again and again, most often while it saves; in the end it is what it is without."""
    out, count = folder / "killed", kills + 20
    inside, seconds, started = 0, 0.02, time.monotonic()
    while tally.tried < kills:
        child = forked(out, count, 1)
        skip = rng.choice((0, 0, 0, 1))  # more than one save in some: the run gets on
        for number, partial in enumerate(saves(out, child)):
            begun = time.monotonic()
            if number < skip:
                while partial.exists() and time.monotonic() < begun + PATIENCE:
                    time.sleep(0.0002)
                seconds = 0.7 * seconds + 0.3 * (time.monotonic() - begun)
                continue
            time.sleep(rng.random() * seconds * 0.9)
            seen = done(out)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            inside += partial.exists()
            break
        else:
            tally.other.append(f"the run ended by itself after {tally.tried} kills, at step {done(out)} of {count}")
            break
        tally.tried += 1
        newest = checkpoint.newest(out)
        step = 0 if newest is None else int(newest.name.removeprefix("step-"))
        if step < seen - 1:
            tally.other.append(f"kill {tally.tried}: step {seen} was there, {step} is the newest whole one")
        else:
            tally.accepted += 1
    reached = done(out)
    for where, every in ((out, 1), (folder / "straight", count)):
        _, status = os.waitpid(forked(where, count, every), 0)
        if status:
            tally.other.append(f"{where.name}: the run to the end failed with {status}")
            return ""
    names = sorted(path.name for path in (folder / "straight" / "model").iterdir())
    for name in names:
        if (out / "model" / name).read_bytes() != (folder / "straight" / "model" / name).read_bytes():
            tally.other.append(f"model/{name} is not what it is without kills")
    logged = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    if logged != list(range(count)):
        tally.other.append(f"log.jsonl: {len(logged)} lines for {count} steps")
    if saving(out):
        tally.other.append("what killed saves left is still there")
    if inside < INSIDE * kills:
        tally.other.append(f"only {inside} of {kills} kills were inside a save")
    return (
        f"; {inside} inside a save, {reached} steps reached on the way, the result equal in {len(names)} files,"
        f" {time.monotonic() - started:.0f} s"
    )


# --- damaged checkpoints ----------------------------------------------------------------------------------------------
KINDS = ("flip", "cut", "grow", "remove", "empty", "swap", "entry", "size", "stranger")


def damage(folder: Path, kind: str, rng: Random) -> str:
    """Harm one file of a checkpoint; returns the name it is to be refused by."""
    victim = rng.choice(sorted(folder.iterdir()))
    data = bytearray(victim.read_bytes())
    manifest = folder / "manifest.json"
    if kind in ("entry", "size"):
        content = json.loads(manifest.read_text())
        name = rng.choice(sorted(content))
        if kind == "entry":
            del content[name]
        else:
            content[name]["bytes"] += rng.choice((-1, 1))
        manifest.write_text(json.dumps(content, indent=1))
        return "manifest.json" if name == "state.json" and kind == "entry" else name
    if kind == "stranger":
        (folder / "trained-00001-of-00002.safetensors").write_bytes(data)
        return "trained-00001-of-00002.safetensors"
    if kind == "remove":
        victim.unlink()
        return victim.name
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "grow":
        data += b"x"
    elif kind == "empty":
        data = bytearray()
    elif kind == "swap":
        other = rng.choice([path for path in sorted(folder.iterdir()) if path != victim])
        data = bytearray(other.read_bytes())
    victim.write_bytes(data)
    return victim.name


def damage_checkpoints(folder: Path, damages: int, rng: Random, tally: Tally) -> str:
    """Each damaged checkpoint is refused by file name, and the one before it is used."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.logger.addHandler(listener)
    checkpoint.logger.propagate = False
    kinds: Counter[str] = Counter()
    for number in range(damages):
        run = folder / f"{number}"
        older, newer = saved(run, 3), saved(run, 7)
        kind = KINDS[number % len(KINDS)]
        name = damage(newer, kind, rng)
        said.clear()
        used = checkpoint.newest(run)
        tally.tried += 1
        # A changed manifest may name what is whole: then that file, or the manifest, is what is refused.
        named = [newer.name in text and "not used" in text for text in said]
        if used == older and named == [True] and (name in said[0] or name == "manifest.json"):
            tally.refused += 1
            kinds[kind] += 1
        else:
            tally.other.append(f"{number}: {kind} of {name}: {used}, {said}")
    checkpoint.logger.removeHandler(listener)
    checkpoint.logger.propagate = True
    return "; " + ", ".join(f"{kind} {count}" for kind, count in kinds.items())


# --- bad rows ---------------------------------------------------------------------------------------------------------
def count_bad_rows(folder: Path, rows: int, tally: Tally) -> str:
    """A hundredth of the rows cannot be used: those are counted by kind, the others are all trained on."""
    path, kinds = spoiled(folder, rows, rows // 100)
    data, bad = steps(path, per_step=100), Counter[str]()
    for step in range(rows // 100):
        batch = data[step]
        tally.tried += batch.read
        tally.accepted += sum(len(row.names) for row in batch.rows)
        bad += batch.bad
    tally.refused = bad.total()
    if (tally.tried, tally.accepted, bad) != (rows, rows - rows // 100, kinds):
        tally.other.append(f"expected {dict(kinds)}, counted {dict(bad)}")
    return "; " + ", ".join(f"{kind} {count}" for kind, count in sorted(bad.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=300)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, harmed = Random(arguments.seed), False
    with tempfile.TemporaryDirectory(prefix="sphinx-fast-endurance-") as name:
        for promise, count in (("kills", arguments.kills), ("damages", arguments.damages), ("rows", arguments.rows)):
            folder, tally = Path(name) / promise, Tally()
            folder.mkdir()
            if promise == "kills" and count:
                print(tally.line("killed saves", kill_saves(folder, count, rng, tally)), flush=True)
            elif promise == "damages" and count:
                print(tally.line("damaged checkpoints", damage_checkpoints(folder, count, rng, tally)), flush=True)
            elif count:
                print(tally.line("bad rows", count_bad_rows(folder, count, tally)), flush=True)
            harmed |= bool(tally.other)
    return int(harmed)


if __name__ == "__main__":
    sys.exit(main())
