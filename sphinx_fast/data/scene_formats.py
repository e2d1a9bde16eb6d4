"""The questions about a scene in the other forms of Table 1: options, a reference from OCR, "Unanswerable", a class, a
detailed description."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from random import Random

from sphinx_fast.data.scene_drawing import COLOURS, SHAPES
from sphinx_fast.data.scene_words import Question, article, groups, joined, left_to_right, relation
from sphinx_fast.data.scenes import TEXTS, Scene, SceneObject, SceneText
from sphinx_fast.tasks import prompts

UNANSWERABLE = "Unanswerable"
OPTIONS = 4
FORMS = ("option_letter", "options", "unanswerable", "ocr_vqa", "classify", "detailed_caption")


def other_forms(s: Scene, short: list[Question], rng: Random) -> Iterator[Question]:
    """At most one question of each of FORMS; `short` are the scene's questions with a short answer."""
    bare = [(q, q.prompt.split("\n")[0]) for q in short]
    attributes = [(q, text) for q, text in bare if q.kind in ("colour", "shape")]
    if attributes:
        q, text = rng.choice(attributes)
        yield _lettered(q, text, "option_letter", rng)
        yield _lettered(q, text, "options", rng)
        yield _perhaps_unanswerable(s, q, text, rng)
    for q, text in bare:
        if q.task == "read":
            seen = q.answer if rng.random() < 0.7 else rng.choice(TEXTS)  # a reader of words may err
            prompt = prompts.ocr_vqa(text, seen)
            quote = _place(prompt, f": {seen}", seen) if seen == q.answer else None
            yield replace(q, task="ocr_vqa", prompt=prompt, quote=quote)
    if len(s.things) == 1 or s.kind == "defect":
        yield _class(s)
    if groups(s):
        yield _detailed(s)


def _lettered(q: Question, text: str, task: str, rng: Random) -> Question:
    """Four options, the right one among them; the answer is its letter."""
    values = list(COLOURS) if q.kind == "colour" else list(SHAPES)
    shown = [q.answer, *rng.sample([v for v in values if v != q.answer], OPTIONS - 1)]
    rng.shuffle(shown)
    letter = "ABCD"[shown.index(q.answer)]
    prompt = prompts.PROMPTS[task](text, prompts.lettered(shown))
    return replace(q, task=task, prompt=prompt, answer=letter, quote=_place(prompt, f"{letter}. {q.answer}", q.answer))


def _place(prompt: str, context: str, word: str) -> tuple[int, int]:
    """Where in a prompt the word stands that ends this context."""
    stop = prompt.index(context) + len(context)
    return stop - len(word), stop


def _perhaps_unanswerable(s: Scene, q: Question, text: str, rng: Random) -> Question:
    """Half of the time about something that is not there."""
    if rng.random() < 0.5:
        return replace(q, task="unanswerable", prompt=prompts.unanswerable(text))
    if q.kind == "colour":
        absent, text = sorted(set(SHAPES) - {o.shape for o in s.objects}), "What color is the {}?"
    else:
        absent, text = sorted(set(COLOURS) - {o.colour for o in s.objects}), "What shape is the {} object?"
    name = rng.choice(absent)
    prompt = prompts.unanswerable(text.format(name))
    return replace(q, task="unanswerable", prompt=prompt, answer=UNANSWERABLE, boxes=(), names=(name,))


def _class(s: Scene) -> Question:
    """What the picture is of, as the paper asks ImageNet: a surface, or the only thing."""
    if s.kind == "defect":
        return Question("classify", "surface", prompts.classify(), f"This is a {s.background} surface")
    (thing,) = s.things
    name = thing.shape if isinstance(thing, SceneObject) else "text" if isinstance(thing, SceneText) else "person"
    return Question("classify", name, prompts.classify(), f"This is a {name}", (s.square_box(thing.box),), (name,))


def _detailed(s: Scene) -> Question:
    """Everything with its size, then where some of it lies."""
    things = left_to_right([t for t in s.things if t is not s.defect])
    names = [f"{t.size} {t.name}" if isinstance(t, SceneObject) else t.name for t in things]
    sentences = [f"The image shows {joined([article(name) for name in names])}."]
    told_apart = len(set(names)) == len(names)
    for (a, name), (b, other) in pairwise(zip(things, [n.removeprefix("the ") for n in names], strict=True)):
        where = relation(a, b)
        if where and told_apart:
            sentences.append(f"The {name} is {where} the {other}.")
    boxes = tuple(s.square_box(t.box) for t in things)
    return Question("detailed_caption", "things", prompts.detailed_caption(), " ".join(sentences), boxes, tuple(names))
