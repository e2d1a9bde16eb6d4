"""Drawn scenes as training data: type `scenes`. Nothing is read from a disk; row i is scene `start + i`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from PIL import Image

from sphinx_fast.data.record import BadRowError, Conversation, Look
from sphinx_fast.data.rows import Reader
from sphinx_fast.data.scene_questions import TASKS, Question, questions
from sphinx_fast.data.scenes import DOMAINS, KINDS, Scene, scene

ROUNDS = 4  # times a scene is asked for questions; a question that comes up again is dropped
SHARES: Mapping[str, float] = {  # of a task's questions, how many are kept in a round
    "vqa": 0.5,
    "refer": 1.0,
    "read": 1.0,
    "region_description": 0.4,
    "caption": 0.1,
    "relation": 0.35,
    "detect_category": 0.2,
    "detect_all": 0.1,
    "text_boxes": 0.3,
    "defect": 0.5,
    "key_points": 0.5,
    "grounded_caption": 0.05,
    "detailed_caption": 0.03,
    "option_letter": 0.25,
    "options": 0.2,
    "unanswerable": 0.12,
    "ocr_vqa": 0.4,
    "classify": 0.1,
}
# of a task's answers in the loss
WEIGHTS = {
    "vqa": 2.0,
    "refer": 1.5,
    "read": 2.0,
    "relation": 1.0,
    "region_description": 1.0,
    "key_points": 1.0,
    "ocr_vqa": 1.0,
}
OTHER_WEIGHT = 0.5
# answers that name things one after another
NAMING = ("relation", "detect_all", "text_boxes", "detailed_caption", "grounded_caption")


class Scenes(Reader):
    """Questions about scenes start .. start + count - 1 of the training split, several kinds about each.

    Args:
        count: scenes.
        start: the first one's seed.
        most: questions about one scene.
        open_share: of the short questions, how many come without "Answer the question using a single word or phrase."
        domain: "clean" or "textured".
        captions: one caption without a question in place of the questions: what stage 1 reads.
        kinds: how often each kind of scene is drawn, {"shapes": 0.5, "text": 0.5}; default: `scenes.KINDS`.
        tasks: only questions of these tasks; a scene that has none is a bad row.
        shrink: sides of shapes over what they usually are.
        scale: pixels of a picture over what they usually are.
    """

    def __init__(
        self,
        path: Path,
        root: Path,
        *,
        count: int = 1000,
        start: int = 0,
        most: int = 12,
        open_share: float = 0.2,
        domain: str = "clean",
        captions: bool = False,
        kinds: Mapping[str, float] | None = None,
        tasks: Sequence[str] | None = None,
        shrink: float = 1.0,
        scale: int = 1,
    ) -> None:
        if count < 0 or start < 0 or most < 1:
            raise ValueError(
                f"scenes: expected count and start of at least 0 and most of 1, got {count}, {start}, {most}"
            )
        if domain not in DOMAINS:
            raise ValueError(f"scenes: domain: expected one of {', '.join(DOMAINS)}, got {domain!r}")
        if kinds is not None and not (set(kinds) <= set(KINDS) and min(kinds.values(), default=0.0) > 0):
            raise ValueError(f"scenes: kinds: expected positive numbers for some of {', '.join(KINDS)}, got {kinds!r}")
        if tasks is not None and not (tasks and set(tasks) <= set(TASKS)):
            raise ValueError(f"scenes: tasks: expected some of {', '.join(TASKS)}, got {tasks!r}")
        if not 0.25 <= shrink <= 1.0 or not 1 <= scale <= 16:
            raise ValueError(f"scenes: expected shrink in 0.25..1 and scale in 1..16, got {shrink}, {scale}")
        self.kinds, self.tasks, self.shrink, self.scale = kinds, tasks, shrink, scale
        self.name, self.count, self.start, self.domain = f"scenes-{domain}", count, start, domain
        self.most, self.open_share, self.captions = most, open_share, captions

    def __len__(self) -> int:
        return self.count

    def _read(self, index: int) -> Conversation:
        seed = self.start + index
        rng = Random(seed)
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0] if self.kinds else None
        drawn = scene(seed, kind=kind, domain=self.domain, shrink=self.shrink, scale=self.scale)
        picked = self._captions(drawn, rng) if self.captions else self.pick(drawn, rng)
        if not picked:
            raise BadRowError("no answer", f"{self.name}:{seed}: nothing to ask for {', '.join(self.tasks or ())}")
        turns = tuple((question.prompt, question.answer) for question in picked)
        weights = tuple(WEIGHTS.get(question.task, OTHER_WEIGHT) for question in picked)
        file = io.BytesIO()
        Image.fromarray(drawn.picture).save(file, "PNG", compress_level=0)  # it is read again at once
        name = f"{self.name}:{seed}"
        if self.captions:
            return Conversation(turns, file.getvalue(), name)
        return Conversation(turns, file.getvalue(), name, weights, tuple(map(looks, picked)))

    def pick(self, drawn: Scene, rng: Random) -> list[Question]:
        """Questions about a scene, several of each short kind, in random order."""
        found: dict[str, Question] = {}
        for _ in range(ROUNDS):
            for question in questions(drawn, rng, open_share=self.open_share):
                if rng.random() < SHARES[question.task]:
                    found.setdefault(question.prompt, question)
        picked = list(found.values()) or questions(drawn, rng)  # an empty scene may have had no luck
        if self.tasks is not None:
            picked = [question for question in picked if question.task in self.tasks]
        rng.shuffle(picked)
        return picked[: self.most]

    @staticmethod
    def _captions(drawn: Scene, rng: Random) -> list[Question]:
        caption = next(q for q in questions(drawn, rng) if q.task == "caption")
        return [Question("caption", "", "", caption.answer)]


def looks(question: Question) -> tuple[Look, ...]:
    """What one must look at to answer: each thing while its name is said, otherwise all that is asked about."""
    answer = question.answer
    if question.task in NAMING:
        found: list[Look] = []
        for name, box in zip(question.names, question.boxes, strict=True):
            start = answer.find(name, found[-1].stop if found else 0)
            if start < 0:  # a phrase that is said once for all its things
                found[-1] = found[-1]._replace(boxes=(*found[-1].boxes, box))
            else:
                found.append(Look(start, start + len(name), (box,)))
        return tuple(found)
    if not question.boxes:
        return ()
    stop = answer.find("[")  # coordinates speak for themselves
    return (Look(0, len(answer) if stop < 0 else max(1, stop), question.boxes, question.quote),)
