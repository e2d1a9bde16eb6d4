"""Logits -> text: `Sphinx` (ask, ask_many, ask_batch, stream, chat) over one engine."""

from sphinx_fast.infer.batch import Batch
from sphinx_fast.infer.chat import Conversation
from sphinx_fast.infer.loading import EMBEDDED_MODEL
from sphinx_fast.infer.picture_cache import PictureCache
from sphinx_fast.infer.request import Answer
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.infer.sphinx import Sphinx

__all__ = ["EMBEDDED_MODEL", "Answer", "Batch", "Conversation", "PictureCache", "Sampling", "Sphinx"]
