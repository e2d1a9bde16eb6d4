"""Anything a user may call a picture -> uint8 RGB [h, w, 3]: the only door for foreign image bytes.

What is read         JPEG, PNG and WEBP, from a path or from bytes; PIL pictures; uint8 arrays and tensors
Checked first        kind of file, its length, the size written in its header: nothing large is allocated before that
What is taken        the first frame, turned upright by the EXIF orientation (also of a PIL picture that carries one)
Colour               PIL's convert("RGB"), as the released code has it: CMYK by complement, palette looked up, alpha
                     dropped
16 bits a channel    the high byte. PIL does so for 16-bit colour; for 16-bit grey it clips at 255, which turns most
                     pictures white, so grey is scaled here as colour is
Errors               PictureError, one line that names the source and what is wrong with it

Nothing is fetched: a URL is refused.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_BYTES = 256 * 2**20  # of a file; a 16-megapixel PNG of 16-bit RGBA that does not compress has 128 MiB
_MAX_SCANS = (
    100  # of a progressive JPEG (real ones have about ten): each a pass over all pixels, 35 ms at 16 megapixels
)
_MAX_SEGMENTS = 4096  # of a JPEG, scans included
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.ASCII)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be used: one line that names the source and what is wrong."""


def load_picture(source: Any, *, max_pixels: int = 16_000_000) -> np.ndarray:
    """A picture as uint8 RGB [h, w, 3], C-contiguous (it may share the memory of an array that was given).

    Args:
        source: path (str or PathLike), bytes of a file, PIL picture, or uint8 numpy array or torch tensor
            [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (the fourth is alpha and is dropped).
        max_pixels: pictures of more pixels are refused, files before they are decoded.

    Raises:
        PictureError: whatever is wrong with the picture.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels: expected at least 1, got {max_pixels}")
    if isinstance(source, str | os.PathLike):
        return _from_path(source, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return _from_bytes(data, f"the {len(data)} bytes given", max_pixels)
    if isinstance(source, Image.Image):
        _check_size("the PIL picture", *source.size, max_pixels)
        return _from_pil(source, "the PIL picture")
    if isinstance(source, np.ndarray | torch.Tensor):
        return _from_array(source, max_pixels)
    raise PictureError(f"expected a path, bytes, a PIL picture or a uint8 array or tensor, got {type(source).__name__}")


def _check_size(what: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{what}: empty, {width}x{height} pixels")
    if width * height > max_pixels:
        raise PictureError(f"{what}: {width}x{height} pixels are more than the {max_pixels:,} allowed (max_pixels)")


def _reason(error: Exception) -> str:
    """The first line of an error, short enough to quote."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _from_path(source: str | os.PathLike, max_pixels: int) -> np.ndarray:
    path = os.fsdecode(source)
    what = path if len(path) <= 200 else path[:200] + "..."
    what = what if what.isprintable() else ascii(what)
    if not path:
        raise PictureError("the path of the picture is empty")
    if _URL.match(path):
        raise PictureError(f"{what[:60]}: is a URL; nothing is fetched, give a file")
    try:
        data = _read(Path(path))
    except PictureError as error:
        raise PictureError(f"{what}: {error}") from error
    except FileNotFoundError as error:
        raise PictureError(f"{what}: no such file") from error
    except (OSError, ValueError) as error:  # permission, name too long, a NUL in it
        raise PictureError(f"{what}: cannot be read: {getattr(error, 'strerror', None) or _reason(error)}") from error
    return _from_bytes(data, what, max_pixels)


def _read(path: Path) -> bytes:
    """A regular file's bytes, at most one more than allowed. Pipes and devices are not opened: they could block."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise PictureError("is a folder, not a picture" if stat.S_ISDIR(mode) else "is not a regular file")
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1)


def _from_bytes(data: bytes, what: str, max_pixels: int) -> np.ndarray:
    """A file's bytes: every check, then decoding."""
    if not data:
        raise PictureError(f"{what}: empty, no bytes")
    if len(data) > _MAX_BYTES:
        raise PictureError(f"{what}: more than the {_MAX_BYTES:,} bytes allowed")
    size, scans = _header(data)
    if size:
        _check_size(what, *size, max_pixels)
    if scans > _MAX_SCANS:
        raise PictureError(f"{what}: a JPEG of more than {_MAX_SCANS} scans or {_MAX_SEGMENTS} segments")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{what}: not a readable JPEG, PNG or WEBP picture") from error
    except Exception as error:
        raise PictureError(f"{what}: damaged or refused by PIL: {_reason(error)}") from error
    with image:
        _check_size(what, *image.size, max_pixels)
        return _from_pil(image, what)


def _header(data: bytes) -> tuple[tuple[int, int] | None, int]:
    """(width, height) as the header has them, None if unreadable, and the scans of a JPEG, else 0.

    Before PIL sees the file: it takes memory for a WEBP's canvas when it opens one, and warns of large pictures.
    """
    if data[:2] == b"\xff\xd8":
        return _jpeg_header(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")), 0
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data), 0
    return None, 0


def _webp_size(data: bytes) -> tuple[int, int]:
    """Of the three kinds of WEBP: extended, lossless, lossy."""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # not a stuffed zero, a restart, or fill
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15: precision, height, width


def _jpeg_header(data: bytes) -> tuple[tuple[int, int] | None, int]:
    """Size and number of scans, from the markers alone; past either limit more scans than are allowed."""
    size, scans, at = None, 0, 2
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, at)
        if not marker or marker[1] == b"\xd9" or scans > _MAX_SCANS:
            return size, scans  # what follows the end (a second picture, a film) is not looked at
        code, start = marker[1][0], marker.end()
        scans += code == 0xDA
        if code in _FRAMES and size is None and len(data) >= start + 7:
            height, width = (int.from_bytes(data[start + i : start + i + 2], "big") for i in (3, 5))
            size = (width, height)
        at = start + int.from_bytes(data[start : start + 2], "big")
    return size, _MAX_SCANS + 1


def _from_pil(image: Image.Image, what: str) -> np.ndarray:
    """Decode, convert, turn upright. Whatever PIL raises on a damaged or odd picture becomes a PictureError."""
    try:
        image.load()
    except Exception as error:
        raise PictureError(f"{what}: damaged or cut off: {_reason(error)}") from error
    turn = _UPRIGHT.get(_orientation(image))
    try:
        rgb = _to_rgb(image)
    except Exception as error:
        raise PictureError(f"{what}: cannot be turned into RGB: {_reason(error)}") from error
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # PIL raises many kinds; a damaged EXIF block leaves the pixels good
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """PIL's convert("RGB"), except for 16-bit grey (the high byte) and modes that have no agreed scale."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise PictureError(f'mode {image.mode} has no agreed scale; convert it to "L" or "RGB" first')
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; PIL warns on the direct way
    return image.convert("RGB")


def _from_array(array: np.ndarray | torch.Tensor, max_pixels: int) -> np.ndarray:
    kind = "tensor" if isinstance(array, torch.Tensor) else "array"
    what, shape = f"the {kind} {list(array.shape)}", tuple(array.shape)
    if array.dtype not in (np.uint8, torch.uint8):
        name = str(array.dtype).removeprefix("torch.")
        raise PictureError(f"{what}: expected uint8 (0 to 255), got {name}")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise PictureError(f"{what}: expected [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], channels last")
    _check_size(what, shape[1], shape[0], max_pixels)
    try:
        pixels = np.asarray(array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array)
    except Exception as error:  # meta, sparse and other tensors without data
        raise PictureError(f"{what}: its data cannot be read: {_reason(error)}") from error
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])
