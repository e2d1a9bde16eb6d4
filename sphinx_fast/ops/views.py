"""The room views: pictures of any size -> normalised views for every encoder, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sphinx_fast.image.views import num_views
from sphinx_fast.ops._extension import extension
from sphinx_fast.ops._register import refuse_lazy, register

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class EncoderViews(NamedTuple):
    """What each encoder reads. B pictures, V views: clip and dinov2 [B*V, 3, s, s], convnext [B*V, 3, t, t]."""

    clip: Tensor
    dinov2: Tensor
    convnext: Tensor


def views(
    pictures: Sequence[Tensor],
    *,
    picture_size: int,
    view_size: int,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Cut pictures into CLIP-normalised views.

    Each picture is padded to a square with the colour (122, 116, 104), resized to `picture_size` exactly as Pillow's
    bicubic does, normalised as (u8 / 255 - mean) / std in fp32, and cut: one view where picture_size equals view_size;
    otherwise the global view, bicubic through fp16 without antialiasing, then the (picture_size / view_size)^2 crops,
    row-major.

    Args:
        pictures: B tensors, uint8 [h, w, 3] RGB, of any sizes and strides, on one device.
        picture_size: side of the resized square, in pixels; a multiple of view_size.
        view_size: side of a view, in pixels.
        dtype: float32, float16 or bfloat16; that of `out` where given, else float32.
        out: written and returned; contiguous [B*V, 3, view_size, view_size] on the pictures' device.

    Returns:
        [B*V, 3, view_size, view_size], picture-major, global view first.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was written.
        RuntimeError: no compiled extension, or CUDA tensors and a build without CUDA.

    Equivalent to `sphinx_fast.image.views.reference_views` for each picture, concatenated.
    """
    count = len(pictures) * num_views(picture_size, view_size)
    out = _output(out, pictures, (count, 3, view_size, view_size), dtype, "out")
    _call(pictures, out, None, None, picture_size, view_size)
    return out


def encoder_views(
    pictures: Sequence[Tensor],
    *,
    picture_size: int,
    view_size: int,
    convnext_size: int = 256,
    dtype: torch.dtype | None = None,
    out: EncoderViews | None = None,
) -> EncoderViews:
    """As `views`, and the inputs of DINOv2 and ConvNeXt in the same call.

    `dinov2` is (x * clip_std + clip_mean - mean) / std of the views x, each operation rounded to `dtype`; `convnext` is
    the nearest-pixel resize of x.half() to `convnext_size`, in `dtype`.

    Equivalent to, with x = views(...) and constants as `dtype` tensors [3, 1, 1]:
        EncoderViews(x, (x * clip_std + clip_mean - dinov2_mean) / dinov2_std,
                     F.interpolate(x.half(), (convnext_size, convnext_size)).to(dtype))
    """
    count = len(pictures) * num_views(picture_size, view_size)
    shape, nearest = (count, 3, view_size, view_size), (count, 3, convnext_size, convnext_size)
    if out is None:
        clip = _output(None, pictures, shape, dtype, "out.clip")
        out = EncoderViews(clip, torch.empty_like(clip), clip.new_empty(nearest))
    else:
        dtype = dtype or out.clip.dtype
        for name, tensor, extent in (
            ("clip", out.clip, shape),
            ("dinov2", out.dinov2, shape),
            ("convnext", out.convnext, nearest),
        ):
            _output(tensor, pictures, extent, dtype, f"out.{name}")
    _call(pictures, out.clip, out.dinov2, out.convnext, picture_size, view_size)
    return out


def resize_padded(picture: Tensor, picture_size: int, *, out: Tensor | None = None) -> Tensor:
    """uint8 [h, w, 3] -> the padded square resized to uint8 [picture_size, picture_size, 3].

    Equivalent to `sphinx_fast.image.views.reference_canvas`, that is to Pillow's paste and bicubic resize, bit for bit.
    """
    out = _output(out, [picture], (picture_size, picture_size, 3), torch.uint8, "out")
    _check_pictures([picture], out)
    torch.ops.sphinx_fast.resize_padded(picture, out)
    return out


def _check_pictures(pictures: Sequence[Tensor], out: Tensor) -> None:
    for index, picture in enumerate(pictures):
        refuse_lazy(picture, f"pictures[{index}]")
        if picture.device != out.device:
            raise ValueError(f"pictures[{index}]: expected device {out.device} (that of out), got {picture.device}")


def _output(
    out: Tensor | None, pictures: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype | None, name: str
) -> Tensor:
    if isinstance(pictures, Tensor) or not all(isinstance(picture, Tensor) for picture in pictures):
        raise TypeError(f"pictures: expected a sequence of tensors [h, w, 3], got {_kinds(pictures)}")
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
    clip: Tensor,
    dinov2: Tensor | None,
    convnext: Tensor | None,
    picture_size: int,
    view_size: int,
) -> None:
    _check_pictures(pictures, clip)
    torch.ops.sphinx_fast.views(list(pictures), clip, dinov2, convnext, picture_size, view_size)


def _workspace(pictures: Sequence[Tensor], picture_size: int) -> Tensor | None:
    """Device memory for the largest picture; the CPU half brings its own."""
    if not pictures or not pictures[0].is_cuda:
        return None
    need = max(extension().views_workspace(*picture.shape[:2], picture_size) for picture in pictures)
    return torch.empty(need, dtype=torch.uint8, device=pictures[0].device)


@register(
    "views(Tensor[] pictures, Tensor(a!) out, Tensor(b!)? dinov2, Tensor(c!)? convnext, "
    "int picture_size, int view_size) -> ()"
)
def _views(
    pictures: list[Tensor],
    out: Tensor,
    dinov2: Tensor | None,
    convnext: Tensor | None,
    picture_size: int,
    view_size: int,
) -> None:
    extension().views(
        pictures,
        out,
        picture_size=picture_size,
        view_size=view_size,
        dinov2=dinov2,
        convnext=convnext,
        workspace=_workspace(pictures, picture_size),
        threads=torch.get_num_threads(),
    )


@register("resize_padded(Tensor picture, Tensor(a!) out) -> ()")
def _resize_padded(picture: Tensor, out: Tensor) -> None:
    workspace = _workspace([picture], out.shape[0])
    extension().resize_padded(picture, out, workspace=workspace, threads=torch.get_num_threads())
