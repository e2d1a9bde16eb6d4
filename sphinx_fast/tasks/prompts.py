"""The paper's Table 1 as a registry: one prompt per task, the wording the model is trained on.

    >>> refer("the cat on the left")                       # every prompt is callable, fields in the template's order
    'Please provide the bounding box coordinate of the region this sentence describes: the cat on the left.'
    >>> format("relation", box_a=a, box_b=b)               # or by name; a Box prints itself
    >>> PROMPTS["refer"].max_new_tokens
    30

Where the paper is not one thing, the choice made here:

* Text boxes: Table 1 prints "bounding box coordinated", its body text "coordinates"; the body text is used.
* Quotes and apostrophes are ASCII; the paper's are typographic.
* Region description: the paper writes the box after a colon with no full stop; here a space and a full stop.
* Referring Relationship is the prompt of REC without a full stop in the table; it is `refer`.
* `defect` is our own wording (the paper shows one free question).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sphinx_fast.tasks.boxes import Box, Point

AnswerKind = Literal["text", "phrase", "letter", "box", "boxes", "points", "grounded"]
Field = str | int | float | Box | Point | Sequence[str] | Sequence[Box]

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Prompt:
    """One row of Table 1.

    name            key in PROMPTS
    template        text with `{field}`s
    benchmarks      what the paper measures with it; empty where it names none
    answer          text, phrase (few words), letter (A, B, ...), box (one), boxes (`name[..]` or `[..];[..]`),
                    points (`name[x,y]`), grounded (a caption with boxes in it)
    max_new_tokens  room for the longest sensible answer; LLaMA's tokens, one for each digit, about 22 for a box
    """

    name: str
    template: str
    benchmarks: tuple[str, ...] = ()
    answer: AnswerKind = "text"
    max_new_tokens: int = 512

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in the template's order."""
        return tuple(field for _, field, _, _ in string.Formatter().parse(self.template) if field)

    def __call__(self, *values: Field, **fields: Field) -> str:
        """The prompt with its fields filled, by position or by name. ValueError names what is missing or unknown.

        A Box or Point (padded square) is printed with two decimals, several boxes as `[..];[..]`, several strings as
        lettered options, one a line.
        """
        names = self.fields
        if len(values) > len(names):
            raise ValueError(f"prompt {self.name}: takes {_listed(names)}, got {len(values)} values")
        given = dict(zip(names, values, strict=False))
        twice = sorted(given.keys() & fields.keys())
        if twice:
            raise ValueError(f"prompt {self.name}: {_listed(twice)} given twice")
        given |= fields
        missing = [name for name in names if name not in given]
        unknown = [name for name in given if name not in names]
        if missing or unknown:
            said = [f"missing {_listed(missing)}"] if missing else []
            said += [f"unknown {_listed(unknown)}"] if unknown else []
            raise ValueError(f"prompt {self.name}: {' and '.join(said)}; it takes {_listed(names)}")
        return self.template.format_map({name: _text(self.name, name, value) for name, value in given.items()})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no fields"


def _text(prompt: str, field: str, value: Field) -> str:
    """A field's value as the model is to read it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Box | Point):
        return value.text()
    if isinstance(value, list | tuple) and value:
        if all(isinstance(v, Box) for v in value):
            return ";".join(v.text() for v in value if isinstance(v, Box))
        if all(isinstance(v, str) for v in value):
            return lettered(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"prompt {prompt}: {field}: expected text, a box, boxes or options, got {type(value).__name__}")


def lettered(options: Sequence[str]) -> str:
    """["cat", "dog"] -> "A. cat\\nB. dog"; at most 26."""
    if len(options) > len(string.ascii_uppercase):
        raise ValueError(f"options: at most 26 can be lettered, got {len(options)}")
    return "\n".join(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))


open_question = Prompt("open_question", "{question}", ("LLaVA-Bench", "MM-Vet", "MathVista"))
short_answer = Prompt(
    "short_answer",
    "{question}\n" + _SHORT,
    ("VQAv2", "GQA", "OKVQA", "VSR", "MME", "OCR-VQA"),
    "phrase",
    10,
)
option_letter = Prompt(
    "option_letter", "{question}\n{options}\n" + _LETTER, ("SeedBench", "ScienceQA", "IconVQA"), "letter", 10
)
refer = Prompt(
    "refer",
    "Please provide the bounding box coordinate of the region this sentence describes: {description}.",
    ("RefCOCO", "RefCOCO+", "RefCOCOg", "Referring Relationship"),
    "box",
    30,
)
ocr_vqa = Prompt("ocr_vqa", "{question}\nReference OCR token: {ocr}\n" + _SHORT, ("TextVQA",), "phrase", 10)
unanswerable = Prompt(
    "unanswerable",
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'. " + _SHORT,
    ("VizWiz",),
    "phrase",
    10,
)
options = Prompt("options", "{question}\nThere are several options: {options}", ("CCBench", "MMBench"), "letter", 10)
detect_all = Prompt("detect_all", "Detect all objects shown in the image.", ("Object Detection",), "boxes")
detect_category = Prompt("detect_category", "detect all {category} shown in the image.", ("Object Detection",), "boxes")
detect_people = Prompt("detect_people", "Detect all people shown in the image.", ("Human Pose Detection",), "boxes")
key_points = Prompt(
    "key_points",
    "Detect the key points of the person in the region {box}.",
    ("Human Pose Detection",),
    "points",
)
text_boxes = Prompt(
    "text_boxes", "Detect all texts and provide their bounding box coordinates.", ("Document Layout",), "boxes"
)
grounded_caption = Prompt(
    "grounded_caption",
    "Describe the image concisely. Include the bounding box for each mentioned object.",
    ("Grounded Caption",),
    "grounded",
)
relation = Prompt(
    "relation",
    "What is the relationship between the object in {box_a} and the object in {box_b}?",
    ("Relation Detection",),
    "text",
    64,
)
region_description = Prompt(
    "region_description", "Please provide a short description for this region: {box}.", (), "text", 64
)
caption = Prompt("caption", "Describe the image concisely.", (), "text", 128)
sentence_caption = Prompt("sentence_caption", "Provide a one-sentence caption for the provided image.", (), "text", 64)
detailed_caption = Prompt("detailed_caption", "Generate a detailed description about the image.", (), "text", 512)
classify = Prompt("classify", "Classify the image.", ("ImageNet-1K",), "phrase", 30)
defect = Prompt("defect", "Is there a defect in the image? Provide its bounding box coordinate.", (), "grounded", 64)

PROMPTS: dict[str, Prompt] = {
    prompt.name: prompt
    for prompt in (
        open_question,
        short_answer,
        option_letter,
        refer,
        ocr_vqa,
        unanswerable,
        options,
        detect_all,
        detect_category,
        detect_people,
        key_points,
        text_boxes,
        grounded_caption,
        relation,
        region_description,
        caption,
        sentence_caption,
        detailed_caption,
        classify,
        defect,
    )
}


def format(name: str, **fields: Field) -> str:
    """The prompt `name` with its fields filled. ValueError names an unknown task, a missing or an unknown field."""
    if name not in PROMPTS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(PROMPTS)}")
    return PROMPTS[name](**fields)
