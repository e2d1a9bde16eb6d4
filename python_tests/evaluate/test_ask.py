"""Answers with what the figures need: the same as `generate`'s, confidences of boxes, p(yes)."""

from itertools import islice

import numpy as np
import pytest
import torch

from sphinx_fast.data.scene_questions import examples
from sphinx_fast.data.scenes import scene
from sphinx_fast.evaluate.ask import Answerer, answers, box_confidences, grey
from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import SphinxForConditionalGeneration, SphinxProcessor
from sphinx_fast.model.conversation import conversation_prompt, cut_at_stop
from sphinx_fast.tasks import prompts
from sphinx_fast.tasks.boxes import parse_boxes


@pytest.fixture(scope="module")
def embedded():
    model = SphinxForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    return model, SphinxProcessor.from_pretrained(EMBEDDED_MODEL)


@torch.inference_mode()
def generated(model, processor, pictures, questions, most):
    texts = [conversation_prompt([(question, None)]) for question in questions]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=most, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    said = [cut_at_stop(text)[0].strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return said, output.logits[0].float().softmax(-1)


def test_answers_are_those_of_generate(embedded):
    items = list(islice(examples("vqa", split="validation"), 12))
    pictures, asked = [s.picture for s, _ in items], [q.prompt for _, q in items]
    said = generated(*embedded, pictures, asked, 6)[0]
    assert answers(*embedded, pictures, asked, 6) == said
    answerer = Answerer(*embedded)
    pairs = [(picture, "vqa", prompt) for picture, prompt in zip(pictures, asked, strict=True)]
    assert [one.text for one in answerer.seeing(pairs)] == said
    assert [one.text for one in answerer.blind(pairs)] == generated(*embedded, [grey(p) for p in pictures], asked, 6)[0]


def test_blind_answers_do_not_depend_on_the_picture(embedded):
    answerer = Answerer(*embedded)
    one, two = ([(scene(seed).picture, "refer", prompts.refer("red circle"))] for seed in (0, 1))
    assert answerer.blind(one) == answerer.blind(two)
    assert answerer.seeing(one) != answerer.blind(one)


def test_grey_hides_everything():
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert grey(picture).shape == picture.shape and len(np.unique(grey(picture).reshape(-1, 3), axis=0)) == 1


def test_p_yes_is_that_of_the_first_token(embedded):
    items = list(islice(examples("defect", split="validation"), 5))
    pictures, asked = [s.picture for s, _ in items], [q.prompt for _, q in items]
    answerer = Answerer(*embedded)
    probabilities = generated(*embedded, pictures, asked, 1)[1]
    tokenizer = embedded[1].tokenizer
    yes, no = (tokenizer("Assistant: " + word, add_special_tokens=False)["input_ids"][-1] for word in ("yes", "no"))
    wanted = (probabilities[:, yes] / (probabilities[:, yes] + probabilities[:, no])).tolist()
    mixed = [(p, "defect", q) for p, q in zip(pictures, asked, strict=True)]
    mixed.insert(2, (pictures[0], "vqa", prompts.short_answer("How many shapes are there?")))
    said = answerer.seeing(mixed)
    assert [one.yes for one in said[:2] + said[3:]] == pytest.approx(wanted, abs=1e-4)
    assert said[2].yes == 0.5 and len(set(wanted)) > 1
    for one in said[:2] + said[3:]:
        assert (one.yes > 0.5) == one.text.startswith("yes")


def test_a_box_is_as_sure_as_its_tokens():
    pieces = ["red", " circle", "[", "0.1,0.2,", "0.3,0.4", "]", ", ", "blue star", "[0.5,0.6,0.7,0.8]", "[no box]"]
    halves = [0.5] * 6 + [0.25] * 3 + [0.1]
    confidences = box_confidences(lambda ids: "".join(pieces[i] for i in ids), range(10), np.log(halves).tolist())
    assert confidences == pytest.approx((0.5, 0.25))
    unsure = [0.5, 0.5, 0.5, 0.5, 0.5, 0.5 / 64, *halves[6:]]
    confidences = box_confidences(lambda ids: "".join(pieces[i] for i in ids), range(10), np.log(unsure).tolist())
    assert confidences == pytest.approx((0.25, 0.25))
    assert box_confidences(lambda ids: "", [], []) == ()


def test_every_box_that_is_said_has_a_confidence(embedded):
    asked = [(s.picture, "detect_all", q.prompt) for s, q in islice(examples("detect_all", split="validation"), 6)]
    for one in Answerer(*embedded).seeing(asked):
        assert len(one.boxes) == len(parse_boxes(one.text))
        assert all(0 < confidence <= 1 for confidence in one.boxes)
