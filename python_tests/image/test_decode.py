"""The door for picture bytes: what is read gives PIL's pixels, what is not gives one line that says why."""

import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sphinx_fast.image import decode
from sphinx_fast.image.decode import PictureError, load_picture

# The campaign promised in the documentation: SPHINX_FAST_MUTATIONS=20000 pytest -k mutated
MUTATIONS = int(os.environ.get("SPHINX_FAST_MUTATIONS", "2000"))


def pixels(height: int = 24, width: int = 36, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colour with an edge, different on every side, so that a wrong turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x * 5 + seed) % 256, y * 9 % 256, ((x > width // 3) & (y > height // 4)) * 200, 255 - x]
    return np.stack(planes[:channels], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, body: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with any size in its header."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", body),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def refused(source, *words: str, **options) -> str:
    """The message of the refusal: one line, with these words."""
    with pytest.raises(PictureError) as caught:
        load_picture(source, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and 10 < len(message) < 500
    return message


# ---- what is read


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_path_bytes_and_pil_give_pils_pixels(tmp_path, kind):
    data = encoded(Image.fromarray(pixels()), kind)
    path = tmp_path / "picture.bin"  # the content counts, not the name
    path.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (path, str(path), os.fsencode(path) and data, bytearray(data), memoryview(data), Image.open(path)):
        got = load_picture(source)
        assert got.dtype == np.uint8 and got.shape == (24, 36, 3) and got.flags.c_contiguous
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "PA", "RGBa", "RGBX", "HSV"])
def test_pil_modes_are_converted_as_pil_does(mode):
    base = Image.fromarray(pixels(channels=4), "RGBA")
    with_alpha = mode in ("RGBA", "LA", "PA", "RGBa")
    image = (base if with_alpha else base.convert("RGB")).convert(mode)
    assert image.mode == mode
    assert np.array_equal(load_picture(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
    ],
)
def test_modes_in_files(mode, kind):
    base = Image.fromarray(pixels(channels=4), "RGBA")
    data = encoded(base.convert("RGB").convert(mode) if mode == "CMYK" else base.convert(mode), kind)
    image = Image.open(io.BytesIO(data))
    assert image.mode == mode
    assert np.array_equal(load_picture(data), np.asarray(image.convert("RGBA").convert("RGB")))


def test_cmyk_white_is_white():
    """Adobe writes CMYK JPEG inverted; read the other way round, paper would be black."""
    white = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", quality=95)
    assert load_picture(white).min() > 245


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_is_its_colours_without_a_warning():
    image = Image.fromarray(pixels()).quantize(16)
    data = encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))
    assert isinstance(Image.open(io.BytesIO(data)).info["transparency"], bytes)
    assert np.array_equal(load_picture(data), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled_as_16_bit_colour_is():
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    data = encoded(Image.fromarray(grey), "PNG")
    assert np.array_equal(load_picture(data), expected)
    assert np.array_equal(load_picture(Image.fromarray(grey)), expected)
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in grey)
    colour = png(64, 64, zlib.compress(rows), depth=16)
    assert np.array_equal(load_picture(colour), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    """However the camera was held, the upright picture comes out: from bytes and from PIL."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(pixels()), kind, exif=exif.tobytes(), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape == ((36, 24, 3) if orientation > 4 else (24, 36, 3))
    assert np.array_equal(load_picture(data), expected)
    assert np.array_equal(load_picture(Image.open(io.BytesIO(data))), expected)


def test_16_bit_grey_turned():
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    exif = Image.Exif()
    exif[0x0112] = 6
    got = load_picture(encoded(Image.fromarray(grey), "PNG", exif=exif.tobytes()))
    assert np.array_equal(got[..., 0], np.rot90(grey >> 8, -1))


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_exif_block_leaves_the_picture(damage):
    data = encoded(Image.fromarray(pixels()), "JPEG", exif=damage)
    assert load_picture(data).shape == (24, 36, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_only(kind):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(load_picture(data), np.full((7, 9, 3), (255, 0, 0)))


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (2, 3)])
def test_extreme_shapes(size):
    image = Image.new("RGB", size, (10, 200, 30))
    for source in (image, encoded(image, "PNG"), encoded(image, "JPEG")):
        got = load_picture(source)
        assert got.shape == (size[1], size[0], 3) and abs(got.astype(int) - (10, 200, 30)).max() <= 3


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4), (1, 1), (3, 1, 3)])
@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_arrays(shape, make):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    got = load_picture(make(values))
    colour = values[..., :3] if len(shape) == 3 else values[..., None]
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    assert np.array_equal(got, np.broadcast_to(colour, (*shape[:2], 3)))
    strided = make(np.repeat(values, 2, axis=1))[:, ::2]
    assert np.array_equal(load_picture(strided), got)


# ---- what is refused


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "film.gif").write_bytes(encoded(Image.new("P", (4, 4)), "GIF"))
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "empty.jpg", "empty.jpg", "empty")
    refused(tmp_path / "text.png", "text.png", "JPEG, PNG or WEBP")
    refused(tmp_path / "film.gif", "film.gif", "JPEG, PNG or WEBP")
    refused(tmp_path / "missing.png", "missing.png", "no such file")
    refused(tmp_path / "text.png" / "x", "cannot be read")
    refused(tmp_path, str(tmp_path)[:50], "folder")
    refused(tmp_path / "pipe", "regular file")  # and does not wait for a writer
    refused("/dev/null", "regular file")
    refused("", "empty")
    refused("a\0b.png", "cannot be read")
    refused("x" * 5000, "cannot be read")
    refused("line\nbreak.png", "no such file")


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(Image.fromarray(pixels()), "PNG"))

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(path, "secret.png", "Permission denied")


@pytest.mark.parametrize(
    "url", ["http://a.b/c.jpg", "HTTPS://a.b/c.jpg", "file:///tmp/a.png", "s3://x/y", "data:image/png;base64,iVBOR"]
)
def test_nothing_is_fetched(url):
    refused(url, "nothing is fetched")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", ["0 bytes", "empty"]),
        (b"\xff\xd8\xff", ["3 bytes", "JPEG, PNG or WEBP"]),
        (encoded(Image.new("RGB", (4, 4)), "BMP"), ["JPEG, PNG or WEBP"]),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), ["JPEG, PNG or WEBP"]),
        (None, ["NoneType"]),
        ([1, 2], ["list"]),
        (np.zeros((4, 5, 3), np.float32), ["[4, 5, 3]", "uint8", "float32"]),
        (torch.zeros(4, 5, 3), ["tensor", "uint8", "float32"]),
        (np.zeros((4, 5, 3), np.uint16), ["uint16"]),
        (np.zeros((4, 5, 3), bool), ["bool"]),
        (np.zeros((3, 4, 5), np.uint8), ["[3, 4, 5]", "channels last"]),
        (np.zeros((4, 5, 2), np.uint8), ["[4, 5, 2]"]),
        (np.zeros((1, 4, 5, 3), np.uint8), ["[1, 4, 5, 3]"]),
        (np.zeros(4, np.uint8), ["[4]"]),
        (np.uint8(4) * np.ones((), np.uint8), ["uint8"]),
        (np.zeros((0, 5, 3), np.uint8), ["empty", "5x0"]),
        (torch.zeros(4, 0, dtype=torch.uint8), ["empty", "0x4"]),
        (torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta"), ["data cannot be read"]),
        (Image.new("RGB", (0, 5)), ["PIL", "empty"]),
        (Image.new("I", (5, 5)), ["mode I", "RGB"]),
        (Image.new("F", (5, 5)), ["mode F", "RGB"]),
        (Image.new("La", (5, 5)), ["PIL", "cannot be turned into RGB", "La"]),
    ],
)
def test_wrong_sources(source, words):
    refused(source, *words)


def test_a_closed_pil_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(pixels()), "PNG"))
    image = Image.open(tmp_path / "a.png")
    image.close()
    refused(image, "PIL picture")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_off(kind):
    """Half a file is refused, never half a picture; nearly all of a JPEG too."""
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for share in (0.1, 0.5, 0.9):
        refused(data[: int(len(data) * share)], f"{int(len(data) * share)} bytes")
    refused(
        Image.open(io.BytesIO(data[: len(data) // 2])) if kind != "WEBP" else data[:-500],
        "cut off" if kind != "WEBP" else "",
    )


def test_more_pixels_than_allowed():
    image = Image.new("RGB", (50, 40))
    array = np.zeros((40, 50, 3), np.uint8)
    for source in (image, array, torch.from_numpy(array), *(encoded(image, k) for k in ("PNG", "JPEG", "WEBP"))):
        assert load_picture(source, max_pixels=2000).shape == (40, 50, 3)
        refused(source, "50x40", "1,999", max_pixels=1999)
    refused(np.broadcast_to(np.uint8(0), (4001, 4000)), "16,000,000")
    with pytest.raises(ValueError, match="max_pixels"):
        load_picture(image, max_pixels=0)


def bombs() -> dict[str, bytes]:
    webp = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)
    extended = b"VP8X" + struct.pack("<IBBBB", 10, 0, 0, 0, 0) + b"\xff\x3f\0" * 2
    jpeg = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    return {
        "png 60,000 x 60,000": png(60_000, 60_000, zlib.compress(b"\0" * 10_000_000)),
        "png 2^31 x 2^31": png(2**31 - 1, 2**31 - 1),
        "jpeg 65,000 x 65,000": bytes(jpeg),
        "webp canvas 16,384 x 16,384": b"RIFF" + struct.pack("<I", len(webp) + 10) + b"WEBP" + extended + webp[12:],
        "webp lossless 16,384 x 16,384": webp[:21] + b"\xff\xff\xff\x0f" + webp[25:],
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_from_the_header(name, monkeypatch):
    """PIL is not even asked."""

    def opened(*args, **kwargs):
        raise AssertionError("a bomb reached PIL")

    data = bombs()[name]
    monkeypatch.setattr(Image, "open", opened)
    refused(data, "16,000,000")


def test_a_text_bomb_in_a_png():
    """100 MB of text in a compressed chunk of 100 KB: refused or skipped, the memory is never taken."""
    text = b"a\0\0" + zlib.compress(b"x" * 100_000_000)
    data = encoded(Image.new("RGB", (4, 4)), "PNG")
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    try:
        assert load_picture(data[:33] + chunk + data[33:]).shape == (4, 4, 3)
    except PictureError as error:
        assert "\n" not in str(error)


def test_a_jpeg_of_a_thousand_scans_is_refused():
    """Each scan costs a pass over all pixels: 100 KB could keep a core busy for minutes."""
    data = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert load_picture(data[:-2] + scan * 20 + b"\xff\xd9").shape == (64, 64, 3)
    refused(data[:-2] + scan * 1000 + b"\xff\xd9", "scans")
    start = time.process_time()
    refused(b"\xff\xd8" + b"\xff\x01\0\2" * 10_000_000, "segments")
    assert time.process_time() - start < 2


def test_what_follows_a_jpeg_does_not_count():
    """Phones append films and second pictures."""
    data = encoded(Image.fromarray(pixels()), "JPEG")
    assert np.array_equal(load_picture(data + b"\xff\xda\0\2" * 1000), load_picture(data))


def test_a_file_that_is_too_long(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "_MAX_BYTES", 100)
    data = encoded(Image.fromarray(pixels()), "PNG")
    (tmp_path / "long.png").write_bytes(data)
    refused(data, "more than the 100 bytes")
    refused(tmp_path / "long.png", "long.png", "more than the 100 bytes")


def test_errors_keep_their_cause(tmp_path):
    with pytest.raises(PictureError) as caught:
        load_picture(tmp_path / "missing.png")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


# ---- mutated files


def seeds() -> list[bytes]:
    rgb, rgba = Image.fromarray(pixels(40, 56)), Image.fromarray(pixels(40, 56, 4), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 50}
    return [
        encoded(rgb, "JPEG", exif=exif.tobytes()),
        encoded(rgb, "JPEG", progressive=True),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(rgb, "PNG", exif=exif.tobytes()),
        encoded(rgb.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
        encoded(Image.fromarray(np.arange(2240, dtype=np.uint16).reshape(40, 56) * 29), "PNG"),
        encoded(rgba, "PNG", **frames),
        encoded(rgb, "WEBP", exif=exif.tobytes()),
        encoded(rgba, "WEBP", lossless=True),
        encoded(rgb, "WEBP", **frames),
        encoded(rgb, "GIF"),
    ]


def mutated(rng: random.Random, files: list[bytes]) -> bytes:
    """A file with bits, bytes, lengths or pieces changed; PNG checksums mended half of the time."""
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 160))
        match rng.randrange(8):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"))
            case 3:
                del data[at : at + rng.randrange(1, 40)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 5:
                data[at:at] = data[at : at + rng.randrange(1, 200)]
            case 6:
                other = rng.choice(files)
                start = rng.randrange(len(other))
                data[at:] = other[start:]
            case _:
                del data[rng.randrange(len(data)) :]
        data = data or bytearray(b"\0")
    return bytes(mended(data) if rng.random() < 0.5 else data)


def mended(data: bytearray) -> bytearray:
    """PNG chunks with their checksums put right, so that the damage gets past the first check."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL says when an EXIF block or an animation is damaged
def test_mutated_files_are_read_or_refused():
    rng, files = random.Random(5), seeds()
    counts = {"accepted": 0, "refused": 0, "other": 0}
    slowest, first_other = 0.0, ""
    for i in range(MUTATIONS):
        data, start = mutated(rng, files), time.perf_counter()
        try:
            got = load_picture(data)
            good = got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3 and got.size > 0
            counts["accepted" if good else "other"] += 1
        except PictureError as error:
            counts["refused" if "\n" not in str(error) and len(str(error)) < 500 else "other"] += 1
        except Exception as error:
            counts["other"] += 1
            first_other = first_other or f"file {i}: {error!r}"
        slowest = max(slowest, time.perf_counter() - start)
    print(f"pictures: tried {MUTATIONS}, {', '.join(f'{k} {n}' for k, n in counts.items())}; slowest {slowest:.2f} s")
    assert counts["other"] == 0, first_other
    assert min(counts["accepted"], counts["refused"]) > MUTATIONS // 10
