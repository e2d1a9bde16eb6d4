"""Bytes -> RGB -> views. `decode` is the only door for foreign image bytes; `views` cuts what the encoders see."""

from sphinx_fast.image.decode import PictureError, load_picture

__all__ = ["PictureError", "load_picture"]
