"""A question in a row of many is the question alone."""

from random import Random

import torch

from sphinx_fast.data.scene_questions import questions
from sphinx_fast.data.scene_targets import dense_targets
from sphinx_fast.data.scenes import scene
from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import SphinxForConditionalGeneration, preset
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.mini_language import Pointer, answer_loss
from sphinx_fast.train.mini_rows import RowMaker, soft_labels
from sphinx_fast.train.mini_tokenizer import coordinates
from sphinx_fast.train.scene_pool import light_scenes


def test_blocks_do_not_see_each_other():
    torch.manual_seed(0)
    config = preset("sphinx-mini")
    model = SphinxForConditionalGeneration(config).eval()
    tokenizer = SphinxTokenizer.from_pretrained(EMBEDDED_MODEL)
    drawn = next(light_scenes(5, 1))
    maker = RowMaker(tokenizer, config.vision_config.tokens_per_picture, config.image_token_id, 200)
    rows = maker.rows([drawn], Random(1))
    visual = torch.randn(config.vision_config.tokens_per_picture, config.text_config.hidden_size)
    with torch.no_grad():
        packed = model.model(
            input_ids=rows.input_ids, visual_tokens=visual, attention_mask=rows.mask(), position_ids=rows.positions
        ).last_hidden_state
        assert rows.blocks.max() >= 3
        for number in (1, 3):
            keep = (rows.blocks[0] == 0) | (rows.blocks[0] == number)
            alone = model.model(input_ids=rows.input_ids[:, keep], visual_tokens=visual).last_hidden_state
            torch.testing.assert_close(packed[:, keep], alone, atol=1e-4, rtol=1e-4)


def test_labels_are_the_answers():
    tokenizer = SphinxTokenizer.from_pretrained(EMBEDDED_MODEL)
    maker = RowMaker(tokenizer, 3, 1024, 400)
    drawn = next(light_scenes(8, 1))
    rows = maker.rows([drawn], Random(2))
    asked = {q.prompt: q.answer for seed in range(40) for q in questions(drawn, Random(seed), open_share=0.5)}
    for number in range(1, int(rows.blocks.max()) + 1):
        here = rows.blocks[0] == number
        answer = rows.labels[0][here & (rows.labels[0] >= 0)]
        assert tokenizer.sentencepiece.decode(answer.tolist()).strip().removesuffix("\n###") in asked.values()


def test_soft_labels_are_distributions_around_the_coordinate():
    tokenizer = SphinxTokenizer.from_pretrained(EMBEDDED_MODEL)
    table = soft_labels(tokenizer, 1024, 0.015)
    ids = [tokenizer.sentencepiece.piece_to_id(text) for text in coordinates()]
    torch.testing.assert_close(table.sum(-1), torch.ones(1024))
    assert all(table[i].argmax() == i for i in ids)
    assert 0 < table[ids[50], ids[52]] < table[ids[50], ids[51]] < table[ids[50], ids[50]] < 1
    assert table[5, 5] == 1


def test_answer_loss_counts_answers_only():
    torch.manual_seed(0)
    config = preset("sphinx-mini")
    model = SphinxForConditionalGeneration(config)
    tokenizer = SphinxTokenizer.from_pretrained(EMBEDDED_MODEL)
    maker = RowMaker(tokenizer, config.vision_config.tokens_per_picture, config.image_token_id, 120)
    rows = maker.rows(list(light_scenes(0, 1)), Random(0))
    visual = torch.randn(config.vision_config.tokens_per_picture, config.text_config.hidden_size)
    targets = soft_labels(tokenizer, 1024, 0.015)
    loss, _ = answer_loss(model, rows, visual, targets, rows.mask())
    rows.weights *= 3.0  # only the ratio of weights counts
    again, _ = answer_loss(model, rows, visual, targets, rows.mask())
    torch.testing.assert_close(loss, again)
    assert 5 < float(loss) < 9  # near ln 1024 before any training


def test_pointer_loss_is_the_attention_on_the_box():
    torch.manual_seed(0)
    config = preset("sphinx-mini")
    model = SphinxForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    tokenizer = SphinxTokenizer.from_pretrained(EMBEDDED_MODEL)
    drawn = list(light_scenes(0, 2))
    rows = RowMaker(tokenizer, 215, 1024, 160).rows(drawn, Random(0))
    pointer, mask = Pointer(model), rows.mask()
    outputs = model.model(
        input_ids=rows.input_ids,
        visual_tokens=torch.randn(430, config.text_config.hidden_size),
        attention_mask=mask,
        position_ids=rows.positions,
        output_attentions=True,
    )
    row, at = rows.pointers.unbind(-1)
    weights = outputs.attentions[Pointer.LAYER][row, :, at][:, list(Pointer.HEADS)]
    patches = weights[..., pointer.first : pointer.first + 36]
    expected = -(patches * pointer.targets(rows.pointed).unsqueeze(1)).sum(-1).log().mean()
    torch.testing.assert_close(pointer.loss(rows, mask), expected)
    owned = pointer.targets(torch.tensor([drawn[0].square_box(thing.box) for thing in drawn[0].things])).any(0)
    assert torch.equal(owned.view(6, 6), torch.from_numpy(dense_targets(scene(0), 6)["thing"] > 0))
