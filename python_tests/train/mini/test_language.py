"""Where the language model starts."""

import torch

from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import preset
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.train.mini.language import smooth_curve, start_language_model
from sphinx_fast.train.pointer import coordinate_ids


def test_neighbours_on_the_curve_are_alike_and_others_are_not():
    torch.manual_seed(0)
    curve = smooth_curve(101, 128)
    assert 0.8 < curve.std() < 1.2
    alike = torch.nn.functional.normalize(curve, dim=-1) @ torch.nn.functional.normalize(curve, dim=-1).T
    assert alike.diagonal(1).min() > 0.8
    far = (torch.arange(101)[:, None] - torch.arange(101)).abs() > 10
    assert alike[far].abs().max() < 0.75 and alike[far].abs().mean() < 0.2


def test_coordinates_start_in_order_and_the_head_reads_the_embedding():
    torch.manual_seed(0)
    model = SphinxForConditionalGeneration(preset("sphinx-mini"))
    tokenizer = SphinxProcessor.from_pretrained(EMBEDDED_MODEL).tokenizer
    start_language_model(model, tokenizer)
    ids = coordinate_ids(tokenizer)
    rows = model.get_input_embeddings().weight[ids]
    steps, jumps = (rows[1:] - rows[:-1]).norm(dim=-1), (rows[50:] - rows[:51]).norm(dim=-1)
    assert steps.max() < jumps.min()
    said = (rows @ model.lm_head.weight.T).argmax(-1)
    assert (said == torch.tensor(ids)).float().mean() > 0.9
