"""Picture -> views in plain Pillow and torch: the oracle of the room `views`, and the "reference" image processor.

Source: the released SPHINX preprocessing (`padded_resize`) and its encoding of 1, 5 or 10 views.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sphinx_fast.image.geometry import Geometry, padded_resize

PAD_COLOUR = (122, 116, 104)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DINOV2_MEAN = (0.485, 0.456, 0.406)
DINOV2_STD = (0.229, 0.224, 0.225)
MAX_SIDE = (
    16_384  # of the padded square, which is really built here and then takes 805 MB; the room `views` never builds it
)


def view_ratio(picture_size: int, view_size: int) -> int:
    """How many crops lie side by side in the picture. ValueError where they do not tile it."""
    if view_size < 1 or picture_size < 1 or picture_size % view_size:
        raise ValueError(f"picture_size: expected a multiple of view_size {view_size}, got {picture_size}")
    return picture_size // view_size


def num_views(picture_size: int, view_size: int) -> int:
    """1, or the global view and ratio^2 crops: 1 + 4 at ratio 2, 1 + 9 at ratio 3."""
    ratio = view_ratio(picture_size, view_size)
    return 1 if ratio == 1 else 1 + ratio * ratio


def reference_canvas(
    picture: Image.Image | np.ndarray, picture_size: int, geometry: Geometry | None = None
) -> Image.Image:
    """RGB picture, PIL or uint8 [h, w, 3] -> the canvas: padded to a square with PAD_COLOUR, or as `geometry` says, and
    resized by Pillow's bicubic.

    ValueError for a side above MAX_SIDE pixels.
    """
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image = image.convert("RGB")
    geometry = geometry or padded_resize(image.height, image.width, picture_size)
    if max(*geometry.plane, *geometry.resized) > MAX_SIDE:
        raise ValueError(
            f"picture: expected sides of at most {MAX_SIDE} pixels in the reference pipeline, got {geometry}"
        )
    (top, left), (height, width) = geometry.region, geometry.extent
    if geometry.extent != (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    if geometry.plane != geometry.extent:
        plane = Image.new("RGB", geometry.plane[::-1], PAD_COLOUR)
        plane.paste(image, geometry.offset[::-1])
        image = plane
    image = image.resize(geometry.resized[::-1], Image.Resampling.BICUBIC)
    top, left = geometry.origin
    return image.crop((left, top, left + picture_size, top + picture_size))


def normalise(canvas: Image.Image) -> Tensor:
    """RGB [S, S] -> fp32 [3, S, S], (u8 / 255 - CLIP mean) / CLIP std."""
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return pixels.div(255).sub(mean).div(std)


def reference_views(
    picture: Image.Image | np.ndarray, picture_size: int, view_size: int, geometry: Geometry | None = None
) -> Tensor:
    """RGB picture -> fp32 [V, 3, view_size, view_size]: the global view first, then the crops, row-major."""
    view_ratio(picture_size, view_size)
    return square_views(normalise(reference_canvas(picture, picture_size, geometry)), view_size)


def square_views(pixels: Tensor, view_size: int) -> Tensor:
    """Normalised square, fp32 [3, S, S] -> its views, fp32 [V, 3, view_size, view_size].

    The global view is the bicubic interpolation, not antialiased, of the fp16 square; the crops are cut from the fp32
    one. ValueError where they do not tile it.
    """
    ratio = view_ratio(pixels.shape[-1], view_size)
    if ratio == 1:
        return pixels[None]
    overview = F.interpolate(pixels[None].half(), (view_size, view_size), mode="bicubic").float()
    crops = pixels.view(3, ratio, view_size, ratio, view_size).permute(1, 3, 0, 2, 4)
    return torch.cat([overview, crops.reshape(-1, 3, view_size, view_size)])
