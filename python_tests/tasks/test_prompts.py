"""The prompt registry: the paper's wording, fields by position and by name, errors that name what is wrong."""

import dataclasses

import pytest

from sphinx_fast.tasks import prompts
from sphinx_fast.tasks.boxes import Box
from sphinx_fast.tasks.prompts import PROMPTS

BOX = Box(0.05, 0.32, 0.54, 0.83)

# Table 1 word for word, filled; typographic quotes replaced.
TABLE_1 = {
    "open_question": ({"question": "Why?"}, "Why?"),
    "short_answer": ({"question": "Why?"}, "Why?\nAnswer the question using a single word or phrase."),
    "option_letter": (
        {"question": "Why?", "options": ["so", "thus"]},
        "Why?\nA. so\nB. thus\nAnswer with the option's letter from the given choices directly.",
    ),
    "refer": (
        {"description": "the cat"},
        "Please provide the bounding box coordinate of the region this sentence describes: the cat.",
    ),
    "ocr_vqa": (
        {"question": "Why?", "ocr": "EXIT, 12"},
        "Why?\nReference OCR token: EXIT, 12\nAnswer the question using a single word or phrase.",
    ),
    "unanswerable": (
        {"question": "Why?"},
        "Why?\nWhen the provided information is insufficient, respond with 'Unanswerable'. "
        "Answer the question using a single word or phrase.",
    ),
    "options": (
        {"question": "Why?", "options": ["so", "thus"]},
        "Why?\nThere are several options: A. so\nB. thus",
    ),
    "detect_all": ({}, "Detect all objects shown in the image."),
    "detect_category": ({"category": "dogs"}, "detect all dogs shown in the image."),
    "detect_people": ({}, "Detect all people shown in the image."),
    "key_points": (
        {"box": BOX},
        "Detect the key points of the person in the region [0.05,0.32,0.54,0.83].",
    ),
    "text_boxes": ({}, "Detect all texts and provide their bounding box coordinates."),
    "grounded_caption": (
        {},
        "Describe the image concisely. Include the bounding box for each mentioned object.",
    ),
    "relation": (
        {"box_a": BOX, "box_b": "[0.00,0.00,1.00,1.00]"},
        "What is the relationship between the object in [0.05,0.32,0.54,0.83] and the object in [0.00,0.00,1.00,1.00]?",
    ),
    "region_description": (
        {"box": BOX},
        "Please provide a short description for this region: [0.05,0.32,0.54,0.83].",
    ),
    "caption": ({}, "Describe the image concisely."),
    "sentence_caption": ({}, "Provide a one-sentence caption for the provided image."),
    "detailed_caption": ({}, "Generate a detailed description about the image."),
    "classify": ({}, "Classify the image."),
    "defect": ({}, "Is there a defect in the image? Provide its bounding box coordinate."),
}


def test_the_registry_holds_these_prompts_and_no_others():
    assert set(PROMPTS) == set(TABLE_1)
    assert all(getattr(prompts, name) is prompt and prompt.name == name for name, prompt in PROMPTS.items())


@pytest.mark.parametrize("name", TABLE_1)
def test_wording(name):
    fields, expected = TABLE_1[name]
    assert prompts.format(name, **fields) == expected
    assert PROMPTS[name](*fields.values()) == expected
    assert PROMPTS[name].fields == tuple(fields)


def test_every_benchmark_of_table_1_has_one_prompt():
    named = [benchmark for prompt in PROMPTS.values() for benchmark in prompt.benchmarks]
    for benchmark in (
        "VQAv2",
        "MME",
        "RefCOCOg",
        "TextVQA",
        "VizWiz",
        "MMBench",
        "SeedBench",
        "Referring Relationship",
    ):
        assert named.count(benchmark) == 1, benchmark


def test_room_for_the_answer_follows_the_released_evaluation():
    assert PROMPTS["short_answer"].max_new_tokens == 10
    assert PROMPTS["refer"].max_new_tokens == 30


def test_values_are_text_not_templates():
    assert prompts.refer("a {box} with {0} and {}") == (
        "Please provide the bounding box coordinate of the region this sentence describes: a {box} with {0} and {}."
    )


def test_several_boxes():
    assert prompts.key_points([BOX, BOX]).endswith("region [0.05,0.32,0.54,0.83];[0.05,0.32,0.54,0.83].")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: prompts.refer(), ["refer", "missing description"]),
        (lambda: prompts.refer(text="x"), ["missing description", "unknown text"]),
        (lambda: prompts.caption(question="x"), ["caption", "unknown question", "no fields"]),
        (lambda: prompts.caption("x"), ["caption", "1 values"]),
        (lambda: prompts.refer("x", description="y"), ["description given twice"]),
        (lambda: prompts.format("locate", description="x"), ["unknown task 'locate'", "refer"]),
        (lambda: prompts.key_points(None), ["key_points", "box", "NoneType"]),
        (lambda: prompts.key_points(Box(10, 20, 300, 400, "picture")), ["padded square", "picture"]),
        (lambda: prompts.option_letter("?", ["x"] * 27), ["26", "27"]),
    ],
)
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_prompt_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROMPTS["refer"].template = ""  # type: ignore[misc]
