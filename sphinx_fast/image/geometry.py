"""How a picture becomes the canvas, the square of uint8 pixels that views are cut from: the released transforms.

A rectangle of the picture is set into a plane, the plane is resized by Pillow's bicubic, and a square of the result is
the canvas. The three transforms of LLaMA2-Accessory, which SPHINX was trained with, are three such geometries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import PIL
import torch

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])


class Geometry(NamedTuple):
    """All in pixels. Heights and rows first: [top, left], [height, width].

    The rectangle `region` [top, left] of `extent` [height, width] of the picture lies at `offset` in a plane of size
    `plane` that is otherwise of the padding colour; the plane is resized to `resized`; the canvas is the square whose
    top left corner there is `origin`.
    """

    region: tuple[int, int]
    extent: tuple[int, int]
    plane: tuple[int, int]
    offset: tuple[int, int]
    resized: tuple[int, int]
    origin: tuple[int, int]

    @property
    def vertical_first(self) -> bool:
        """Whether the installed Pillow resizes columns before rows, which shows in the last bit."""
        return vertical_first(self.plane, self.resized)

    def shows_only_padding(self, top: int, left: int, size: int) -> bool:
        """Whether no pixel of the picture reaches the square [top, left] of `size` of the canvas, through the bicubic
        filter's support too."""
        for axis, begin in enumerate((top, left)):
            scale = self.plane[axis] / self.resized[axis]
            reach = 2 * max(scale, 1.0)
            low = (self.origin[axis] + begin + 0.5) * scale - reach
            high = (self.origin[axis] + begin + size - 0.5) * scale + reach
            if high <= self.offset[axis] or low >= self.offset[axis] + self.extent[axis]:
                return True
        return False

    def numbers(self) -> list[int]:
        """The thirteen integers that the compiled room reads."""
        return [number for pair in self for number in pair] + [int(self.vertical_first)]


def vertical_first(plane: tuple[int, int], resized: tuple[int, int], pillow: tuple[int, ...] = PILLOW) -> bool:
    """Pillow 13 and later start with the columns where that saves more; earlier ones never do."""
    rows, columns = plane[0] - resized[0], plane[1] - resized[1]
    return pillow >= (13,) and rows > 0 and rows > 2 * columns


def padded_resize(height: int, width: int, size: int) -> Geometry:
    """The whole picture, padded to a square: what the released models are asked with."""
    side = max(height, width)
    offset = ((side - height) // 2, (side - width) // 2)
    return Geometry((0, 0), (height, width), (side, side), offset, (size, size), (0, 0))


def resized_center_crop(height: int, width: int, size: int) -> Geometry:
    """The shorter side resized to `size`, the middle of the longer one kept. As torchvision's Resize and CenterCrop."""
    resized = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    origin = (round((resized[0] - size) / 2), round((resized[1] - size) / 2))
    return Geometry((0, 0), (height, width), (height, width), (0, 0), resized, origin)


def resized_region(region: tuple[int, int], extent: tuple[int, int], size: int) -> Geometry:
    """A rectangle of the picture, resized to a square whatever its shape."""
    return Geometry(region, extent, extent, (0, 0), (size, size), (0, 0))


def random_resized_crop(
    height: int,
    width: int,
    size: int,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333),
    generator: torch.Generator | None = None,
) -> Geometry:
    """A random rectangle of `scale` of the area with width / height in `ratio` (log-uniform): training's augmentation.

    Draws what torchvision's RandomResizedCrop draws from the same state of torch's generator: ten tries, then the
    largest middle part whose shape is allowed.
    """
    log_ratio = torch.log(torch.tensor(ratio))
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        shape = torch.exp(torch.empty(1).uniform_(*log_ratio.tolist(), generator=generator)).item()
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - w + 1, (1,), generator=generator).item()
            return resized_region((int(top), int(left)), (h, w), size)
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return resized_region(((height - h) // 2, (width - w) // 2), (h, w), size)
