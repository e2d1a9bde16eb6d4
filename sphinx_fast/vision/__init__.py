"""Views -> visual tokens: four encoders (`tower`) and the mixing of their features (`fusion`)."""

from sphinx_fast.vision.fusion import Fusion
from sphinx_fast.vision.tower import VisionFeatures, VisionTower

__all__ = ["Fusion", "VisionFeatures", "VisionTower"]
