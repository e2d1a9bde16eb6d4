"""Pictures -> `pixel_values`: the image processors registered with transformers' AutoImageProcessor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from sphinx_fast.image.decode import PictureError, load_picture
from sphinx_fast.image.geometry import Geometry, padded_resize, random_resized_crop, resized_center_crop
from sphinx_fast.image.views import square_views


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


def _is_square(picture: np.ndarray | torch.Tensor) -> TypeGuard[torch.Tensor]:
    return isinstance(picture, torch.Tensor) and picture.is_floating_point()


# The released transforms. The last one draws from torch's generator, as torchvision's does.
TRANSFORMS: dict[str, Callable[[int, int, int], Geometry]] = {
    "padded_resize": padded_resize,
    "resized_center_crop": resized_center_crop,
    "random_resized_crop": random_resized_crop,
}
FIXED_TRANSFORMS = frozenset({"padded_resize", "resized_center_crop"})  # no draw: a picture's views are always the same


class SphinxImageProcessor(BaseImageProcessor):
    """Pad to a square, resize as Pillow does, normalise, cut the views: one call of the room `views`.

    Pictures that are uint8 CUDA tensors, as decoders on the GPU leave them, stay there, and so do their views.

    Args:
        picture_size: side of the padded, resized square.
        view_size: side of a view; the crops tile the square.
        max_pixels: pictures with more are refused before they are decoded.
        transform: padded_resize (what the models are asked with), or, to train, resized_center_crop or
            random_resized_crop.
        skip_padding: leave out crops that show nothing of the picture: with 3 x 3 crops (SPHINX-2k) six of nine where
            it is more than three times as wide as high, or as high as wide. The released models never saw that.
    """

    model_input_names = ["pixel_values", "num_image_patches"]  # noqa: RUF012

    def __init__(
        self,
        picture_size: int = 224,
        view_size: int = 224,
        max_pixels: int = 16_000_000,
        transform: str = "padded_resize",
        skip_padding: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if view_size <= 0 or picture_size % view_size:
            raise ValueError(f"picture_size {picture_size} is not a multiple of view_size {view_size}")
        if transform not in TRANSFORMS:
            raise ValueError(f"transform: expected one of {', '.join(TRANSFORMS)}, got {transform!r}")
        self.transform = transform
        self.skip_padding = skip_padding
        self.picture_size = picture_size
        self.view_size = view_size
        self.max_pixels = max_pixels

    @property
    def num_views(self) -> int:
        """Views of a picture: the global one, and the crops when the square is larger than a view."""
        ratio = self.picture_size // self.view_size
        return 1 if ratio == 1 else 1 + ratio * ratio

    @property
    def mode(self) -> Hashable | None:
        """What decides a picture's views besides its pixels; None when they are drawn at random."""
        if self.transform not in FIXED_TRANSFORMS:
            return None
        return (type(self), self.picture_size, self.view_size, self.transform, self.skip_padding)

    def geometries(self, pictures: Sequence[np.ndarray | torch.Tensor]) -> list[Geometry]:
        """How each picture becomes the canvas."""
        return [TRANSFORMS[self.transform](p.shape[0], p.shape[1], self.picture_size) for p in pictures]

    def views_shown(self, geometry: Geometry) -> list[int]:
        """The views of a picture that are kept, by number: all of them, or without those that show only padding."""
        ratio, size = self.picture_size // self.view_size, self.view_size
        if not self.skip_padding or ratio == 1:
            return list(range(self.num_views))
        crops = [(row * size, column * size) for row in range(ratio) for column in range(ratio)]
        return [0, *(1 + i for i, crop in enumerate(crops) if not geometry.shows_only_padding(*crop, size))]

    def count_views(self, picture: np.ndarray | torch.Tensor) -> int:
        """How many views `cut` makes of a picture."""
        return self.num_views if _is_square(picture) else len(self.views_shown(self.geometries([picture])[0]))

    def cut(self, pictures: Sequence[np.ndarray | torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Pictures -> fp32 views [sum of V, 3, view_size, view_size], and how many are whose.

        A picture is uint8 [h, w, 3], or a normalised square, fp32 [3, picture_size, picture_size] on the CPU, which
        only has to be cut.
        """
        if any(_is_square(picture) for picture in pictures):
            parts = [
                square_views(picture, self.view_size) if _is_square(picture) else self.cut([picture])[0].cpu()
                for picture in pictures
            ]
            return torch.cat(parts), [len(part) for part in parts]
        geometries = self.geometries(pictures)
        pixels, shown = self.all_views(pictures, geometries), [self.views_shown(geometry) for geometry in geometries]
        if any(len(views) < self.num_views for views in shown):
            kept = [picture * self.num_views + view for picture, views in enumerate(shown) for view in views]
            pixels = pixels[torch.tensor(kept, device=pixels.device)]
        return pixels, [len(views) for views in shown]

    def all_views(self, pictures: Sequence[np.ndarray | torch.Tensor], geometries: list[Geometry]) -> torch.Tensor:
        """[B*V, 3, view_size, view_size]: picture-major, global view first, crops row-major."""
        from sphinx_fast.ops import views

        tensors = [
            p if isinstance(p, torch.Tensor) else torch.from_numpy(np.require(p, requirements=["C", "W"]))
            for p in pictures
        ]
        return views(
            tensors,
            picture_size=self.picture_size,
            view_size=self.view_size,
            geometries=geometries,
        )

    def load(self, image: Any) -> np.ndarray | torch.Tensor:
        """A picture in any form -> uint8 [h, w, 3]: a tensor where it lies on a GPU already, else an array."""
        image = as_hwc(image)
        if not (isinstance(image, torch.Tensor) and image.is_cuda):
            return load_picture(image, max_pixels=self.max_pixels)
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[-1] != 3 or not image.numel():
            raise PictureError(f"the CUDA tensor: expected uint8 RGB, got {image.dtype} {list(image.shape)}")
        if image.numel() > self.max_pixels * 3:
            raise PictureError(f"the CUDA tensor: more than the {self.max_pixels:,} pixels allowed (max_pixels)")
        return image

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Pictures (path, bytes, PIL, uint8 array or tensor, or lists of these) -> `pixel_values`, `num_image_patches`.

        `pixel_values` [B*V, 3, s, s] fp32, CLIP-normalised, picture-major, global view first, crops row-major;
        `num_image_patches` [B] counts the views of each picture.
        """
        pictures = [self.load(image) for image in flatten_pictures(images)]
        if not pictures:
            raise ValueError("images: expected at least one picture, got none")
        pixel_values, counts = self.cut(pictures)
        data: dict[str, Any] = {"pixel_values": pixel_values, "num_image_patches": torch.tensor(counts)}
        if return_tensors not in (None, "pt"):
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Views of a picture of that size (serving engines ask)."""
        return len(self.views_shown(TRANSFORMS[self.transform](height, width, self.picture_size)))


class SphinxImageProcessorReference(SphinxImageProcessor):
    """The same tensors from plain PIL and torch: what the released code runs, and the oracle of the fast one."""

    def all_views(self, pictures: Sequence[np.ndarray | torch.Tensor], geometries: list[Geometry]) -> torch.Tensor:
        from sphinx_fast.image.views import reference_views

        sizes = (self.picture_size, self.view_size)
        arrays = [p.cpu().numpy() if isinstance(p, torch.Tensor) else p for p in pictures]
        return torch.cat([reference_views(p, *sizes, g) for p, g in zip(arrays, geometries, strict=True)])
