"""Pictures -> `pixel_values`: the image processors registered with transformers' AutoImageProcessor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from sphinx_fast.image.decode import load_picture


def flatten_pictures(images: Any) -> list[Any]:
    """One picture, a list of them, or lists per text (None: no picture) -> a flat list of pictures."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for entry in images for picture in flatten_pictures(entry)]
    return [images]


def as_hwc(image: Any) -> Any:
    """Arrays may come channels first (torchvision decodes so): [3, h, w] -> [h, w, 3]. Everything else unchanged."""
    if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 3:
        channels = (1, 3, 4)
        if image.shape[0] in channels and image.shape[-1] not in channels:
            return image.transpose(1, 2, 0) if isinstance(image, np.ndarray) else image.permute(1, 2, 0)
    return image


class SphinxImageProcessor(BaseImageProcessor):
    """Pad to a square, resize as Pillow does, normalise, cut the views: one call of the room `views`.

    Args:
        picture_size: side of the padded, resized square.
        view_size: side of a view; the crops tile the square.
        max_pixels: pictures with more are refused before they are decoded.
    """

    model_input_names = ["pixel_values", "num_image_patches"]  # noqa: RUF012

    def __init__(
        self, picture_size: int = 224, view_size: int = 224, max_pixels: int = 16_000_000, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if view_size <= 0 or picture_size % view_size:
            raise ValueError(f"picture_size {picture_size} is not a multiple of view_size {view_size}")
        self.picture_size = picture_size
        self.view_size = view_size
        self.max_pixels = max_pixels

    @property
    def num_views(self) -> int:
        """Views of a picture: the global one, and the crops when the square is larger than a view."""
        ratio = self.picture_size // self.view_size
        return 1 if ratio == 1 else 1 + ratio * ratio

    def cut(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 [h, w, 3] pictures -> fp32 views [B*V, 3, view_size, view_size]."""
        from sphinx_fast.ops import views

        tensors = [torch.from_numpy(np.require(picture, requirements=["C", "W"])) for picture in pictures]
        return views(tensors, picture_size=self.picture_size, view_size=self.view_size)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Pictures (path, bytes, PIL, uint8 array or tensor, or lists of these) -> `pixel_values`, `num_image_patches`.

        `pixel_values` [B*V, 3, s, s] fp32, CLIP-normalised, picture-major, global view first, crops row-major;
        `num_image_patches` [B] counts the views of each picture.
        """
        pictures = [load_picture(as_hwc(image), max_pixels=self.max_pixels) for image in flatten_pictures(images)]
        if not pictures:
            raise ValueError("images: expected at least one picture, got none")
        data: dict[str, Any] = {
            "pixel_values": self.cut(pictures),
            "num_image_patches": torch.full((len(pictures),), self.num_views, dtype=torch.long),
        }
        if return_tensors not in (None, "pt"):
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Views of a picture of any size (serving engines ask)."""
        return self.num_views


class SphinxImageProcessorReference(SphinxImageProcessor):
    """The same tensors from plain PIL and torch: what the released code runs, and the oracle of the fast one."""

    def cut(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        from sphinx_fast.image.views import reference_views

        return torch.cat([reference_views(picture, self.picture_size, self.view_size) for picture in pictures])
