"""What a model folder must hold: the names and shapes that `save_pretrained` writes for a configuration."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration


def on_disk_shapes(config: SphinxConfig) -> dict[str, tuple[int, ...]]:
    """{name in the safetensors file: shape} of a configuration; no weight is allocated.

    The names of transformers' modules differ between its versions, those in the files do not.
    """
    with torch.device("meta"):
        # A copy: the model writes to its configuration which attention it chose, and loading would take that for asked.
        return disk_shapes(SphinxForConditionalGeneration(deepcopy(config)))


def disk_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The same of a model that exists, be it on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
