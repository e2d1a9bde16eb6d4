"""Places and passes: what a language model needs to answer many requests at once, and never to read a picture twice.

A prompt about a picture is a prefix (BOS, visual tokens, and the words every conversation begins with), which all
questions on the picture share, and a suffix of its own. Prefixes live on in the picture cache; suffixes as long as a
conversation keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import takewhile
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from sphinx_fast.infer.picture_cache import ModelIdentity, PictureCache
from sphinx_fast.infer.request import Picture, Request
from sphinx_fast.infer.sampling import choose
from sphinx_fast.infer.step import Step, Steps
from sphinx_fast.model.cache import Pool, Slot
from sphinx_fast.model.packed import Piece, Prefill
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration

_FIRST_SUFFIX = 128  # positions; more when a question or an answer is longer
_MOST_PREFIXES = 4096


class Runner:
    """Runs requests on a model: the scheduler's `Model`.

    Args:
        head: ids that follow the visual tokens in every conversation.
        eos_ids: tokens that end an answer.
        encode: gives pictures their visual tokens.
        cache: keeps prefixes, and says how many bytes of them are worth keeping.
        max_rows: requests at once.
    """

    def __init__(
        self,
        model: SphinxForConditionalGeneration,
        device: torch.device,
        head: Sequence[int],
        eos_ids: set[int],
        encode: Callable[[Sequence[Picture]], None],
        cache: PictureCache,
        max_rows: int,
    ) -> None:
        self.model, self.device, self.head, self.eos_ids = model, device, list(head), eos_ids
        self.encode, self.cache = encode, cache
        positions = 1 + model.config.vision_config.tokens_per_picture + len(head)
        self.prefixes = Pool(_MOST_PREFIXES, positions, device, worth=cache.max_bytes)
        self.suffixes = Pool(2 * max_rows, _FIRST_SUFFIX, device)
        self._known: WeakValueDictionary[Hashable, Slot] = WeakValueDictionary()
        self._identity = ModelIdentity()
        self.steps = Steps(model, self.prefixes, self.suffixes)
        self._rows: list[ref[Request]] = []  # of the last step, as `_step` has them; they and their places may go
        self._step: Step | None = None

    # --- places -------------------------------------------------------------------------------------------------------
    def admit(self, request: Request) -> bool:
        """Places for a request; False while all are taken."""
        request.shared, behind = self._shared(request)
        prefix = None
        if request.shared:
            prefix = self._prefix(behind)
            if prefix is None:
                return False
        suffix = None
        try:
            suffix = self._continued(request, behind) or self._fresh(self.suffixes, behind)
        finally:
            if suffix is None and prefix is not None:
                prefix.release()
        if suffix is None:
            return False
        request.prefix, request.suffix = prefix, suffix
        unread = request.shared if prefix is not None and not prefix.length and prefix.holders == 1 else 0
        request.new_tokens = unread + len(request.ids) - request.shared - suffix.length
        return True

    @staticmethod
    def _fresh(pool: Pool, key: Hashable) -> Slot | None:
        """A place where nothing is yet, held."""
        slot = pool.take()
        if slot is not None:
            slot.key, slot.length = key, 0
        return slot

    def _shared(self, request: Request) -> tuple[int, Hashable]:
        """How many ids of a prompt are its prefix, and what their keys and values depend on."""
        number = self._identity.current(self.language_model)
        # While it trains, no two passes agree. Clearing the cache is also for what requests and conversations keep.
        model = object() if number is None else (number, self.cache.cleared)
        picture = request.picture
        if picture is None:
            return 0, ("no picture", model)
        ids = request.ids
        end = len(ids) - ids[::-1].index(self.model.config.image_token_id)
        if ids[end : end + len(self.head)] == self.head:
            end += len(self.head)
        if end == len(ids):  # a prompt that ends with its picture: nothing would be left to compute an answer from
            return 0, object()
        return end, (picture.key, model, tuple(ids[:end]))

    def _prefix(self, key: Hashable) -> Slot | None:
        """The place of a prefix, held; of length 0 if it is still to be computed."""
        self.cache.get(key, missed=False)  # asked for again: the last to go. A miss is that of the visual tokens
        slot = self._known.get(key)
        if slot is not None and slot.intact:
            return slot.hold()
        slot = self._fresh(self.prefixes, key)
        if slot is not None:
            self._known[key] = slot
        return slot

    def _continued(self, request: Request, behind: Hashable) -> Slot | None:
        """The place an earlier turn left, held, cut to what this prompt has in common with it."""
        slot = request.earlier
        if slot is None or not slot.intact or slot.holders or slot.key != behind:
            return None
        own = request.ids[request.shared : -1]  # the last token is computed in any case: its logits are needed
        slot.length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, slot.ids, strict=False)))
        return slot.hold()

    # --- passes -------------------------------------------------------------------------------------------------------
    @property
    def language_model(self) -> nn.Module:
        """Everything that keys and values depend on."""
        return self.model.model.language_model

    @torch.inference_mode()
    def prefill(self, requests: Sequence[Request]) -> None:
        """One pass over the prompts: prefixes nobody computed yet, then every request's own tokens."""
        requests = sorted(requests, key=_picture)
        new = {request.prefix: request for request in requests if request.prefix and not request.prefix.length}
        with_pictures = [*new.values(), *(r for r in requests if r.picture is not None and not r.shared)]
        self.encode([request.picture for request in with_pictures if request.picture is not None])
        self.prefixes.reserve(max((request.shared for request in new.values()), default=0))
        self.suffixes.reserve(max(len(request.ids) - request.shared for request in requests) + 1)
        try:
            for slot, request in new.items():
                self.prefixes.set_length(slot, request.shared)
            logits = self._prompts(list(new.items()), requests, [r.picture for r in with_pictures])
        except BaseException:
            for slot in new:
                slot.length = 0
            raise
        for slot, request in new.items():
            if request.picture is not None and request.picture.kept:
                self.cache.put(slot.key, slot)
        self._rows = []  # the next step arranges them, lengths on the device included
        self._choose(requests, logits)

    def _prompts(
        self, new: Sequence[tuple[Slot, Request]], requests: Sequence[Request], pictures: Sequence[Picture | None]
    ) -> Tensor:
        """Logits [R, vocab] of the last token of each request."""
        pieces = [Piece(slot, 0, request.shared) for slot, request in new]
        ids = [token for _, request in new for token in request.ids[: request.shared]]
        for request in requests:
            start = request.place.length
            own = request.ids[request.shared + start :]
            pieces.append(Piece(request.place, start, len(own), request.prefix))
            ids += own
        visual = [picture.visual_tokens for picture in pictures if picture and picture.visual_tokens is not None]
        embeddings = self.model.model.splice(
            torch.tensor([ids], device=self.device), torch.cat([v.flatten(0, 1) for v in visual]) if visual else None
        )
        prefill = Prefill(pieces, self.device)
        hidden = prefill.run(self.language_model, embeddings[0])
        logits: Tensor = self.model.lm_head(hidden[prefill.last[len(new) :]])
        return logits

    @torch.inference_mode()
    def decode(self, requests: Sequence[Request]) -> None:
        """The next token of each request: one pass with a row for each."""
        self.suffixes.reserve(max(request.computed for request in requests) + 1)
        rows = sorted(requests, key=_picture)
        if rows != [row() for row in self._rows] or self._step is None or not self.steps.hold():
            self._step = self.steps.of(len(rows))
            self._step.arrange([request.prefix for request in rows], [request.place for request in rows])
            for request in rows:
                self.suffixes.set_length(request.place, request.computed)
        self._rows = []  # if this step is interrupted, the next one arranges everything again
        self._choose(rows, self._step([request.tokens[-1] for request in rows]))
        self._rows = [ref(request) for request in rows]

    def _choose(self, requests: Sequence[Request], logits: Tensor) -> None:
        """The next token of each row. Reading them is where a step waits for the device.

        Length and token change together: whoever has no new token when this is interrupted is computed again.
        """
        chosen = choose(logits, [r.sampling for r in requests], [r.draw() for r in requests])
        logprobs = [0.0] * len(requests)
        if any(request.wants_logprobs for request in requests):
            logprobs = logits.float().log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1).tolist()
        for request, token, logprob in zip(requests, chosen.tolist(), logprobs, strict=True):
            request.add(token, logprob, ends=token in self.eos_ids)
            request.place.length = request.computed


def _picture(request: Request) -> int:
    """Sorts requests on one picture side by side."""
    return -1 if request.prefix is None else request.prefix.index
