"""The decode step: a token of each row goes in, its logits come out; eager, or recorded as CUDA graphs by bucket.

A step reads its tokens and the places of its rows from tensors of its own, and everything that differs from step to
step lies in the pools, so a recording of it can be replayed. Buckets are rows rounded up to a power of two; the rows of
a bucket that are not there are question -1, for which nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sphinx_fast.model.cache import Pool, Slot
from sphinx_fast.model.packed import Decode
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.vision.graphs import Fingerprint, Recorder


class Step:
    """The step of up to `rows` rows.

    Args:
        recorder: makes a recording of it; None: every step runs as it is.
    """

    def __init__(
        self,
        model: SphinxForConditionalGeneration,
        prefixes: Pool,
        suffixes: Pool,
        rows: int,
        recorder: Recorder | None = None,
    ) -> None:
        self.model = model
        with torch.inference_mode(False):  # written to in many calls
            self.tokens = torch.zeros(rows, dtype=torch.long, device=suffixes.device)
            self.pictures, self.questions = (
                torch.full((rows,), -1, dtype=torch.int32, device=suffixes.device) for _ in range(2)
            )
        self._decode = Decode(prefixes, suffixes, self.pictures, self.questions)
        self._logits = torch.empty(0)
        # Recorded while no row is there: warming up must not write to anybody's place.
        self._replay: Callable[[], None] = self._run if recorder is None else recorder([self._run])

    def arrange(self, prefixes: Sequence[Slot | None], suffixes: Sequence[Slot]) -> None:
        """Who the rows are. Those of one prefix stand side by side."""
        for indices, slots in ((self.pictures, prefixes), (self.questions, suffixes)):
            indices.fill_(-1)
            indices[: len(slots)] = torch.tensor([-1 if slot is None else slot.index for slot in slots]).to(indices)

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The last token of each row -> logits [rows, vocab], until the next call. Every suffix is one longer then."""
        self.tokens[: len(tokens)] = torch.tensor(tokens).to(self.tokens)
        self._replay()
        return self._logits[: len(tokens)]

    def _run(self) -> None:
        embeddings = self.model.get_input_embeddings()(self.tokens)
        self._logits = self.model.lm_head(self._decode.run(self.model.model.language_model, embeddings))
        self._decode.grow()


class Steps:
    """The step of any number of rows, recorded as `recorder` makes recordings, or not at all."""

    def __init__(self, model: SphinxForConditionalGeneration, prefixes: Pool, suffixes: Pool) -> None:
        self.model, self.prefixes, self.suffixes = model, prefixes, suffixes
        self.record(None)

    def record(self, recorder: Callable[[], Recorder] | None) -> None:
        """Record from now on; None: no longer."""
        self._recorder = recorder
        self._recorded: dict[int, Step] = {}
        self._made_for: tuple[int, int, Fingerprint, Recorder] | None = None

    def of(self, rows: int) -> Step:
        """The step for that many rows, nobody in it."""
        if self._recorder is None:
            return Step(self.model, self.prefixes, self.suffixes, rows)
        if not self.hold() or self._made_for is None:
            self._recorded.clear()
            generations = self.prefixes.generation, self.suffixes.generation
            self._made_for = *generations, Fingerprint(self._weights()), self._recorder()
        bucket = 1 << (rows - 1).bit_length()
        if bucket not in self._recorded:
            self._recorded[bucket] = Step(self.model, self.prefixes, self.suffixes, bucket, self._made_for[3])
        return self._recorded[bucket]

    def hold(self) -> bool:
        """Whether recordings read from where weights, keys and values lie now."""
        if self._made_for is None:
            return True
        prefixes, suffixes, fingerprint, _ = self._made_for
        same = (prefixes, suffixes) == (self.prefixes.generation, self.suffixes.generation)
        return same and fingerprint.holds(self._weights())

    def _weights(self) -> nn.Module:
        return nn.ModuleList([self.model.model.language_model, self.model.lm_head])
