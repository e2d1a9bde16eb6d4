"""The room views against Pillow and torch: equal bit for bit, in every dtype, and never more memory than its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from close import Guarded, assert_close, assert_repeatable
from PIL import Image
from torch import Tensor

from sphinx_fast.image.geometry import PILLOW, Geometry, padded_resize, random_resized_crop, resized_center_crop
from sphinx_fast.image.views import (
    CLIP_MEAN,
    CLIP_STD,
    DINOV2_MEAN,
    DINOV2_STD,
    num_views,
    reference_canvas,
    reference_views,
)
from sphinx_fast.ops import EncoderViews, canvas, encoder_views, extension, views
from sphinx_fast.vision.tower import VisionTower

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pillow(picture: Tensor, size: int, geometry: Geometry | None = None) -> Tensor:
    return torch.from_numpy(np.array(reference_canvas(picture.numpy(), size, geometry)))


def reference(pictures: list[Tensor], picture_size: int, view_size: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([reference_views(picture.numpy(), picture_size, view_size) for picture in pictures]).to(dtype)


# --- the canvas -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("folder", "size"), [("llama_ens", 224), ("llama_ens5", 448)])
@pytest.mark.parametrize(("index", "photo"), [(0, "cat.png"), (1, "coffee_portrait.png")])
def test_canvas_equals_the_released_implementation(
    golden: Path, folder: str, size: int, index: int, photo: str
) -> None:
    picture = torch.from_numpy(np.array(Image.open(golden / photo).convert("RGB")))
    expected = np.array(Image.open(golden / folder / f"{index}.resized.png").convert("RGB"))
    assert np.array_equal(canvas(picture, size).numpy(), expected)


GEOMETRIES = [
    *[(1, 1, 224), (1, 37, 64), (37, 1, 64), (50, 8000, 224), (8000, 50, 56), (1, 4000, 16), (3000, 1, 1)],
    *[(224, 224, 224), (223, 224, 224), (224, 225, 224), (448, 447, 224), (2, 3, 448), (640, 481, 448)],
]


@pytest.mark.parametrize(("height", "width", "size"), GEOMETRIES)
def test_canvas_equals_pillow(height: int, width: int, size: int) -> None:
    picture = noise(height, width)
    assert torch.equal(canvas(picture, size), pillow(picture, size))


@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1), (1, 2**20)])
def test_a_thread_of_a_picture_costs_no_square(height: int, width: int) -> None:
    """The square of 60,000 x 1 would take 10.8 GB. All of it but one line is padding."""
    made = canvas(noise(height, width), 16)
    lines = made if width > height else made.transpose(0, 1)
    assert torch.equal(lines[:5], torch.tensor([122, 116, 104], dtype=torch.uint8).expand(5, 16, 3))


ISAS = extension().isas()


def with_isa(picture: Tensor, size: int, geometry: Geometry, isa: str, threads: int = 1) -> Tensor:
    output = Guarded((1, size, size, 3), torch.uint8)
    sizes: Any = {"picture_size": size, "view_size": size, "isa": isa, "threads": threads}
    outputs: Any = {"out": None, "dinov2": None, "convnext": None, "canvas": output.tensor}
    extension().views([picture], geometry.numbers(), **sizes, **outputs)
    return output.check()[0]


def drawn_picture(random: np.random.Generator, trial: int, most: int) -> Tensor:
    height, width = (int(2 ** random.uniform(0, np.log2(most))) for _ in range(2))
    picture = noise(height, width, trial)
    if trial % 3 == 0:  # hard edges overshoot and clip
        picture = (picture > 127).to(torch.uint8) * 255
    return picture


SIZES = [1, 7, 32, 56, 113, 224, 448, 672]


@pytest.mark.parametrize("isa", ISAS)
def test_canvas_equals_pillow_on_random_pictures(isa: str) -> None:
    """240 geometries for each instruction set: three transforms, up and down, both orders of the passes."""
    random = np.random.default_rng(1)
    generator = torch.Generator().manual_seed(0)
    orders = set()
    for trial in range(240):
        picture = drawn_picture(random, trial, 1500)
        height, width = picture.shape[:2]
        size = int(random.choice(SIZES))
        geometry = [
            padded_resize(height, width, size),
            resized_center_crop(height, width, size),
            random_resized_crop(height, width, size, scale=(0.1, 1.0), ratio=(0.2, 5.0), generator=generator),
        ][trial % 3 if max(height, width) < 30 * min(height, width) else 0]
        orders.add(geometry.vertical_first)
        made = with_isa(picture, size, geometry, isa, threads=1 + trial % 2)
        assert torch.equal(made, pillow(picture, size, geometry)), (trial, geometry)
    assert orders == ({True, False} if PILLOW >= (13,) else {False})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("height", "width"), [(50, 8000), (8000, 50), (4000, 3000)])
def test_canvas_of_large_pictures(isa: str, height: int, width: int) -> None:
    picture = noise(height, width)
    for geometry in (padded_resize(height, width, 224), resized_center_crop(height, width, 224)):
        if max(geometry.resized) <= 16_384:
            assert torch.equal(with_isa(picture, 224, geometry, isa), pillow(picture, 224, geometry)), geometry


@pytest.mark.parametrize("isa", ISAS)
def test_pictures_at_the_end_of_memory(isa: str) -> None:
    """The loops read whole vectors: never past the last byte of a picture. Run under AddressSanitizer too."""
    for height, width in [(1, 1), (1, 5), (2, 21), (3, 22), (40, 3), (7, 64)]:
        memory = torch.randint(0, 256, (height * width * 3,), dtype=torch.uint8)
        picture = memory.clone().view(height, width, 3)
        for geometry in (padded_resize(height, width, 32), resized_center_crop(height, width, 32)):
            assert torch.equal(with_isa(picture, 32, geometry, isa), pillow(picture, 32, geometry))


def test_pillow_resizes_squares_horizontally_first() -> None:
    """The order of the passes shows in the bits; a padded square must take Pillow's."""
    picture = noise(300, 300)
    image = Image.fromarray(picture.numpy())
    bicubic = Image.Resampling.BICUBIC
    horizontal_first = np.array(image.resize((64, 300), bicubic).resize((64, 64), bicubic))
    vertical_first = np.array(image.resize((300, 64), bicubic).resize((64, 64), bicubic))
    assert not np.array_equal(horizontal_first, vertical_first)
    assert np.array_equal(canvas(picture, 64).numpy(), horizontal_first)


# --- the views --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("picture_size", "view_size"),
    [(224, 224), (448, 224), (672, 224), (96, 48), (51, 17), (64, 16), (65, 13), (62, 31), (4, 2), (2, 1), (1, 1)],
)
def test_views_equal_plain_torch(picture_size: int, view_size: int, dtype: torch.dtype) -> None:
    pictures = [noise(61, 47), noise(33, 120, 1), noise(1, 1, 2)]
    expected = reference(pictures, picture_size, view_size, dtype)
    output = Guarded(expected.shape, dtype)
    result = views(pictures, picture_size=picture_size, view_size=view_size, dtype=dtype, out=output.tensor)
    assert result is output.tensor
    assert torch.equal(output.check(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_global_view_equals_interpolate_on_half(seed: int) -> None:
    picture = noise(448, 448, seed)
    assert torch.equal(views([picture], picture_size=448, view_size=224), reference([picture], 448, 224, torch.float32))


def tower_inputs(pixel_values: Tensor, config: Any, dtype: torch.dtype) -> EncoderViews:
    """What the tower makes of fp32 views for each encoder."""
    tower: Any = SimpleNamespace(config=config, dtype=dtype)
    dinov2, convnext = (
        VisionTower._dinov2_pixels(tower, pixel_values),
        VisionTower._convnext_pixels(tower, pixel_values),
    )
    return EncoderViews(pixel_values.to(dtype), dinov2, convnext)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "sizes",
    [
        *[(448, 224, 224, 256), (672, 224, 224, 256), (224, 224, 224, 256), (512, 512, 224, 512), (192, 96, 96, 192)],
        *[(96, 32, 32, 37), (24, 24, 24, 48), (10, 5, 5, 1), (62, 31, 31, 40), (64, 16, 16, 20)],
        *[(1024, 512, 224, 512), (60, 15, 15, 9), (64, 32, 32, 20), (96, 48, 48, 17), (120, 60, 60, 25)],
    ],
    ids=str,
)
def test_encoder_views_are_what_the_tower_makes(sizes: tuple[int, ...], isa: str, dtype: torch.dtype) -> None:
    named = dict(zip(("picture_size", "view_size", "dinov2_size", "convnext_size"), sizes, strict=True))
    picture_size, view_size = sizes[:2]
    pictures = [noise(90, 161), noise(40, 41, 1)]
    config = SimpleNamespace(**named, num_views=num_views(picture_size, view_size))
    expected = tower_inputs(reference(pictures, picture_size, view_size, torch.float32), config, dtype)
    outputs = [Guarded(tensor.shape, dtype) for tensor in expected]
    numbers = [n for p in pictures for n in padded_resize(p.shape[0], p.shape[1], picture_size).numbers()]
    size: Any = {"picture_size": picture_size, "view_size": view_size, "isa": isa, "threads": 2, "canvas": None}
    tensors = dict(zip(("out", "dinov2", "convnext"), (output.tensor for output in outputs), strict=True))
    extension().views(pictures, numbers, **size, **tensors)
    for name, output, wanted in zip(expected._fields, outputs, expected, strict=True):
        assert torch.equal(output.check(name), wanted), name
    if isa == ISAS[-1]:
        made = encoder_views(pictures, dtype=dtype, **named)
        assert all(torch.equal(result, wanted) for result, wanted in zip(made, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("picture_size", "dinov2_size"), [(84, 19), (100, 37), (333, 111)])
def test_dinov2_views_of_other_sizes(picture_size: int, dinov2_size: int, isa: str) -> None:
    """At ratios that no released model has, torch's own weights differ in their last bit from build to build."""
    picture = noise(120, 90)
    pixels = reference([picture], picture_size, picture_size, torch.float32).half()
    mean, std, to_mean, to_std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD, DINOV2_MEAN, DINOV2_STD))
    resized = [F.interpolate(x, (dinov2_size, dinov2_size), mode="bicubic") for x in (pixels, pixels.double())]
    plain, exact = (
        (x * std.to(x) + mean.to(x) - to_mean.to(x)) / to_std.to(x) for x in (resized[0].float(), resized[1])
    )
    out, dinov2 = torch.empty(1, 3, picture_size, picture_size), Guarded(plain.shape, torch.float32)
    sizes: Any = {"picture_size": picture_size, "view_size": picture_size, "isa": isa, "threads": 1}
    numbers = padded_resize(120, 90, picture_size).numbers()
    extension().views([picture], numbers, **sizes, out=out, dinov2=dinov2.tensor, convnext=None, canvas=None)
    assert_close(dinov2.check(), plain, exact)


def test_normalised_bytes_equal_torch_in_every_instruction_set() -> None:
    """All 256 bytes of all channels, at every place of a vector."""
    for offset in range(16):
        row = (torch.arange(256 + offset) - offset).to(torch.uint8)
        picture = row.view(1, -1, 1).repeat(len(row), 1, 3)
        size = len(row)
        expected = reference([picture], size, size, torch.float32)
        for isa in ISAS:
            out = torch.empty(1, 3, size, size)
            sizes: Any = {"picture_size": size, "view_size": size, "isa": isa, "threads": 1}
            numbers = padded_resize(size, size, size).numbers()
            extension().views([picture], numbers, **sizes, out=out, dinov2=None, convnext=None, canvas=None)
            assert torch.equal(out, expected), (offset, isa)


def test_any_strides() -> None:
    base = noise(40, 60)
    planar = base.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    pictures = [base[::2, 3:50:3], base.transpose(0, 1), planar, base.flip(2), base[:1].expand(30, 60, 3)]
    assert torch.equal(
        views(pictures, picture_size=32, view_size=16),
        reference([picture.contiguous() for picture in pictures], 32, 16, torch.float32),
    )


def test_an_empty_batch() -> None:
    assert views([], picture_size=32, view_size=16).shape == (0, 3, 16, 16)


def test_a_picture_does_not_depend_on_its_batch_or_the_threads() -> None:
    pictures = [noise(70 + 13 * index, 50 + 31 * index, index) for index in range(5)]
    size: Any = {"picture_size": 64, "view_size": 32}
    alone = torch.cat([views([picture], **size) for picture in pictures])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert torch.equal(views(pictures, **size), alone)
    finally:
        torch.set_num_threads(threads)


def test_repeats_are_equal() -> None:
    pictures = [noise(99, 47), noise(20, 90, 1)]
    assert_repeatable(lambda: views(pictures, picture_size=64, view_size=32))


@pytest.mark.parametrize("fill", [0, 255])
def test_every_byte_of_the_canvas_is_written(fill: int) -> None:
    picture = noise(31, 77)
    output = Guarded((45, 45, 3), torch.uint8, fill=fill)
    canvas(picture, 45, out=output.tensor)
    assert torch.equal(output.check(), pillow(picture, 45))


# --- as a torch op ----------------------------------------------------------------------------------------------------
def test_opcheck() -> None:
    out, nearest = torch.empty(10, 3, 8, 8), torch.empty(10, 3, 9, 9)
    pictures = [noise(20, 30), noise(5, 5)]
    numbers = [*padded_resize(20, 30, 16).numbers(), *padded_resize(5, 5, 16).numbers()]
    made = torch.empty(2, 16, 16, 3, dtype=torch.uint8)
    for outputs in [(out, None, None, None), (out, torch.empty_like(out), nearest, made), (None, None, None, made)]:
        torch.library.opcheck(torch.ops.sphinx_fast.views.default, (pictures, numbers, 16, 8, *outputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    def cut(pictures: list[Tensor]) -> Tensor:
        geometries = [resized_center_crop(p.shape[0], p.shape[1], 32) for p in pictures]
        plain = encoder_views(pictures, picture_size=32, view_size=16, convnext_size=20)
        return plain.dinov2.sum() + views(pictures, picture_size=32, view_size=16, geometries=geometries).sum()

    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for pictures in ([noise(20, 30), noise(33, 31, 1)], [noise(47, 30), noise(50, 61, 2)]):
        assert torch.equal(compiled(pictures), cut(pictures))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("picture_size", "view_size"), [(224, 224), (448, 224), (672, 224), (51, 17), (62, 31)])
def test_cuda_equals_cpu(picture_size: int, view_size: int, dtype: torch.dtype) -> None:
    pictures = [noise(61, 47), noise(333, 120, 1), noise(1, 1, 2), noise(50, 8000)[:, ::3]]
    size: Any = {"picture_size": picture_size, "view_size": view_size, "convnext_size": view_size + 5, "dtype": dtype}
    expected = encoder_views(pictures, **size)
    outputs = [Guarded(tensor.shape, dtype, "cuda") for tensor in expected]
    on_device = [picture.cuda() for picture in pictures]
    encoder_views(on_device, **size, out=EncoderViews(*(output.tensor for output in outputs)))
    for name, output, wanted in zip(expected._fields, outputs, expected, strict=True):
        assert torch.equal(output.check(name).cpu(), wanted), name
    for picture in on_device:
        assert torch.equal(canvas(picture, picture_size).cpu(), canvas(picture.cpu(), picture_size))


@pytest.mark.gpu
def test_cuda_training_transforms_and_light_variants_equal_cpu() -> None:
    pictures = [noise(500, 90), noise(200, 700, 1), noise(64, 64, 2)]
    for size in ((448, 224, 224, 256), (512, 512, 224, 512), (1024, 512, 224, 512)):
        named: Any = dict(zip(("picture_size", "view_size", "dinov2_size", "convnext_size"), size, strict=True))
        generator = torch.Generator().manual_seed(0)
        geometries = [random_resized_crop(p.shape[0], p.shape[1], size[0], generator=generator) for p in pictures]
        geometries[1] = resized_center_crop(200, 700, size[0])
        expected = encoder_views(pictures, **named, geometries=geometries)
        made = encoder_views([p.cuda() for p in pictures], **named, geometries=geometries)
        assert all(torch.equal(one.cpu(), wanted) for one, wanted in zip(made, expected, strict=True)), size


@pytest.mark.gpu
@pytest.mark.parametrize("count", [33, 321, 700])
def test_cuda_batches_larger_than_a_launch(count: int) -> None:
    pictures = [noise(20 + index % 7, 30, index) for index in range(count)]
    made = views([picture.cuda() for picture in pictures], picture_size=16, view_size=8)
    assert torch.equal(made.cpu(), views(pictures, picture_size=16, view_size=8))


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_pixels() -> None:
    picture = noise(300, 400).cuda()
    size: Any = {"picture_size": 448, "view_size": 224}
    out = views([picture], **size)  # once outside: loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views([picture], **size, out=out)
    picture.copy_(noise(300, 400, 1))
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out.cpu(), views([noise(300, 400, 1)], **size))


@pytest.mark.gpu
def test_cuda_runs_on_the_callers_stream() -> None:
    """The pictures come into being on the same stream, behind a long wait: a call on another one would not see them."""
    source, stream = noise(700, 900), torch.cuda.Stream()
    picture = torch.zeros(700, 900, 3, dtype=torch.uint8, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        picture.copy_(source.pin_memory(), non_blocking=True)
        made = views([picture], picture_size=448, view_size=224)
    stream.synchronize()
    assert torch.equal(made.cpu(), views([source], picture_size=448, view_size=224))
