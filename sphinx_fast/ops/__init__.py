"""One wrapper per room of csrc: a torch op, checked arguments, documented formula and shapes."""

from sphinx_fast.ops._extension import build_info, extension
from sphinx_fast.ops.views import EncoderViews, canvas, encoder_views, views

__all__ = ["EncoderViews", "build_info", "canvas", "encoder_views", "extension", "views"]
