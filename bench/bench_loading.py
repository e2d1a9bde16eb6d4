"""Pictures per second from uint8 pictures or JPEG files to model inputs, and what that is worth in `ask`.

    python bench/bench_loading.py [--threads 1] [--save]

`processor`: eight pictures -> pixel_values of SPHINX-1k, five views of 224 px each. `JPEG`: the same from the files'
bytes, which Pillow decodes for all. Peers:
    reference         our processor in plain Pillow and torch: the same tensors
    clip pil          transformers' CLIPImageProcessorPil at 448 px: one resize, no padding, no views
    clip torchvision  transformers' CLIPImageProcessor, the same on torchvision; where that is installed
`ask`: one token of the embedded model about one picture, with ours and with the reference processor.
"""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np
import torch
import transformers
from common import Call, Line, arguments, copy_ceiling, measure, save
from PIL import Image

from sphinx_fast import Sphinx
from sphinx_fast.model.image_processor import SphinxImageProcessor, SphinxImageProcessorReference

SHAPES = [(480, 640), (1080, 1920)]
BATCH = 8
SQUARE = {"size": {"height": 448, "width": 448}, "do_center_crop": False}


def drawn_picture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise at three scales: a JPEG of it is about as large as that of a photograph."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for step in (4, 16, 64):
        coarse = random.integers(0, 256, (height // step + 2, width // step + 2, 3), np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return (total / 3).astype(np.uint8)


def jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decoded(files: list[bytes]) -> list[Any]:
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def processors() -> dict[str, Any]:
    sizes = {"picture_size": 448, "view_size": 224}
    made: dict[str, Any] = {"": SphinxImageProcessor(**sizes), "reference": SphinxImageProcessorReference(**sizes)}
    made["clip pil"] = transformers.CLIPImageProcessorPil(**SQUARE)
    if importlib.util.find_spec("torchvision"):
        made["clip torchvision"] = transformers.CLIPImageProcessor(**SQUARE)
    return made


def main() -> None:
    chosen = arguments(__doc__ or "")
    ceiling = copy_ceiling("cpu")
    lines: list[Line] = []

    def add(room: str, shape: str, calls: dict[str, Call], pictures: int, moved: int) -> None:
        line = measure(room, shape, calls.pop(""), calls, moved, ceiling, chosen)
        print(f"{'':<10} {pictures / line.milliseconds * 1e3:.0f} pictures a second")
        lines.append(line)

    for height, width in SHAPES:
        pictures = [drawn_picture(height, width, seed) for seed in range(BATCH)]
        files = [jpeg(picture) for picture in pictures]
        size, moved = f"{BATCH} x {height}x{width}", BATCH * (height * width * 3 + 5 * 3 * 224 * 224 * 4)
        ready, from_files = dict[str, Call](), dict[str, Call]()
        for name, processor in processors().items():
            ready[name] = lambda p=processor, x=pictures: p(x, return_tensors="pt")
            from_files[name] = lambda p=processor, x=files: p(decoded(x), return_tensors="pt")
        add("processor", size, ready, BATCH, moved)
        add("JPEG", f"{size}, {sum(map(len, files)) // BATCH // 1024} KiB", from_files, BATCH, moved)

    sphinx = {"": Sphinx.from_pretrained(device="cpu", dtype=torch.float32)}
    sphinx["reference"] = Sphinx.from_pretrained(device="cpu", dtype=torch.float32)
    vision = sphinx["reference"].processor.image_processor
    sphinx["reference"].processor.image_processor = SphinxImageProcessorReference(vision.picture_size, vision.view_size)
    for height, width in SHAPES:
        picture = drawn_picture(height, width, 0)
        asks: dict[str, Call] = {
            name: lambda s=one, p=picture: s.ask(p, "What is in the image?", max_new_tokens=1)
            for name, one in sphinx.items()
        }
        add("ask", f"{height}x{width}, one token", asks, 1, height * width * 3)
    save(lines, chosen, "loading")


if __name__ == "__main__":
    main()
