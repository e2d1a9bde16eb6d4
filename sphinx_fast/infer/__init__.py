"""Logits -> text: `Sphinx` (ask, stream, chat) over one engine."""

from sphinx_fast.infer.chat import Conversation
from sphinx_fast.infer.picture_cache import PictureCache
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.infer.sphinx import EMBEDDED_MODEL, Sphinx

__all__ = ["EMBEDDED_MODEL", "Conversation", "PictureCache", "Sampling", "Sphinx"]
