"""Questions about a scene with answers that are true by construction, for every task of the paper's Table 1.

A question is asked only where it has one right answer: the colour of "the circle" only where there is one circle, a box
only for a description that fits one thing. Answers are short and lower case; coordinates are of the padded square,
[0, 1], two decimals. Lists go from left to right.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from sphinx_fast.data.scene_drawing import COLOURS, HELD_OUT_NAMES, SHAPES
from sphinx_fast.data.scene_formats import FORMS, other_forms
from sphinx_fast.data.scene_words import (
    Question,
    article,
    box_text,
    count_of,
    covers,
    description,
    exists,
    groups,
    joined,
    left_to_right,
    plural,
    relation,
)
from sphinx_fast.data.scenes import Scene, SceneObject, ScenePerson, SceneText, Thing, scene
from sphinx_fast.tasks import prompts


def _vqa(
    s: Scene,
    kind: str,
    question: str,
    answer: str,
    things: Sequence[Thing],
    task: str = "vqa",
    names: tuple[str, ...] = (),
) -> Question:
    """A question with a short answer about these things."""
    boxes = tuple(s.square_box(thing.box) for thing in things)
    return Question(task, kind, prompts.short_answer(question), answer, boxes, names or tuple(t.name for t in things))


def _colour(s: Scene, rng: Random) -> Iterator[Question]:
    """The colour of the only thing of a shape (or of a shape and size)."""
    found = [(o.shape, o) for o in s.objects if sum(p.shape == o.shape for p in s.objects) == 1]
    if not found:
        sized = Counter((o.shape, o.size) for o in s.objects)
        found = [(f"{o.size} {o.shape}", o) for o in s.objects if sized[o.shape, o.size] == 1]
    if found:
        name, thing = rng.choice(found)
        yield _vqa(s, "colour", f"What color is the {name}?", thing.colour, [thing])


def _shape(s: Scene, rng: Random) -> Iterator[Question]:
    """The shape of the only thing of a colour (or of a colour and size)."""
    found = [(o.colour, o) for o in s.objects if sum(p.colour == o.colour for p in s.objects) == 1]
    if not found:
        sized = Counter((o.colour, o.size) for o in s.objects)
        found = [(f"{o.size} {o.colour}", o) for o in s.objects if sized[o.colour, o.size] == 1]
    if found:
        name, thing = rng.choice(found)
        yield _vqa(s, "shape", f"What shape is the {name} object?", thing.shape, [thing])


def _count(s: Scene, rng: Random) -> Iterator[Question]:
    """A count; the number is drawn first, evenly among those that occur, so that the answer is hard to guess blind."""
    if not s.objects:
        return
    nouns = {"shape": len(s.objects)}
    for o in s.objects:
        for noun in (o.shape, f"{o.colour} shape", o.name):
            nouns[noun] = count_of(s, noun)
    if rng.random() < 0.1:
        o = rng.choice(s.objects)
        noun = f"{o.colour} {rng.choice(SHAPES)}"
        nouns = {noun: 0} if noun not in nouns and _may_be_absent(s, noun) else nouns
    number = rng.choice(sorted(set(nouns.values())))
    noun = rng.choice([n for n, k in nouns.items() if k == number])
    counted = [o for o in s.objects if covers(noun, o)]
    yield _vqa(
        s, "count", f"How many {plural(noun)} are there?", str(number), counted, names=() if counted else (noun,)
    )


def _yes_no(s: Scene, rng: Random) -> Iterator[Question]:
    """As POPE asks: one question to be answered yes, and one, by chance or by swapping what is there, no."""
    yes = [o.name for o in s.objects] + [o.shape for o in s.objects]
    if s.people and (not yes or rng.random() < 0.5):
        yes = ["person"]
    if not yes:
        return
    pairs = [f"{a.colour} {b.shape}" for a in s.objects for b in s.objects]  # the adversarial half
    absent = [n for n in pairs if not exists(s, n) and _may_be_absent(s, n)]
    if not absent or rng.random() < 0.5:
        shape = rng.choice([x for x in SHAPES if not exists(s, x)])
        absent = [n for n in (shape, f"{rng.choice(list(COLOURS))} {shape}") if _may_be_absent(s, n)]
    if not s.people and rng.random() < 0.06:  # about as often as "person" is right
        absent = ["person"]
    for answer, noun in (("yes", rng.choice(yes)), ("no", rng.choice(absent))):
        seen = [t for t in s.things if (t in s.people if noun == "person" else covers(noun, t))]
        names = () if seen else (noun,)
        yield _vqa(s, "yes/no", f"Is there {article(noun)} in the image?", answer, seen, names=names)


def _may_be_absent(s: Scene, noun: str) -> bool:
    """Whether a noun may be asked for where it is not: what training never draws it should not learn to deny."""
    return s.split == "unseen" or noun not in HELD_OUT_NAMES


def _read(s: Scene, rng: Random) -> Iterator[Question]:
    """What the only word or number says."""
    if len(s.texts) == 1:
        text = s.texts[0].text
        kind = "number" if text.isdigit() else "word"
        yield _vqa(s, kind, f"What {kind} is written in the image?", text, s.texts, "read")


def _kind_of(thing: Thing) -> str:
    return "shape" if isinstance(thing, SceneObject) else "person" if isinstance(thing, ScenePerson) else "text"


def _refer(s: Scene, rng: Random) -> Iterator[Question]:
    """A box from words for one shape, one word and one person; and words from a box."""
    groups_of_things: tuple[Sequence[Thing], ...] = (s.objects, s.texts, s.people)
    for group in groups_of_things:
        found = [(t, d) for t in group if (d := description(s, t, rng))]
        if found:
            thing, words = rng.choice(found)
            box = s.square_box(thing.box)
            yield Question("refer", _kind_of(thing), prompts.refer(words), box_text(box), (box,), (thing.name,))
    nameable = [t for t in s.things if t is not s.defect]
    if nameable:
        thing = rng.choice(nameable)
        name = f"{thing.size} {thing.name}" if isinstance(thing, SceneObject) else thing.name
        box = s.square_box(thing.box)
        prompt = prompts.region_description(box_text(box))
        yield Question("region_description", _kind_of(thing), prompt, name, (box,), (name,))


def _detect(s: Scene, rng: Random) -> Iterator[Question]:
    """Every object; every object of a category; every text."""
    found = left_to_right([*s.objects, *s.people])
    if found:
        yield _boxes_question(s, "detect_all", "all", prompts.detect_all(), found)
        noun = rng.choice(sorted({_category(t) for t in found}))
        members = [t for t in found if _category(t) == noun]
        prompt = prompts.detect_people() if noun == "person" else prompts.detect_category(plural(noun))
        yield _boxes_question(s, "detect_category", noun, prompt, members, named=False)
    if s.texts:
        texts = left_to_right(s.texts)
        yield _boxes_question(s, "text_boxes", "text", prompts.text_boxes(), texts)


def _category(thing: Thing) -> str:
    return thing.shape if isinstance(thing, SceneObject) else "person"


def _boxes_question(
    s: Scene, task: str, kind: str, prompt: str, things: Sequence[Thing], named: bool = True
) -> Question:
    """A question whose answer is a list of boxes: `name[..], name[..]`, or `[..];[..]` where one name is asked for."""
    boxes = tuple(s.square_box(t.box) for t in things)
    names = tuple(t.text if isinstance(t, SceneText) else t.name for t in things)
    if named:
        answer = ", ".join(n + box_text(b) for n, b in zip(names, boxes, strict=True))
    else:
        answer = ";".join(box_text(b) for b in boxes)
    return Question(task, kind, prompt, answer, boxes, names)


def _key_points(s: Scene, rng: Random) -> Iterator[Question]:
    """The joints of one person, given their box."""
    if s.people:
        person = rng.choice(s.people)
        box = s.square_box(person.box)
        points = tuple((name, *s.square_point(x, y)) for name, (x, y) in person.joints.items())
        answer = ", ".join(name + box_text((x, y)) for name, x, y in points)
        yield Question("key_points", "person", prompts.key_points(box_text(box)), answer, (box,), ("person",), points)


def _relation(s: Scene, rng: Random) -> Iterator[Question]:
    """What the thing in one box is to the thing in another, both by name: the boxes alone would tell the rest."""
    nameable = [t for t in s.things if t is not s.defect]
    pairs = [(a, b, r) for a in nameable for b in nameable if a is not b and (r := relation(a, b))]
    if pairs:
        a, b, kind = rng.choice(pairs)
        boxes = s.square_box(a.box), s.square_box(b.box)
        prompt = prompts.relation(box_text(boxes[0]), box_text(boxes[1]))
        answer = f"{a.name} {kind} {b.name}"
        yield Question("relation", kind, prompt, answer, boxes, (a.name, b.name))


def _caption_prompt(rng: Random) -> str:
    """Half the paper's prompt, half what people ask instead."""
    what = prompts.open_question("What is in the image?")
    return rng.choice((prompts.caption(), prompts.caption(), prompts.sentence_caption(), what))


def _captions(s: Scene, rng: Random) -> Iterator[Question]:
    """The scene in words, and with a box for each thing that is named."""
    if s.kind == "defect":
        flaw = f"with {article(s.defect.kind)}" if s.defect else "without a defect"
        yield Question("caption", "surface", _caption_prompt(rng), f"a {s.background} surface {flaw}")
        return
    phrases = groups(s)
    if phrases:
        yield Question("caption", "things", _caption_prompt(rng), joined([phrase for phrase, _ in phrases]))
        boxes = tuple(s.square_box(t.box) for _, things in phrases for t in things)
        names = tuple(phrase for phrase, things in phrases for _ in things)
        parts = [f"<p>{phrase}</p>" + ";".join(box_text(s.square_box(t.box)) for t in ts) for phrase, ts in phrases]
        yield Question("grounded_caption", "things", prompts.grounded_caption(), joined(parts), boxes, names)


def _defect(s: Scene, rng: Random) -> Iterator[Question]:
    """Whether a surface has a defect, and where."""
    if s.kind == "defect" and s.defect is None:
        yield Question("defect", "none", prompts.defect(), "no")
    elif s.defect:
        box = s.square_box(s.defect.box)
        answer = f"yes, {article(s.defect.kind)}{box_text(box)}"
        yield Question("defect", s.defect.kind, prompts.defect(), answer, (box,), (s.defect.kind,))


_ASK = (_colour, _shape, _count, _yes_no, _read, _refer, _detect, _key_points, _relation, _captions, _defect)
TASKS = (
    "vqa",
    "read",
    "refer",
    "region_description",
    "caption",
    "grounded_caption",
    "detect_all",
    "detect_category",
    "text_boxes",
    "key_points",
    "relation",
    "defect",
    *FORMS,
)


def questions(s: Scene, rng: Random, *, open_share: float = 0.0) -> list[Question]:
    """Every kind of question the scene can be asked, once (yes/no: once for each answer); `rng` chooses what about.

    open_share  share of the questions with a short answer that come without "Answer the question using a single word or
                phrase.", as people type them
    """
    asked = [q for ask in _ASK for q in ask(s, rng)]
    asked += other_forms(s, [q for q in asked if q.task in ("vqa", "read")], rng)
    if open_share <= 0:
        return asked
    short = ("vqa", "read")
    return [
        replace(q, prompt=q.prompt.split("\n")[0]) if q.task in short and rng.random() < open_share else q
        for q in asked
    ]


def examples(
    task: str, *, split: str = "test", start: int = 0, kind: str | None = None, domain: str = "clean"
) -> Iterator[tuple[Scene, Question]]:
    """Without end (scene, question) of a task, one per scene, from the seeds start, start + 1, ... that have one.

    `examples("vqa")` and `examples("refer")` are what the embedded model is scored on.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    seed = start
    while True:
        s = scene(seed, split=split, domain=domain)
        rng = Random(seed)
        found = [q for q in questions(s, rng) if q.task == task and kind in (None, q.kind)]
        if found:
            yield s, rng.choice(found)
        seed += 1


def corpus(n: int, seed: int = 0) -> Iterator[str]:
    """Prompts and answers of n scenes, one by one, for training a tokenizer; 3,000 scenes say nearly every word."""
    for k in range(n):
        s = scene(seed + k, split="train")
        for q in questions(s, Random(seed + k)):
            yield q.prompt
            yield q.answer
