"""Logits -> text: `Sphinx` (ask, stream, chat) over one engine."""

from sphinx_fast.infer.chat import Conversation
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.infer.sphinx import Sphinx

__all__ = ["Conversation", "Sampling", "Sphinx"]
