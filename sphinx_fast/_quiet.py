"""Imports torchao without its reports, where it is installed: transformers imports it anyway.

It warns of every kernel that is for another GPU or Python, six lines before each answer of the command line.
"""

import contextlib
import logging

_TALKERS = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
_levels = [logger.level for logger in _TALKERS]
for _logger in _TALKERS:
    _logger.setLevel(logging.ERROR)
# Not installed; or broken, and then transformers says so where it is used.
with contextlib.suppress(Exception):
    from torchao.prototype.safetensors import safetensors_support  # noqa: F401 - what transformers imports of it
for _logger, _level in zip(_TALKERS, _levels, strict=True):
    _logger.setLevel(_level)
