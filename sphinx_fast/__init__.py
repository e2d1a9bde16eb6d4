"""sphinx-fast: SPHINX, the multimodal LLM that mixes weights, tasks and visual embeddings, as a fast, small package.

Importing the package registers the model, its configuration, its image processor and its processor with
transformers' Auto classes, so that ``AutoModelForImageTextToText.from_pretrained(folder)`` works as for any model.
"""

from sphinx_fast import _quiet  # noqa: F401 - before transformers is imported
from sphinx_fast.infer import EMBEDDED_MODEL, Sphinx
from sphinx_fast.model import (
    SphinxConfig,
    SphinxForConditionalGeneration,
    SphinxImageProcessor,
    SphinxModel,
    SphinxProcessor,
    SphinxVisionConfig,
    preset,
)

__version__ = "0.1.0"

__all__ = [
    "EMBEDDED_MODEL",
    "Sphinx",
    "SphinxConfig",
    "SphinxForConditionalGeneration",
    "SphinxImageProcessor",
    "SphinxModel",
    "SphinxProcessor",
    "SphinxVisionConfig",
    "__version__",
    "preset",
]
