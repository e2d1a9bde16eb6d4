"""A run: everything it needs is built from its settings, then steps follow each other until the end, Ctrl-C or harm."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_fast.data.record import BAD_ROWS
from sphinx_fast.train import checkpoint
from sphinx_fast.train.batches import Batch, batches
from sphinx_fast.train.flops import peak
from sphinx_fast.train.order import mixed
from sphinx_fast.train.packing import Row, nothing
from sphinx_fast.train.parts import Parts, build
from sphinx_fast.train.pieces import IGNORED
from sphinx_fast.train.report import Report
from sphinx_fast.train.settings import Settings

logger = logging.getLogger("sphinx_fast")

BAD_SHARE = 0.05  # of rows read, more stop the run ...
BAD_FEW = 10  # ... but not so few
IN_A_ROW = 3  # updates that are not finite


class TrainingStoppedError(ValueError):
    """The run stopped itself: one line that says why. Its last checkpoint is whole."""


class Training:
    """One run.

    >>> training = Training(read_settings("stage2", "config.yaml"))
    >>> training.run()                        # goes on from the newest whole checkpoint in settings.out

    Attributes:
        step: the next one to be done.
        learner, optimizer, schedule, parameters: what learns, by name.
    """

    def __init__(self, settings: Settings, *, progress: bool = True) -> None:
        self.settings, self.progress = settings, progress
        self.folder = Path(settings.out)
        self.parts: Parts = build(settings, progress=progress)
        self.machine = self.parts.machine
        self.learner, self.parameters = self.parts.learner, self.parts.parameters
        self.optimizer, self.schedule = self.parts.optimizer, self.parts.schedule
        self.steps = self.parts.reading.length.steps
        self.step = 0
        self.read = 0
        self.bad: Counter[str] = Counter()
        self.skipped = self.in_a_row = 0
        self._asked = False  # to stop
        self._saved: Path | None = None  # the checkpoint of the step that is reached, if there is one

    # --- state -----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """What a checkpoint says besides weights and moments."""
        return {
            "step": self.step,
            "read": self.read,
            "bad": dict(self.bad),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "seed": self.settings.seed,
            "data": self.parts.reading.mark,
            "settings": dataclasses.asdict(self.settings),
        }

    def save(self) -> Path:
        """A checkpoint of the step reached."""
        target = self.folder / f"step-{self.step:08d}"
        if target != self._saved:
            if self.machine.first:  # a folder that is there already is one that could not be resumed from
                shutil.rmtree(target, ignore_errors=True)
            checkpoint.save(target, self.state(), self.parameters, self.optimizer)
            self._saved = target
        if self.machine.first:
            checkpoint.tidy(self.folder, self.settings.keep, target)
        return target

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one.

        Raises:
            ValueError: it is of a run with other data, seed or length, which could not go on exactly, or that went
                further than this one is to go.
        """
        found = checkpoint.from_first(checkpoint.newest(self.folder) if self.machine.first else None)
        if found is None:
            return False
        state = checkpoint.load(found, self.parameters, self.optimizer)
        for name, here in (("seed", self.settings.seed), ("data", self.parts.reading.mark)):
            if state[name] != here:
                raise ValueError(f"{found}: is of a run with another {name}; give another `out`, or remove it")
        if state["step"] > self.steps:
            raise ValueError(f"{found}: is of step {state['step']:,}, the run has {self.steps:,}; raise steps")
        self._saved = found
        self.step, self.read, self.skipped = state["step"], state["read"], state["skipped"]
        self.bad, self.in_a_row = Counter(state["bad"]), state["in_a_row"]
        return True

    # --- steps -----------------------------------------------------------------------------------------------------
    def run(self, until: int | None = None) -> Path | None:
        """Train to the end (or to step `until`), saving on the way; returns the folder of the result, if it got there.

        Raises:
            TrainingStoppedError: too many bad rows, or three updates in a row that were not finite.
            KeyboardInterrupt: Ctrl-C or SIGTERM, after the step that was running was finished and saved.
        """
        resumed = self.resume()
        end = self.steps if until is None else min(until, self.steps)
        if self.machine.first:
            self.folder.mkdir(parents=True, exist_ok=True)
        report = Report(
            self.folder,
            dataclasses.asdict(self.settings),
            start=self.step,
            steps=self.steps,
            device=self.machine.device,
            peak=peak(self.machine.device),
            kind=self.settings.report,
            speaks=self.machine.first,
            progress=self.progress,
        )
        if resumed:
            report.say(f"{self.folder}: goes on at step {self.step:,}")
        self.learner.train()
        try:
            with self._signals():
                for batch in batches(self.parts.reading.steps, self.step, end, self.settings.workers):
                    self._one(batch, report)
                    if self.machine.summed(torch.tensor(float(self._asked), device=self.machine.device)):
                        self.save()
                        raise KeyboardInterrupt
                if self.step and not until:
                    self.save()
        finally:
            report.close()
        return self.parts.export(self.folder / "model") if self.step >= self.steps else None

    def _one(self, batch: Batch, report: Report) -> None:
        """One step, with what comes after it."""
        values = self.update(batch)
        report.step(batch.step, values, self.parts.work(batch))
        for message in batch.messages:
            logger.warning("row skipped: %s", message)
        if self.in_a_row:
            report.say(f"step {batch.step:,}: not finite, no update; rows: {', '.join(self._culprits[:8])}")
        self._stop_if_harmed()
        every = self.settings.eval_every
        if every and (self.step % every == 0 or self.step == self.steps):
            losses = {f"held_out/{name}": loss for name, loss in self.parts.held_out().items()}
            report.write(batch.step, losses)
            report.say(f"step {self.step:,}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        if self.step % self.settings.save_every == 0 and self.step < self.steps:
            self.save()

    def update(self, batch: Batch) -> dict[str, float]:
        """Forward and backward over the batch's rows, then one update; returns losses, rate and gradient norm.

        The loss of a kind is the weighted mean over its targets in the whole step, on all processes; the step's loss
        is the weighted sum of the kinds. A step whose loss or gradient is not finite changes nothing.
        """
        rate = self.schedule(self.step)
        torch.manual_seed(mixed(self.settings.seed, self.step, self.machine.rank) >> 1)
        totals, rows = self._totals(batch)
        coefficients = self.parts.kind_weights / totals.clamp(min=1e-12)
        sums = torch.zeros_like(totals)
        culprits: list[str] = []
        for index in range(batch.rounds):
            row = rows[index] if index < len(rows) else nothing().to(self.machine.device)
            losses, pointed = self._backward(row, coefficients)
            asked = row.targets != IGNORED
            sums.index_add_(0, row.kinds[asked], (losses * row.weights[asked]).to(sums.dtype))
            if self.parts.points:
                sums[-1] += pointed.sum()
            if not bool(losses.isfinite().all()):
                culprits += row.names
        learning = list(self.parameters.values())
        self.machine.sum_gradients(learning)
        norm = torch.nn.utils.clip_grad_norm_(learning, self.settings.optimizer.clip)
        norm = norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
        means = self.machine.summed(sums) / totals.clamp(min=1e-12)
        loss = float((means * self.parts.kind_weights * (totals > 0)).sum())
        if math.isfinite(loss) and math.isfinite(float(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.in_a_row = 0
        else:
            every_row = [name for row in rows for name in row.names]
            self._culprits = [name for names in self.machine.gathered(culprits) for name in names] or every_row
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.optimizer.zero_grad()
        self.step += 1
        kinds = {f"{name}_loss": float(mean) for name, mean in zip(self.parts.reading.kinds, means, strict=True)}
        return {"loss": loss, **(kinds if len(kinds) > 1 else {}), "rate": rate, "gradient_norm": float(norm)}

    def _totals(self, batch: Batch) -> tuple[Tensor, list[Row]]:
        """Weights of the targets of each kind in the whole step, and the rows on the device. Counts travel along."""
        kinds = len(self.parts.reading.kinds)
        message = torch.zeros(kinds + 1 + len(BAD_ROWS), dtype=torch.float64)
        for row in batch.rows:
            asked = row.targets != IGNORED
            message[:kinds].index_add_(0, row.kinds[asked], row.weights[asked].double())
            message[kinds - 1] += row.looked  # none, but where they are the last kind
        message[kinds:] = torch.tensor([batch.read, *(batch.bad[kind] for kind in BAD_ROWS)])
        message = self.machine.summed(message.to(self.machine.device)).cpu()
        self.read += int(message[kinds])
        self.bad.update({kind: int(count) for kind, count in zip(BAD_ROWS, message[kinds + 1 :], strict=True) if count})
        return message[:kinds].float().to(self.machine.device), [row.to(self.machine.device) for row in batch.rows]

    def _backward(self, row: Row, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of one row; returns the losses of its targets and of its pointers."""
        asked = row.targets != IGNORED
        coefficients = coefficients * self.machine.gradient_scale
        each = coefficients[row.kinds[asked]] * row.weights[asked]
        loss, losses, pointed = self.learner(
            row, self.parts.see(row), each, coefficients[-1] if self.parts.points else None
        )
        loss.backward()
        return losses, pointed

    def _stop_if_harmed(self) -> None:
        bad = self.bad.total()
        if bad > max(BAD_FEW, BAD_SHARE * self.read):
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.bad.most_common())
            raise TrainingStoppedError(f"{bad:,} of {self.read:,} rows could not be used ({kinds}): more than 5 %")
        if self.in_a_row >= IN_A_ROW:
            raise TrainingStoppedError(
                f"{self.in_a_row} updates in a row were not finite, the last with {', '.join(self._culprits[:4])}"
            )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the step finish; a second one does what it always did."""

        def ask(number: int, frame: Any) -> None:
            self._asked = True
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: the caller has its own way to stop
            pass
        try:
            yield
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)
