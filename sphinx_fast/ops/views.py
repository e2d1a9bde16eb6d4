"""The room views: pictures of any size -> normalised views for every encoder, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sphinx_fast.image.geometry import Geometry, padded_resize
from sphinx_fast.image.views import num_views, view_ratio
from sphinx_fast.ops._extension import FLOAT_DTYPES, extension
from sphinx_fast.ops._register import refuse_lazy, register


class EncoderViews(NamedTuple):
    """What each encoder reads, of B pictures in V views: [B*V, 3, s, s], [B*V, 3, d, d] and [B*V, 3, t, t]."""

    clip: Tensor
    dinov2: Tensor
    convnext: Tensor


def views(
    pictures: Sequence[Tensor],
    *,
    picture_size: int,
    view_size: int,
    geometries: Sequence[Geometry] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Cut pictures into CLIP-normalised views.

    Each picture becomes the canvas [picture_size, picture_size, 3], uint8, exactly as Pillow's bicubic makes it: padded
    to a square with the colour (122, 116, 104), or as its geometry says. The canvas is normalised as
    (u8 / 255 - mean) / std in fp32 and cut: one view where picture_size equals view_size; otherwise the global view,
    bicubic through fp16 without antialiasing, then the (picture_size / view_size)^2 crops, row-major.

    Args:
        pictures: B tensors, uint8 [h, w, 3] RGB, of any sizes and strides, on one device.
        picture_size: side of the canvas, in pixels; a multiple of view_size.
        view_size: side of a view, in pixels.
        geometries: one per picture, for example `resized_center_crop(h, w, picture_size)`; default `padded_resize`.
        dtype: float32, float16 or bfloat16; that of `out` where given, else float32.
        out: written and returned; contiguous [B*V, 3, view_size, view_size] on the pictures' device.

    Returns:
        [B*V, 3, view_size, view_size], picture-major, global view first.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was written.
        RuntimeError: no compiled extension, or CUDA tensors and a build without CUDA.

    Equivalent to `sphinx_fast.image.views.reference_views` for each picture, concatenated.
    """
    numbers = _numbers(pictures, geometries, picture_size)
    count = len(pictures) * num_views(picture_size, view_size)
    out = _output(out, pictures, (count, 3, view_size, view_size), dtype, "out")
    _call(pictures, numbers, picture_size, view_size, out)
    return out


def encoder_views(
    pictures: Sequence[Tensor],
    *,
    picture_size: int,
    view_size: int,
    convnext_size: int = 256,
    dinov2_size: int | None = None,
    geometries: Sequence[Geometry] | None = None,
    dtype: torch.dtype | None = None,
    out: EncoderViews | None = None,
) -> EncoderViews:
    """As `views`, and the inputs of DINOv2 and ConvNeXt in the same call: what the tower makes of fp32 views.

    `dinov2` is (x * clip_std + clip_mean - mean) / std, each operation rounded to `dtype`, of the views x in `dtype`.
    `convnext` is the nearest-pixel resize of the views in fp16. The light variants' rules follow from the sizes: with
    another `dinov2_size` its views are cut from the whole canvas, resized as the global view is; with `convnext_size`
    equal to `view_size` its crops are the views, not rounded to fp16.

    Equivalent to, with x = views(...) in float32, constants as `dtype` tensors [3, 1, 1], sizes of the full model:
        EncoderViews(x.to(dtype), (x.to(dtype) * clip_std + clip_mean - dinov2_mean) / dinov2_std,
                     F.interpolate(x.half(), (convnext_size, convnext_size)).to(dtype))
    """
    dinov2_size = dinov2_size or view_size
    numbers = _numbers(pictures, geometries, picture_size)
    count = len(pictures) * num_views(picture_size, view_size)
    shapes = {
        "clip": (count, 3, view_size, view_size),
        "dinov2": (count, 3, dinov2_size, dinov2_size),
        "convnext": (count, 3, convnext_size, convnext_size),
    }
    if out is None:
        out = EncoderViews(*(_output(None, pictures, shape, dtype, name) for name, shape in shapes.items()))
    else:
        for name, tensor in zip(shapes, out, strict=True):
            _output(tensor, pictures, shapes[name], dtype or out.clip.dtype, f"out.{name}")
    _call(pictures, numbers, picture_size, view_size, *out)
    return out


def canvas(
    picture: Tensor, picture_size: int, *, geometry: Geometry | None = None, out: Tensor | None = None
) -> Tensor:
    """uint8 [h, w, 3] -> the resized square, uint8 [picture_size, picture_size, 3].

    Equivalent to `sphinx_fast.image.views.reference_canvas`, that is to Pillow's paste and bicubic resize, bit for bit.
    """
    numbers = _numbers([picture], None if geometry is None else [geometry], picture_size)
    out = _output(out, [picture], (picture_size, picture_size, 3), torch.uint8, "out")
    _call([picture], numbers, picture_size, picture_size, canvas=out[None])
    return out


def _numbers(pictures: Sequence[Tensor], geometries: Sequence[Geometry] | None, picture_size: int) -> list[int]:
    """The geometries of all pictures as one list of integers."""
    if isinstance(pictures, Tensor) or not all(isinstance(picture, Tensor) for picture in pictures):
        raise TypeError(f"pictures: expected a sequence of tensors [h, w, 3], got {_kinds(pictures)}")
    for index, picture in enumerate(pictures):
        if picture.dim() != 3 or 0 in picture.shape:
            raise ValueError(f"pictures[{index}]: expected [height and width >= 1, 3], got {list(picture.shape)}")
    if geometries is None:
        geometries = [padded_resize(picture.shape[0], picture.shape[1], picture_size) for picture in pictures]
    elif len(geometries) != len(pictures):
        raise ValueError(f"geometries: expected one for each of {len(pictures)} pictures, got {len(geometries)}")
    return [number for geometry in geometries for number in geometry.numbers()]


def _output(
    out: Tensor | None, pictures: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype | None, name: str
) -> Tensor:
    if out is None:
        dtype = dtype or torch.float32
        if dtype not in (*FLOAT_DTYPES, torch.uint8):
            raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
        return torch.empty(shape, dtype=dtype, device=pictures[0].device if pictures else "cpu")
    refuse_lazy(out, name)
    if dtype is not None and out.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {out.dtype}")
    if tuple(out.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(out.shape)}")
    return out


def _kinds(pictures: object) -> str:
    if isinstance(pictures, Tensor):
        return f"one tensor {list(pictures.shape)}"
    return (
        ", ".join(sorted({type(picture).__name__ for picture in pictures}))
        if isinstance(pictures, Sequence)
        else str(type(pictures))
    )


def _call(
    pictures: Sequence[Tensor],
    numbers: list[int],
    picture_size: int,
    view_size: int,
    clip: Tensor | None = None,
    dinov2: Tensor | None = None,
    convnext: Tensor | None = None,
    canvas: Tensor | None = None,
) -> None:
    view_ratio(picture_size, view_size)
    device = next(out.device for out in (clip, canvas) if out is not None)
    for index, picture in enumerate(pictures):
        refuse_lazy(picture, f"pictures[{index}]")
        if picture.device != device:
            raise ValueError(f"pictures[{index}]: expected device {device} (that of out), got {picture.device}")
    torch.ops.sphinx_fast.views(list(pictures), numbers, picture_size, view_size, clip, dinov2, convnext, canvas)


@register(
    "views(Tensor[] pictures, SymInt[] geometry, SymInt picture_size, SymInt view_size, Tensor(a!)? out, "
    "Tensor(b!)? dinov2, Tensor(c!)? convnext, Tensor(d!)? canvas) -> ()"
)
def _views(
    pictures: list[Tensor],
    geometry: list[int],
    picture_size: int,
    view_size: int,
    out: Tensor | None,
    dinov2: Tensor | None,
    convnext: Tensor | None,
    canvas: Tensor | None,
) -> None:
    extension().views(
        pictures,
        geometry,
        picture_size=picture_size,
        view_size=view_size,
        out=out,
        dinov2=dinov2,
        convnext=convnext,
        canvas=canvas,
        isa=None,
        threads=torch.get_num_threads(),
    )
