"""One wrapper per room of csrc: a torch op, checked arguments, documented formula and shapes."""

from sphinx_fast.ops._extension import FLOAT_DTYPES, build_info, covers, extension
from sphinx_fast.ops.attention import KeyValues, Rope, Workspace, attention, attention_workspace
from sphinx_fast.ops.fusion import Projection, fusion, layer_norm
from sphinx_fast.ops.views import EncoderViews, canvas, encoder_views, views

__all__ = [
    "FLOAT_DTYPES",
    "EncoderViews",
    "KeyValues",
    "Projection",
    "Rope",
    "Workspace",
    "attention",
    "attention_workspace",
    "build_info",
    "canvas",
    "covers",
    "encoder_views",
    "extension",
    "fusion",
    "layer_norm",
    "views",
]
