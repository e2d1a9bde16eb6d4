"""The room views: pictures -> the inputs of all encoders, beside what others run for it.

    python bench/bench_views.py [--device cuda] [--threads 1] [--save]      # one line per shape, and the limits
    pytest bench/bench_views.py --benchmark-only                            # the same calls under pytest-benchmark

Ours is one call of `encoder_views`: pad, resize, views, both normalisations, ConvNeXt's input, fp32. Peers:
    pillow        the released pipeline in Pillow and torch, the same tensors bit for bit
    torch u8      the same pipeline around torch's antialiased uint8 resize; not exact
    resize        that resize alone, of the padded square, channels last: the aim from 1920 x 1080 on
    resize+write  and the time to fill our outputs: what we must not exceed
    limit         reading the picture and filling the outputs, nothing else
    our avx2      our loops for AVX2, where the processor has AVX-512 too
With --device cuda ours and the torch peers work on pictures that are on the device already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import Call, Line, arguments, copy_ceiling, measure, save
from torch import Tensor

from sphinx_fast.image.geometry import padded_resize
from sphinx_fast.image.views import CLIP_MEAN, CLIP_STD, PAD_COLOUR, normalise, num_views, reference_canvas
from sphinx_fast.ops import EncoderViews, encoder_views, extension
from sphinx_fast.vision.dinov2 import renormalize
from sphinx_fast.vision.tower import bicubic_through_half, split_crops

SHAPES = [  # pictures, height, width, picture_size
    (1, 240, 320, 448),
    (1, 480, 640, 448),
    (1, 480, 640, 672),
    (1, 1080, 1920, 448),
    (1, 1080, 1920, 672),
    (1, 3000, 4000, 448),
    (1, 3000, 4000, 672),
    (8, 480, 640, 448),
]
VIEW, CONVNEXT = 224, 256


def padded_square(picture: Tensor) -> Tensor:
    """uint8 [h, w, 3] -> [1, 3, side, side], channels last."""
    (height, width), plane, (top, left) = padded_resize(*picture.shape[:2], VIEW)[1:4]
    square = torch.tensor(PAD_COLOUR, dtype=torch.uint8, device=picture.device).repeat(*plane, 1)
    square[top : top + height, left : left + width] = picture
    return square.permute(2, 0, 1)[None]


def resize(square: Tensor, size: int) -> Tensor:
    """torch's antialiased bicubic: uint8 on the CPU; CUDA has it for floats alone."""
    if square.is_cuda:
        return F.interpolate(square.float(), (size, size), mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True)


def tensors_of(pixels: Tensor) -> EncoderViews:
    """The normalised canvas [1, 3, S, S] -> what each encoder reads, as the released code does it."""
    views = torch.cat([bicubic_through_half(pixels, VIEW).float(), split_crops(pixels, pixels.shape[-1] // VIEW)])
    return EncoderViews(views, renormalize(views), F.interpolate(views.half(), (CONVNEXT, CONVNEXT)).float())


def torch_views(picture: Tensor, size: int) -> EncoderViews:
    mean, std = (torch.tensor(v, device=picture.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return tensors_of(resize(padded_square(picture), size).float().div_(255).sub_(mean).div_(std))


def pillow_views(picture: np.ndarray, size: int) -> EncoderViews:
    return tensors_of(normalise(reference_canvas(picture, size))[None])


def calls_of(shape: tuple[int, int, int, int], device: str) -> tuple[dict[str, Call], int]:
    """Ours (under the empty name) and the peers for one shape, and the bytes that must be read and written."""
    count, height, width, size = shape
    host = [torch.randint(0, 256, (height, width, 3), dtype=torch.uint8) for _ in range(count)]
    pictures, arrays = [picture.to(device) for picture in host], [picture.numpy() for picture in host]
    squares = [padded_square(picture) for picture in pictures]
    images = count * num_views(size, VIEW)
    sizes: Any = {"picture_size": size, "view_size": VIEW, "convnext_size": CONVNEXT}
    out = EncoderViews(*(torch.empty(images, 3, side, side, device=device) for side in (VIEW, VIEW, CONVNEXT)))
    words = [picture.flatten()[: picture.numel() // 8 * 8].view(torch.int64) for picture in pictures]

    def write() -> None:
        for tensor in out:
            tensor.fill_(1.0)

    calls: dict[str, Call] = {
        "": lambda: encoder_views(pictures, **sizes, out=out),
        "pillow": lambda: [[t.to(device) for t in pillow_views(array, size)] for array in arrays],
        "torch u8": lambda: [torch_views(picture, size) for picture in pictures],
        "resize": lambda: [resize(square, size) for square in squares],
        "resize+write": lambda: ([resize(square, size) for square in squares], write()),
        "limit": lambda: ([word.sum() for word in words], write()),
    }
    if device == "cpu":
        numbers = [n for p in pictures for n in padded_resize(p.shape[0], p.shape[1], size).numbers()]
        for isa in extension().isas()[1:-1]:
            calls[f"our {isa}"] = lambda isa=isa: extension().views(
                pictures, numbers, picture_size=size, view_size=VIEW, out=out.clip, dinov2=out.dinov2,
                convnext=out.convnext, canvas=None, isa=isa, threads=torch.get_num_threads(),
            )  # fmt: skip
    moved = sum(p.numel() for p in pictures) + sum(t.numel() * t.element_size() for t in out)
    return calls, moved


@pytest.mark.parametrize(
    "name", ["", "pillow", "torch u8", "resize", "resize+write", "limit"], ids=lambda n: n or "ours"
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}-{s[3]}")
def test_views(benchmark: Any, shape: tuple[int, int, int, int], name: str) -> None:
    benchmark.group = f"views {shape}"
    benchmark(calls_of(shape, "cpu")[0][name])


def main() -> None:
    chosen = arguments(__doc__ or "")
    ceiling = copy_ceiling(chosen.device)
    print(f"copy: {ceiling:.1f} GB/s, {torch.get_num_threads()} threads")
    lines: list[Line] = []
    for shape in SHAPES:
        calls, moved = calls_of(shape, chosen.device)
        count, height, width, size = shape
        named = f"{count} x {height}x{width} -> {count * num_views(size, VIEW)} x {VIEW}"
        lines.append(measure("views", named, calls.pop(""), calls, moved, ceiling, chosen))
    save(lines, chosen)


if __name__ == "__main__":
    main()
