"""Visual tokens and text -> logits, in the shape of a transformers model; registered with the Auto classes here."""

from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer as _AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

# The oldest transformers of our window offer this class at their top level only beside torchvision; it needs only PIL.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from sphinx_fast.model import attention as _attention
from sphinx_fast.model.config import ConvNextConfig, SphinxConfig, SphinxVisionConfig
from sphinx_fast.model.image_processor import SphinxImageProcessor, SphinxImageProcessorReference
from sphinx_fast.model.presets import PRESETS, preset
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration, SphinxModel
from sphinx_fast.model.tokenizer import SphinxTokenizer

AttentionInterface.register(_attention.NAME, _attention.attention_forward)
AttentionMaskInterface.register(_attention.NAME, sdpa_mask)
AutoConfig.register(SphinxConfig.model_type, SphinxConfig)
AutoConfig.register(SphinxVisionConfig.model_type, SphinxVisionConfig)
AutoConfig.register(ConvNextConfig.model_type, ConvNextConfig)
AutoModel.register(SphinxConfig, SphinxModel)
AutoModelForImageTextToText.register(SphinxConfig, SphinxForConditionalGeneration)
AutoProcessor.register(SphinxConfig, SphinxProcessor)
_AutoTokenizer.register(SphinxConfig, fast_tokenizer_class=SphinxTokenizer)
# Without `backend=` transformers resolves to "torchvision" or "pil" only, so the fast class stands under both.
AutoImageProcessor.register(
    SphinxConfig,
    image_processor_classes={
        "pil": SphinxImageProcessor,
        "torchvision": SphinxImageProcessor,
        "sphinx_fast": SphinxImageProcessor,
        "reference": SphinxImageProcessorReference,
    },
)

__all__ = [
    "PRESETS",
    "ConvNextConfig",
    "SphinxConfig",
    "SphinxForConditionalGeneration",
    "SphinxImageProcessor",
    "SphinxImageProcessorReference",
    "SphinxModel",
    "SphinxProcessor",
    "SphinxTokenizer",
    "SphinxVisionConfig",
    "preset",
]
